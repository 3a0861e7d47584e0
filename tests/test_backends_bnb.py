import math

import pytest
import torch

from bench.load.contract import Layer, Shape
from bench.load.proof import layer_bits
from bench.load.registry import get_backend

SHAPES = [
    Shape(64, 128),
    Shape(128, 384),
    Shape(3, 50),  # 150 weights: two blocks and a part
    Shape(7, 5),  # 35 weights: less than a block, an odd number
    Shape(129, 65),
    Shape(130, 1000),  # more than one block of absmax values
]
NF4 = [  # 2305.14314, appendix E
    -1.0,
    -0.6961928009986877,
    -0.5250730514526367,
    -0.39491748809814453,
    -0.28444138169288635,
    -0.18477343022823334,
    -0.09105003625154495,
    0.0,
    0.07958029955625534,
    0.16093020141124725,
    0.24611230194568634,
    0.33791524171829224,
    0.44070982933044434,
    0.5626170039176941,
    0.7229568362236023,
    1.0,
]


def layer(identifier, shape, dtype=torch.bfloat16, weight=None, bias=True, **options):
    torch.manual_seed(0)
    if weight is None:
        weight = torch.randn(shape.out_features, shape.in_features) * 0.02
    made = get_backend(identifier).create(options, "cpu", "bfloat16")
    described = Layer(
        "q",
        shape,
        {"weight": weight},
        torch.randn(shape.out_features).to(dtype) if bias else None,
        dtype,
        torch.device("cpu"),
    )
    return made.linear(described), made


def backward(built, in_features, dtype=torch.bfloat16):
    x = torch.randn(3, in_features, dtype=dtype, requires_grad=True)
    y = built(x)
    y.float().sum().backward()
    return x, y


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("identifier", ["bnb-nf4", "bnb-nf4-dq", "bnb-int8"])
def test_a_layer_holds_the_bits_that_the_arithmetic_says(identifier, shape):
    built, made = layer(identifier, shape)
    assert layer_bits(built, shape, made.codes) == pytest.approx(made.expected_bits(shape), rel=1e-6)


@pytest.mark.parametrize("identifier", ["bnb-nf4", "bnb-nf4-dq", "bnb-int8"])
def test_a_layer_holds_the_same_bits_after_forward_and_backward(identifier):
    built, made = layer(identifier, Shape(64, 128))
    built.train()
    backward(built, 128)
    assert layer_bits(built, Shape(64, 128), made.codes) == pytest.approx(made.expected_bits(Shape(64, 128)))


def test_nf4_in_the_limit_is_four_and_a_half_bits_and_less_with_double_quantization():
    large = Shape(8192, 8192)
    bits = {
        name: get_backend(name).create({}, "cpu", "bfloat16").expected_bits(large)
        for name in ("bnb-nf4", "bnb-nf4-dq")
    }
    assert bits["bnb-nf4"] == pytest.approx(4.5, abs=1e-4)
    assert bits["bnb-nf4-dq"] == pytest.approx(4 + 8 / 64 + 32 / (64 * 256), abs=1e-3)


def test_nf4_values_are_the_papers_nearest_ones_times_the_blocks_absmax():
    torch.manual_seed(3)
    weight = torch.randn(4, 64)
    built, _ = layer("bnb-nf4", Shape(4, 64), torch.float32, weight, bias=False)
    seen = built(torch.eye(64)).t()
    table = torch.tensor(NF4)
    absmax = weight.abs().amax(dim=1, keepdim=True)
    wanted = table[(weight / absmax).unsqueeze(2).sub(table).abs().argmin(dim=2)] * absmax
    torch.testing.assert_close(seen, wanted, rtol=1e-5, atol=1e-6)


def test_double_quantization_only_moves_the_scales_a_little():
    torch.manual_seed(3)
    weight = torch.randn(64, 64)
    plain, _ = layer("bnb-nf4", Shape(64, 64), torch.float32, weight, bias=False)
    double, _ = layer("bnb-nf4-dq", Shape(64, 64), torch.float32, weight, bias=False)
    first, second = plain(torch.eye(64)), double(torch.eye(64))
    assert not torch.equal(first, second)
    assert float((first - second).norm() / first.norm()) < 0.02


def test_int8_rounds_to_127_steps_of_the_rows_absmax():
    torch.manual_seed(3)
    weight = torch.randn(8, 32).to(torch.float16)
    built, _ = layer("bnb-int8", Shape(8, 32), torch.float32, weight)
    codes = torch.round(weight.float() * 127 / weight.float().abs().amax(dim=1, keepdim=True))
    backward(built, 32, torch.float32)
    state = built.state.CB if built.state.CB is not None else built.weight
    assert int((state.float() - codes).abs().max()) <= 1
    assert float((state.float() == codes).float().mean()) > 0.99


@pytest.mark.parametrize("identifier", ["bnb-nf4", "bnb-nf4-dq", "bnb-int8"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_gives_its_compute_dtype_and_lets_gradients_through(identifier, dtype):
    built, _ = layer(identifier, Shape(64, 128), dtype)
    x, y = backward(built.train(), 128, dtype)
    assert y.dtype == dtype
    assert bool(x.grad.isfinite().all())
    assert bool(x.grad.any())


@pytest.mark.parametrize("identifier", ["bnb-nf4", "bnb-nf4-dq", "bnb-int8"])
def test_backward_is_near_that_of_the_dense_layer(identifier):
    torch.manual_seed(0)
    weight = torch.randn(64, 128) * 0.02
    built, _ = layer(identifier, Shape(64, 128), torch.float32, weight)
    x, _ = backward(built.train(), 128, torch.float32)
    wanted = weight.sum(dim=0).expand(3, -1)
    assert float((x.grad - wanted).norm() / wanted.norm()) < 0.2


@pytest.mark.parametrize("identifier", ["bnb-nf4", "bnb-nf4-dq", "bnb-int8"])
def test_nothing_of_the_base_is_trainable(identifier):
    built, _ = layer(identifier, Shape(64, 128))
    assert not any(parameter.requires_grad for parameter in built.parameters())


def test_the_bias_is_added():
    built, _ = layer("bnb-nf4", Shape(64, 128), torch.float32)
    torch.testing.assert_close(built(torch.zeros(1, 128))[0], built.bias.detach())


def test_fp4_is_another_table():
    nf4, _ = layer("bnb-nf4", Shape(64, 64), torch.float32)
    fp4, _ = layer("bnb-nf4", Shape(64, 64), torch.float32, quant_type="fp4")
    x = torch.eye(64)
    assert not torch.equal(nf4(x), fp4(x))


def test_the_outlier_threshold_reaches_the_layer():
    built, _ = layer("bnb-int8", Shape(8, 32), outlier_threshold=2.5)
    assert math.isclose(built.state.threshold, 2.5)
