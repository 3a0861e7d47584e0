"""A large layer is quantized piece by piece, and comes out as if it had been quantized at once."""

import math

import bitsandbytes as bnb
import pytest
import torch

from backends import _blocks
from bench.load.contract import Layer, Shape
from bench.load.registry import get_backend

CPU = torch.device("cpu")
SHAPES = [(48, 576), (7, 128), (33, 200), (40, 1024)]
"""Rows that fill the pieces evenly and not, and rows in which a block of 64 weights goes on from the last."""


@pytest.fixture(params=[128, 2048, 5000], ids=lambda size: f"pieces of {size}")
def small_pieces(request, monkeypatch):
    monkeypatch.setattr(_blocks, "WEIGHTS_AT_ONCE", request.param)


def weight_of(shape, dtype=torch.bfloat16):
    torch.manual_seed(0)
    weight = torch.randn(shape) * 0.02
    weight[0] = 0
    weight[-1, ::5] *= 100
    return weight.to(dtype)


def built(backend, weight, dtype=torch.bfloat16, **options):
    made = get_backend(backend).create(options, "cpu", str(dtype).removeprefix("torch."))
    return made.linear(Layer("q", Shape(*weight.shape), {"weight": weight}, None, dtype, CPU))


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("backend", ["bnb-nf4", "bnb-nf4-dq"])
def test_nf4_is_what_moving_a_weight_to_its_device_makes_of_it(backend, dtype, shape):
    weight, nested = weight_of(shape), backend == "bnb-nf4-dq"
    theirs = bnb.nn.Params4bit(
        weight.to(dtype), requires_grad=False, compress_statistics=nested, quant_type="nf4"
    ).to(CPU)
    layer = built(backend, weight, dtype)
    ours = layer.weight
    assert layer.quant_state is ours.quant_state
    assert torch.equal(ours.data, theirs.data)
    mine, wanted = ours.quant_state.as_dict(packed=True), theirs.quant_state.as_dict(packed=True)
    assert mine.keys() == wanted.keys()
    assert all(torch.equal(mine[name], wanted[name]) for name in wanted)
    mine, wanted = (bnb.functional.dequantize_4bit(w.data, w.quant_state) for w in (ours, theirs))
    assert (mine.dtype, mine.shape) == (dtype, weight.shape)
    assert torch.equal(mine, wanted)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_int8_is_what_bitsandbytes_makes_of_the_whole(shape):
    weight = weight_of(shape)
    codes, scales, _ = bnb.functional.int8_vectorwise_quant(weight.to(torch.float16))
    layer = built("bnb-int8", weight)
    assert torch.equal(layer.weight.data, codes)
    assert torch.equal(layer.weight.CB, codes)
    assert torch.equal(layer.weight.SCB, scales)


@pytest.mark.usefixtures("small_pieces")
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_eetq_is_the_same_in_pieces(shape):
    from backends._eetq_kernels import _quantize_rows

    weight = weight_of(shape)
    codes, scales = _quantize_rows(weight)
    layer = built("eetq", weight)
    assert torch.equal(layer.weight, codes)
    assert torch.equal(layer.weight_scale, scales)


@pytest.mark.parametrize("size", [2048, 5000])
@pytest.mark.parametrize("options", [{}, {"bits": 8}, {"bits": 2}, {"group_size": 32}], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_hqq_without_its_solver_is_what_hqq_makes_of_the_whole(monkeypatch, dtype, options, size):
    weight = weight_of((48, 576))
    whole = built("hqq", weight, dtype, optimize=False, **options)
    monkeypatch.setattr(_blocks, "WEIGHTS_AT_ONCE", size)
    pieces = built("hqq", weight, dtype, optimize=False, **options)
    assert torch.equal(pieces.W_q, whole.W_q)
    assert pieces.meta.keys() == whole.meta.keys()
    for name, value in whole.meta.items():
        mine = pieces.meta[name]
        assert torch.equal(mine, value) if isinstance(value, torch.Tensor) else mine == value, name
    assert torch.equal(pieces.dequantize(), whole.dequantize())
    assert {**vars(pieces), "W_q": 0, "meta": 0}.keys() >= {"in_features", "out_features", "ready"}
    assert (pieces.in_features, pieces.out_features, pieces.ready) == (576, 48, True)


def test_hqq_with_its_solver_is_nearly_what_hqq_makes_of_the_whole(monkeypatch):
    """Each piece ends its solver by itself, after an iteration more or less than the whole."""
    torch.manual_seed(0)
    weight = (torch.randn(256, 1024) * 0.02).bfloat16()
    whole = built("hqq", weight)
    monkeypatch.setattr(_blocks, "WEIGHTS_AT_ONCE", 2**16)
    pieces = built("hqq", weight)
    rounded = built("hqq", weight, optimize=False)
    error = [float((m.dequantize().float() - weight).abs().pow(0.7).mean()) for m in (whole, pieces, rounded)]
    assert error[1] == pytest.approx(error[0], rel=0.001)
    assert error[2] > 1.003 * error[0]


@pytest.mark.parametrize(
    ("options", "device", "shape", "said"),
    [
        ({}, "cpu", Shape(29568, 8192), True),
        ({}, "cpu", Shape(4864, 896), False),
        ({"optimize": False}, "cpu", Shape(29568, 8192), False),
        ({"axis": 0}, "cpu", Shape(29568, 8192), False),
        ({}, "cuda", Shape(29568, 8192), False),
    ],
)
def test_hqq_says_where_its_solver_works_in_pieces(options, device, shape, said):
    made = get_backend("hqq").create(options, device, "bfloat16")
    made.fit([shape])
    assert any("in pieces on a CPU" in note for note in made.notes) == said


def test_pieces_cover_every_weight_once_and_none_is_large():
    weight = torch.empty(29568, 8192, device="meta")
    rows = list(_blocks.row_blocks(weight))
    assert [rows[0].start, *(r.stop for r in rows[:-1])] == [r.start for r in rows]
    assert rows[-1].stop >= 29568 > rows[-1].start
    assert all((r.stop - r.start) * 8192 <= _blocks.WEIGHTS_AT_ONCE for r in rows)
    flat = list(_blocks.flat_blocks(weight.numel() + 5, 64))
    assert sum(r.stop - r.start for r in flat) == weight.numel() + 5
    assert all(r.start % 64 == 0 for r in flat)
    assert len(rows) == math.ceil(29568 / 2048)
