from types import SimpleNamespace

import pytest
import torch
from torch import nn

from bench.load.contract import Backend, Layer, Options, Shape
from bench.load.layout import Layout
from bench.load.model import BuiltModel
from bench.load.proof import (
    StorageCount,
    frozen_breaches,
    gradient_breaches,
    layer_bits,
    quantization_breaches,
    tensors_of,
)

SHAPE = Shape(32, 64)


class Holder:
    """An ordinary object."""


class CallableHolder(Holder):
    """An object that can be called, as closures and quantizers can."""

    def __call__(self):
        return None


class Slotted:
    """An object without a __dict__."""

    __slots__ = ("dense",)


class Coded(nn.Module):
    """A layer of one byte a weight and one float32 scale a row."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(32, 64, dtype=torch.int8), requires_grad=False)
        self.register_buffer("scale", torch.ones(32))


class EightBits(Backend):
    """What Coded says of itself."""

    variants = {"coded": Options()}

    def linear(self, layer: Layer) -> nn.Module:
        return Coded()

    def expected_bits(self, shape: Shape) -> float:
        return 8 + 32 / shape.in_features


def breaches(layer):
    model = nn.ModuleDict({"q": layer})
    return quantization_breaches(
        BuiltModel(model, ("q",), Layout.on(torch.device("cpu"))),
        {"q": SHAPE},
        EightBits(Options(), "cpu", "bfloat16"),
    )


def dense():
    return torch.ones(32, 64, dtype=torch.bfloat16)


def held(holder):
    holder.dense = dense()
    return holder


def linear():
    return nn.Linear(64, 32, bias=False, dtype=torch.bfloat16)


def closure():
    kept = dense()
    return lambda: kept


HIDING_PLACES = {
    "attribute": lambda layer: setattr(layer, "kept", dense()),
    "buffer": lambda layer: layer.register_buffer("kept", dense()),
    "parameter": lambda layer: setattr(layer, "kept", nn.Parameter(dense())),
    "submodule": lambda layer: setattr(layer, "kept", linear()),
    "dict": lambda layer: setattr(layer, "kept", {"a": {"b": dense()}}),
    "list": lambda layer: setattr(layer, "kept", [1, (2, dense())]),
    "object": lambda layer: setattr(layer, "kept", held(Holder())),
    "object in a dict in an object": lambda layer: setattr(
        layer, "kept", SimpleNamespace(deep={"x": held(Holder())})
    ),
    "attribute of the weight": lambda layer: setattr(layer.weight, "kept", dense()),
    "module hidden from registration": lambda layer: layer.__dict__.__setitem__("kept", linear()),
    "the codes' own name in a dict": lambda layer: setattr(layer, "kept", {"weight": dense()}),
}
UNSEEN_PLACES = {
    "callable object": lambda layer: setattr(layer, "kept", held(CallableHolder())),
    "object with slots": lambda layer: setattr(layer, "kept", held(Slotted())),
    "closure": lambda layer: setattr(layer, "kept", closure()),
    "bias that is no tensor": lambda layer: setattr(layer, "bias", {"dense": dense()}),
}


def test_a_layer_that_is_what_it_says_has_no_breach():
    assert breaches(Coded()) == []


@pytest.mark.parametrize("place", HIDING_PLACES)
def test_a_dense_copy_is_found_wherever_it_is_kept(place):
    layer = Coded()
    HIDING_PLACES[place](layer)
    (breach,) = breaches(layer)
    assert "q (Coded) holds 24.500 bits per weight, the arithmetic says 8.500" in breach


@pytest.mark.parametrize("place", UNSEEN_PLACES)
def test_a_dense_copy_is_found_in_the_last_corners_too(place):
    layer = Coded()
    UNSEEN_PLACES[place](layer)
    assert breaches(layer)


def test_a_layer_that_was_never_quantized_is_a_breach():
    assert "holds 16.000 bits per weight" in breaches(linear())[0]


def test_a_layer_that_holds_less_than_it_says_is_a_breach():
    layer = Coded()
    del layer.scale
    assert "holds 8.000 bits per weight" in breaches(layer)[0]


def test_a_bias_is_not_counted():
    layer = Coded()
    layer.bias = nn.Parameter(torch.ones(32))
    assert breaches(layer) == []


def test_storage_that_two_tensors_share_is_counted_once():
    layer = Coded()
    layer.view = layer.weight.view(-1)
    layer.again = {"x": layer.weight, "y": layer.scale[:4]}
    assert breaches(layer) == []


def test_storage_that_two_layers_share_is_counted_once_in_a_sum():
    first, second = Coded(), Coded()
    second.scale = first.scale
    count = StorageCount()
    count.add(first, ("weight",))
    count.add(second, ("weight",))
    assert (count.codes, count.metadata) == (2 * 2048, 128)


def test_a_view_of_a_large_storage_counts_the_whole_of_it():
    layer = Coded()
    layer.weight = nn.Parameter(torch.ones(320, 64, dtype=torch.int8)[:32], requires_grad=False)
    assert layer_bits(layer, SHAPE, ("weight",)) == pytest.approx(80.5)


def test_what_has_no_memory_is_not_counted():
    layer = Coded()
    layer.shape_only = torch.empty(500, 500, device="meta")
    assert breaches(layer) == []


def test_codes_and_metadata_are_told_apart():
    count = StorageCount()
    count.add(Coded(), ("weight",))
    assert (count.codes, count.metadata, count.biases) == (2048, 128, 0)


def test_a_layer_that_refers_to_itself_is_walked_once():
    layer = Coded()
    layer.loop = {"me": layer, "list": []}
    layer.loop["list"].append(layer.loop)
    assert len(list(tensors_of(layer))) == 2


def adapters():
    model = nn.ModuleDict(
        {"base": nn.Linear(4, 4), "a": nn.Linear(4, 2, bias=False), "b": nn.Linear(2, 4, bias=False)}
    )
    model["base"].requires_grad_(False)
    return model, {"q.lora_A": model["a"].weight, "q.lora_B": model["b"].weight}


def test_a_frozen_base_has_no_breach():
    assert frozen_breaches(*adapters()) == []


def test_a_base_parameter_left_trainable_is_named():
    model, trainable = adapters()
    model["base"].bias.requires_grad_(True)
    assert frozen_breaches(model, trainable) == ["base parameter base.bias is not frozen"]


def test_an_adapter_tensor_that_is_frozen_is_named():
    model, trainable = adapters()
    model["b"].weight.requires_grad_(False)
    assert frozen_breaches(model, trainable) == ["adapter tensor q.lora_B is not trainable"]


def test_gradients_that_arrive_are_no_breach_although_that_of_a_is_zero():
    _, trainable = adapters()
    trainable["q.lora_A"].grad = torch.zeros(2, 4)
    trainable["q.lora_B"].grad = torch.ones(4, 2)
    assert gradient_breaches(trainable) == []


def test_a_gradient_of_b_that_is_zero_everywhere_is_named():
    _, trainable = adapters()
    trainable["q.lora_A"].grad = torch.ones(2, 4)
    trainable["q.lora_B"].grad = torch.zeros(4, 2)
    assert gradient_breaches(trainable) == ["the gradient of q.lora_B is zero everywhere"]


def test_a_gradient_that_never_came_is_named():
    _, trainable = adapters()
    trainable["q.lora_B"].grad = torch.ones(4, 2)
    assert gradient_breaches(trainable) == ["no gradient reached q.lora_A"]


def test_a_gradient_that_is_not_finite_is_a_result_and_no_breach():
    _, trainable = adapters()
    trainable["q.lora_A"].grad = torch.zeros(2, 4)
    trainable["q.lora_B"].grad = torch.full((4, 2), float("nan"))
    assert gradient_breaches(trainable) == []
