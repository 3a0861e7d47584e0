import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from bench.errors import BrokenFile
from bench.load.weights import CheckpointWeights, SyntheticWeights, seed_of
from bench.run.building import Builder
from bench.run.isolation import WatchedVariables
from bench.run.order import Order
from tests.record_factory import request

SHAPES = {
    "model.embed_tokens.weight": torch.Size([64, 32]),
    "model.layers.0.self_attn.q_proj.weight": torch.Size([32, 32]),
    "model.layers.1.self_attn.q_proj.weight": torch.Size([32, 32]),
    "model.layers.0.self_attn.q_proj.bias": torch.Size([32]),
    "model.layers.0.input_layernorm.weight": torch.Size([32]),
    "model.norm.weight": torch.Size([32]),
}


def synthetic(deviation=0.02, shapes=SHAPES):
    return SyntheticWeights(shapes, deviation)


def test_values_do_not_depend_on_the_order_in_which_they_are_drawn():
    there, back = synthetic(), synthetic()
    first = {name: there.tensor(name) for name in SHAPES}
    second = {name: back.tensor(name) for name in reversed(SHAPES)}
    assert all(torch.equal(first[name], second[name]) for name in SHAPES)


def test_values_do_not_depend_on_the_global_generator():
    torch.manual_seed(1)
    first = synthetic().tensor("model.embed_tokens.weight")
    torch.manual_seed(2)
    assert torch.equal(first, synthetic().tensor("model.embed_tokens.weight"))


def test_drawing_leaves_the_global_generator_alone():
    torch.manual_seed(1)
    wanted = torch.rand(3)
    torch.manual_seed(1)
    synthetic().tensor("model.embed_tokens.weight")
    assert torch.equal(torch.rand(3), wanted)


def test_layers_of_one_shape_have_different_values():
    drawn = synthetic()
    assert not torch.equal(
        drawn.tensor("model.layers.0.self_attn.q_proj.weight"),
        drawn.tensor("model.layers.1.self_attn.q_proj.weight"),
    )


@pytest.mark.parametrize("name", SHAPES)
def test_values_are_never_all_zero_and_are_bfloat16(name):
    drawn = synthetic().tensor(name)
    assert drawn.dtype == torch.bfloat16
    assert drawn.shape == SHAPES[name]
    assert int(drawn.count_nonzero()) > drawn.numel() // 2


@pytest.mark.parametrize("name", ["model.norm.weight", "model.layers.0.input_layernorm.weight"])
def test_norm_weights_are_one(name):
    assert bool((synthetic().tensor(name) == 1).all())


def test_values_have_the_asked_deviation():
    drawn = synthetic(0.05, {"w": torch.Size([300, 300])}).tensor("w").float()
    assert abs(float(drawn.std()) - 0.05) < 0.001
    assert abs(float(drawn.mean())) < 0.001


def test_a_tensor_of_more_than_one_piece_has_no_part_left_undrawn():
    count = 2**24 + 1000
    drawn = synthetic(1.0, {"w": torch.Size([count])}).tensor("w")
    assert abs(float(drawn[2**24 :].float().std()) - 1) < 0.15
    assert not torch.equal(drawn[:1000], drawn[2**24 :])


def test_a_name_that_is_no_tensor_is_not_contained():
    assert "model.norm.weight" in synthetic()
    assert "lm_head.weight" not in synthetic()


def test_seeds_depend_on_name_and_seed_and_are_pinned():
    assert len({seed_of("a", 0), seed_of("a", 1), seed_of("b", 0)}) == 3
    assert seed_of("a", 0) == 8342909361095637454
    assert 0 <= seed_of("a", 0) < 2**63


@pytest.fixture
def shards(tmp_path):
    tensors = {"a": torch.randn(3, 4), "b": torch.arange(6, dtype=torch.int32), "c": torch.ones(2).bfloat16()}
    save_file({"a": tensors["a"]}, tmp_path / "one.safetensors", metadata={"format": "pt"})
    save_file({"b": tensors["b"], "c": tensors["c"]}, tmp_path / "two.safetensors", metadata={"format": "pt"})
    index = {"weight_map": {"a": "one.safetensors", "b": "two.safetensors", "c": "two.safetensors"}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    return tmp_path, tensors


def test_tensors_are_read_out_of_all_shards_in_their_own_dtype(shards):
    folder, tensors = shards
    weights = CheckpointWeights(folder)
    for name, tensor in tensors.items():
        read = weights.tensor(name)
        assert read.dtype == tensor.dtype
        assert torch.equal(read, tensor)


def test_tensors_are_read_without_an_index_too(shards):
    folder, tensors = shards
    (folder / "model.safetensors.index.json").unlink()
    assert torch.equal(CheckpointWeights(folder).tensor("a"), tensors["a"])


def test_a_tensor_belongs_to_who_read_it(shards):
    weights = CheckpointWeights(shards[0])
    weights.tensor("a").zero_()
    assert int(weights.tensor("a").count_nonzero()) > 0


def test_a_missing_tensor_is_named(shards):
    weights = CheckpointWeights(shards[0])
    assert "d" not in weights
    with pytest.raises(BrokenFile, match="holds no tensor 'd'"):
        weights.tensor("d")


def test_the_metadata_is_no_tensor(shards):
    assert "__metadata__" not in CheckpointWeights(shards[0])


@pytest.mark.parametrize(
    ("kind", "asked", "drawn"),
    [("cuda", "cpu", "cuda"), ("cuda", "cuda:1", "cuda:1"), ("cpu", "cpu", "cpu"), ("cpu", "cuda", "cpu")],
)
def test_values_are_drawn_on_the_kind_of_device_that_trains_whoever_asks(monkeypatch, kind, asked, drawn):
    """A CPU and a card draw different values: a checkpoint packed of the other's would be another model."""
    moved = []

    def draw(weights, name, device):
        assert device == torch.device(drawn)
        return SimpleNamespace(to=moved.append)

    monkeypatch.setattr(SyntheticWeights, "_drawn", draw)
    SyntheticWeights(SHAPES, 0.02, kind).tensor("model.norm.weight", torch.device(asked))
    assert moved == [torch.device(asked)]


def test_the_weights_of_a_run_are_drawn_on_its_device(monkeypatch):
    kinds = []
    monkeypatch.setattr("bench.run.building.SyntheticWeights", lambda shapes, deviation, kind: kinds.append(kind))
    for device in ("cuda", "cpu"):
        order = Order(request=request("bf16", device=device), model_folder=None)
        Builder(order, None, WatchedVariables()).source(None, torch.nn.Linear(2, 2), None)
    assert kinds == ["cuda", "cpu"]
