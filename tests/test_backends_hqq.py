import pytest
import torch

from bench.errors import BadValue
from bench.load.contract import Layer, Shape
from bench.load.proof import layer_bits
from bench.load.registry import get_backend


def backend(dtype="bfloat16", **options):
    return get_backend("hqq").create(options, "cpu", dtype)


def layer(shape, dtype=torch.bfloat16, bias=True, **options):
    torch.manual_seed(0)
    made = backend(
        {torch.bfloat16: "bfloat16", torch.float32: "float32", torch.float16: "float16"}[dtype], **options
    )
    weight = torch.randn(shape.out_features, shape.in_features) * 0.02
    described = Layer(
        "q",
        shape,
        {"weight": weight},
        torch.randn(shape.out_features).to(dtype) if bias else None,
        dtype,
        torch.device("cpu"),
    )
    return made.linear(described), made, weight


@pytest.mark.parametrize("shape", [Shape(64, 128), Shape(48, 576), Shape(7, 128), Shape(128, 384)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_layer_holds_the_bits_that_the_arithmetic_says(shape, dtype):
    built, made, _ = layer(shape, dtype)
    assert layer_bits(built, shape, made.codes) == pytest.approx(made.expected_bits(shape), rel=0.01)


@pytest.mark.parametrize(
    "options",
    [{"bits": 2}, {"bits": 8}, {"group_size": 32}, {"group_size": 128}, {"axis": 0}, {"optimize": False}],
    ids=str,
)
def test_other_options_hold_the_bits_that_the_arithmetic_says(options):
    shape = Shape(64, 128)
    built, made, _ = layer(shape, **options)
    assert layer_bits(built, shape, made.codes) == pytest.approx(made.expected_bits(shape), rel=0.01)


def test_a_layer_holds_the_same_bits_after_forward_and_backward():
    shape = Shape(64, 128)
    built, made, _ = layer(shape)
    built.train()
    built(torch.randn(2, 128, dtype=torch.bfloat16, requires_grad=True)).float().sum().backward()
    assert layer_bits(built, shape, made.codes) == pytest.approx(made.expected_bits(shape), rel=0.01)


def test_hidden_size_576_falls_back_from_groups_of_128_with_a_note():
    made = backend(group_size=128)
    made.fit([Shape(576, 576), Shape(1536, 576), Shape(576, 1536)])
    assert made.options.group_size == 64
    (note,) = made.notes
    assert note.startswith("group size 64 instead of 128")


def test_hidden_size_576_takes_the_default_groups_of_64_without_a_note():
    made = backend()
    made.fit([Shape(576, 576), Shape(1536, 576), Shape(576, 1536)])
    assert (made.options.group_size, made.notes) == (64, [])


def test_a_shape_that_no_group_divides_is_refused():
    with pytest.raises(ValueError, match="no HQQ group size up to 64"):
        backend().fit([Shape(8, 100), Shape(8, 101)])


def test_an_odd_number_of_groups_is_fitted_or_refused():
    shape = Shape(7, 64)
    made = backend()
    try:
        made.fit([shape])
    except ValueError:
        return
    tensors = {"weight": torch.randn(7, 64)}
    assert made.linear(Layer("q", shape, tensors, None, torch.bfloat16, torch.device("cpu")))


def test_the_dequantized_weight_is_near_the_dense_one():
    built, _, weight = layer(Shape(64, 128), torch.float32, bias=False)
    seen = built(torch.eye(128)).t()
    assert float((seen - weight).norm() / weight.norm()) < 0.12


def test_eight_bits_are_nearer_than_four_and_four_than_two():
    errors = []
    for bits in (8, 4, 2):
        built, _, weight = layer(Shape(64, 128), torch.float32, bias=False, bits=bits)
        errors.append(float((built(torch.eye(128)).t() - weight).norm()))
    assert errors == sorted(errors)


def test_backward_multiplies_by_the_dequantized_weight():
    built, _, _ = layer(Shape(64, 128), torch.float32, bias=False)
    built.train()
    with torch.no_grad():
        weight = built(torch.eye(128)).t()
    x = torch.randn(3, 128, requires_grad=True)
    gradient = torch.randn(3, 64)
    (found,) = torch.autograd.grad(built(x), x, gradient)
    torch.testing.assert_close(found, gradient @ weight, rtol=1e-5, atol=1e-5)


def test_the_output_has_the_compute_dtype_and_the_bias():
    built, _, _ = layer(Shape(64, 128))
    y = built(torch.zeros(1, 128, dtype=torch.bfloat16))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y[0], built.bias)


def test_nothing_of_the_base_is_trainable():
    built, _, _ = layer(Shape(64, 128))
    assert not any(parameter.requires_grad for parameter in built.parameters())


def test_the_kernel_names_the_process_wide_backend():
    built, made, _ = layer(Shape(64, 128))
    assert made.kernel(built) == "HQQLinear[PYTORCH]"


@pytest.mark.parametrize("options", [{"bits": 3}, {"axis": 2}, {"group": 64}])
def test_an_option_that_cannot_be_is_refused(options):
    with pytest.raises(BadValue):
        backend(**options)


def test_quantizing_is_deterministic():
    first, second = (layer(Shape(64, 128))[0] for _ in range(2))
    assert torch.equal(first.W_q, second.W_q)
    assert torch.equal(first.meta["zero"], second.meta["zero"])
