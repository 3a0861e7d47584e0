import math

import pytest
import torch
from torch import nn

from bench.ask.experiment import Lora
from bench.load.contract import Layer, Shape
from bench.load.layout import Layout
from bench.load.lora import attach, initial_values, tensors_digest
from bench.load.model import build_model, linear_shapes, skeleton
from bench.load.registry import get_backend
from bench.load.weights import SyntheticWeights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")

ARCHITECTURE = {
    "model_type": "qwen2",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
    "tie_word_embeddings": True,
}


def attached(backend="bf16", seed=0, dtype="bfloat16", **lora):
    made = get_backend(backend).create({}, "cpu", dtype)
    model = skeleton(ARCHITECTURE, "sdpa")
    weights = SyntheticWeights({name: p.shape for name, p in model.named_parameters()}, 0.02)
    made.fit(list(linear_shapes(model).values()))
    built = build_model(model, weights, made, Layout.on(torch.device("cpu")))
    return attach(built.model, Lora(**lora), seed)


def around(layer):
    """The least model that PEFT takes, with one projection."""
    model = nn.ModuleDict({"layer": nn.ModuleDict({"q_proj": layer})})
    model.config = {"model_type": "none"}
    model.prepare_inputs_for_generation = None
    return model


@pytest.fixture(scope="module")
def plain():
    return attached()


@pytest.mark.parametrize("backend", ["bnb-nf4", "bnb-int8", "hqq", "eetq"])
def test_initial_values_are_equal_to_the_bit_on_every_base_layer(plain, backend):
    other = attached(backend)
    assert type(other.model.base_model.model.model.layers[0].mlp.up_proj.base_layer) is not nn.Linear
    assert list(other.tensors) == list(plain.tensors)
    assert all(torch.equal(other.tensors[name], plain.tensors[name]) for name in plain.tensors)
    assert (other.initial_digest, other.shapes_digest) == (plain.initial_digest, plain.shapes_digest)


def test_the_initial_digest_is_pinned(plain):
    """A new PEFT or torch must not change what every record's adapters began with."""
    assert plain.initial_digest == "f1894202030c68ef8b6199aabcd893c5a8adc70be2d1cf3418674351e405a3cd"


def test_the_compute_dtype_does_not_change_the_adapters(plain):
    assert attached(dtype="float32").initial_digest == plain.initial_digest


def test_another_seed_gives_other_adapters_of_the_same_shapes(plain):
    other = attached(seed=1)
    assert other.initial_digest != plain.initial_digest
    assert other.shapes_digest == plain.shapes_digest


def test_another_rank_gives_other_shapes(plain):
    assert attached(rank=4).shapes_digest != plain.shapes_digest


def test_every_projection_of_every_layer_has_both_tensors(plain):
    assert len(plain.tensors) == 2 * 7 * ARCHITECTURE["num_hidden_layers"]
    assert "model.layers.1.mlp.down_proj.lora_A" in plain.tensors
    assert "model.layers.0.self_attn.q_proj.lora_B" in plain.tensors


def test_adapters_are_float32_and_trainable(plain):
    assert all(tensor.dtype == torch.float32 and tensor.requires_grad for tensor in plain.tensors.values())


def test_b_is_zero_and_a_is_not(plain):
    for name, tensor in plain.tensors.items():
        assert bool(tensor.any()) is name.endswith("lora_A")


def test_the_tensors_are_the_ones_that_the_model_trains(plain):
    trained = {id(p) for p in plain.model.parameters() if p.requires_grad}
    assert trained == {id(tensor) for tensor in plain.tensors.values()}


def test_the_adapters_are_attached_to_the_forward(plain):
    name = "model.layers.0.mlp.down_proj.lora_B"
    ids = torch.arange(8).unsqueeze(0)
    before = plain.model(input_ids=ids).logits.detach()
    with torch.no_grad():
        plain.tensors[name].fill_(0.5)
        after = plain.model(input_ids=ids).logits
        plain.tensors[name].zero_()
    assert not torch.equal(before, after)


def test_only_the_named_projections_get_adapters():
    assert {name.split(".")[-2] for name in attached(target_modules=("q_proj", "up_proj")).tensors} == {
        "q_proj",
        "up_proj",
    }


def test_a_projection_that_the_model_has_not_is_named():
    model = around(nn.Linear(4, 4))
    with pytest.raises(ValueError, match="'k_proj' took an adapter"):
        attach(model, Lora(target_modules=("q_proj", "k_proj")), 0)


def test_a_is_uniform_as_peft_draws_it():
    values = initial_values("x.lora_A", torch.Size([64, 400]), 0)
    bound = 1 / math.sqrt(400)
    assert float(values.abs().max()) <= bound
    assert abs(float(values.std()) - bound / math.sqrt(3)) < 0.02 * bound


def test_values_depend_on_the_name_and_not_on_what_was_drawn_before():
    shape = torch.Size([4, 8])
    first = initial_values("x.lora_A", shape, 0)
    initial_values("y.lora_A", shape, 0)
    assert torch.equal(first, initial_values("x.lora_A", shape, 0))
    assert not torch.equal(first, initial_values("y.lora_A", shape, 0))


def test_the_digest_depends_on_names_and_values_and_not_on_their_order():
    a, b = torch.ones(2, 2), torch.zeros(2, 2)
    assert tensors_digest({"a": a, "b": b}) == tensors_digest({"b": b, "a": a})
    assert tensors_digest({"a": a, "b": b}) != tensors_digest({"a": b, "b": a})


def test_the_adapter_of_a_bnb_layer_is_the_same_as_that_of_a_linear_layer():
    """Without a model around it: the layer's own dtype and class play no part."""
    weight = torch.randn(16, 64)
    layer = Layer("q_proj", Shape(16, 64), {"weight": weight}, None, torch.bfloat16, torch.device("cpu"))
    digests = set()
    for backend in ("bf16", "bnb-nf4-dq"):
        model = around(get_backend(backend).create({}, "cpu", "bfloat16").linear(layer))
        digests.add(attach(model, Lora(target_modules=("q_proj",)), 3).initial_digest)
    assert len(digests) == 1
