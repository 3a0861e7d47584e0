import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from backends._eetq_kernels import PortableLinear, quantize
from bench.load.contract import Layer, Shape
from bench.load.proof import layer_bits
from bench.load.registry import get_backend


def scalar_codes(row):
    """round-half-away(w/scale) clipped to [-128, 127], scale = absmax/128, in exact arithmetic."""
    scale = Fraction(max(abs(w) for w in row)) / 128
    codes = []
    for w in row:
        ratio = abs(Fraction(w) / scale) if scale else Fraction(0)
        code = math.floor(ratio + Fraction(1, 2)) * (-1 if w < 0 else 1)
        codes.append(max(-128, min(127, code)))
    return codes


def codes_of(rows):
    return quantize(torch.tensor(rows, dtype=torch.float32))[0].tolist()


def layer(out_features=24, in_features=40, dtype=torch.float32, bias=True, backend="eetq"):
    torch.manual_seed(0)
    weight = torch.randn(out_features, in_features) * 0.1
    made = get_backend(backend).create({}, "cpu", "bfloat16")
    described = Layer(
        "q",
        Shape(out_features, in_features),
        {"weight": weight},
        torch.randn(out_features).to(dtype) if bias else None,
        dtype,
        torch.device("cpu"),
    )
    return made.linear(described), made


def weight_of(built):
    return built.weight.double() * built.weight_scale.double().unsqueeze(1)


def test_exact_halves_are_rounded_away_from_zero():
    row = [128.0, 0.5, -0.5, 1.5, -1.5, 2.5, -2.5, 126.5, -126.5]
    assert codes_of([row]) == [[127, 1, -1, 2, -2, 3, -3, 127, -127]]


def test_the_largest_negative_weight_reaches_minus_128_and_the_positive_127():
    assert codes_of([[-3.0, 3.0, 1.0]]) == [[-128, 127, 43]]


def test_a_row_of_zeros_has_codes_and_scale_zero():
    codes, scale = quantize(torch.tensor([[0.0, 0.0], [1.0, -0.25]]))
    assert codes.tolist() == [[0, 0], [127, -32]]
    assert scale.tolist() == [0.0, 1 / 128]


def test_codes_are_int8_and_scales_float16_one_a_row():
    codes, scale = quantize(torch.randn(5, 7))
    assert (codes.dtype, codes.shape) == (torch.int8, (5, 7))
    assert (scale.dtype, scale.shape) == (torch.float16, (5,))


@settings(max_examples=200)
@given(st.integers(-20, 6), st.lists(st.integers(-4096, 4096), min_size=2, max_size=9))
def test_codes_are_those_of_the_scalar_definition(exponent, numbers):
    """Multiples of 1/32 of the scale, halves among them, so that float32 divides exactly."""
    row = [float(n) * 2.0**exponent for n in [*numbers, 4096]]
    assert codes_of([row]) == [scalar_codes(row)]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_codes_of_ordinary_weights_are_those_of_the_scalar_definition(dtype):
    torch.manual_seed(0)
    weight = (torch.randn(40, 100) * 0.02).to(dtype)
    assert quantize(weight)[0].tolist() == [scalar_codes(row) for row in weight.tolist()]


def test_the_number_just_below_one_half_is_rounded_down():
    row = [128.0, 0.5 - 2**-25, -(0.5 - 2**-25)]
    assert codes_of([row]) == [scalar_codes(row)]


def test_forward_multiplies_by_the_dequantized_weight():
    built, _ = layer(dtype=torch.float64)
    x = torch.randn(3, 5, 40, dtype=torch.float64)
    torch.testing.assert_close(built(x), x @ weight_of(built).t() + built.bias, rtol=1e-12, atol=1e-12)


def test_the_dequantized_weight_is_near_the_dense_one():
    built, _ = layer()
    torch.manual_seed(0)
    dense = (torch.randn(24, 40) * 0.1).double()
    half = dense.abs().amax(dim=1, keepdim=True) / 128
    assert bool(((weight_of(built) - dense).abs() <= 1.07 * half).all())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_backward_is_the_gradient_of_a_dense_layer_with_the_dequantized_weight(dtype):
    built, _ = layer(dtype=dtype)
    x = torch.randn(3, 40, dtype=dtype, requires_grad=True)
    gradient = torch.randn(3, 24, dtype=dtype)
    (found,) = torch.autograd.grad(built(x), x, gradient)
    (wanted,) = torch.autograd.grad(
        torch.nn.functional.linear(x, weight_of(built).to(dtype), built.bias), x, gradient
    )
    torch.testing.assert_close(found, wanted)


def test_backward_agrees_with_finite_differences():
    built, _ = layer(6, 9, torch.float64)
    assert torch.autograd.gradcheck(built, (torch.randn(2, 9, dtype=torch.float64, requires_grad=True),))


def test_only_codes_and_scales_are_kept_for_backward():
    built, _ = layer()
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda t: t):
        built(torch.randn(2, 40, requires_grad=True))
    assert {tensor.dtype for tensor in kept} == {torch.int8, torch.float16}


def test_int8_stays_int8_through_training_and_casts():
    built, _ = layer()
    built(torch.randn(2, 40, requires_grad=True)).sum().backward()
    built.train().to(torch.bfloat16)
    assert built.weight.dtype == torch.int8
    assert built.weight.grad is None
    assert not built.weight.requires_grad


def test_autocast_decides_the_dtype():
    built, _ = layer(dtype=torch.bfloat16)
    with torch.autocast("cpu", torch.bfloat16):
        assert built(torch.randn(2, 40)).dtype == torch.bfloat16


def test_a_layer_without_bias_adds_none():
    built, _ = layer(bias=False)
    assert built.bias is None
    assert not bool(built(torch.zeros(1, 40)).any())


@pytest.mark.parametrize(("out_features", "in_features"), [(24, 40), (7, 13), (128, 384), (1, 1)])
def test_a_layer_holds_the_bits_that_the_arithmetic_says(out_features, in_features):
    built, made = layer(out_features, in_features)
    shape = Shape(out_features, in_features)
    built(torch.randn(2, in_features, requires_grad=True)).sum().backward()
    assert layer_bits(built, shape, made.codes) == pytest.approx(made.expected_bits(shape))


def test_without_cuda_the_portable_kernel_runs_and_says_so():
    built, made = layer()
    assert isinstance(built, PortableLinear)
    assert made.kernel(built).startswith("portable")
    assert (made.dtype, made.notes) == ("bfloat16", [])


def test_the_native_kernel_is_refused_without_cuda():
    with pytest.raises(ValueError, match=r"eetq\.kernel=auto or portable"):
        get_backend("eetq").create({"kernel": "native"}, "cpu", "float16")
