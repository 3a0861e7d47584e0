"""GPTQ and AWQ. Whatever imports gptqmodel runs in a process of its own: the library patches others."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from backends import _four_bit, awq
from backends._awq_format import COLUMN_ORDER
from bench.errors import BadValue
from bench.load.contract import Shape
from bench.load.layout import Layout
from bench.load.model import build_model, skeleton
from bench.load.registry import get_backend
from bench.load.weights import CheckpointWeights

ROOT = Path(__file__).resolve().parents[1]
METHODS = ("gptq", "awq")

WORK = """
import json, sys
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AwqConfig, GPTQConfig, Qwen2Config, Qwen2ForCausalLM

from backends import awq
from bench.load.contract import Layer, Shape
from bench.load.layout import Layout
from bench.load.model import DTYPES, build_model, linear_shapes, skeleton
from bench.load.packed import pack_checkpoint
from bench.load.proof import layer_bits
from bench.load.registry import get_backend
from bench.load.weights import CheckpointWeights

CPU = torch.device("cpu")
KERNELS = {"gptq": "gptq_torch_aten", "awq": "torch_awq"}  # names that transformers' configurations take


def work(method, folder):
    found = {}

    # One layer: what it multiplies by, seen through an identity matrix.
    def backend(dtype="float32", **options):
        return get_backend(method).create({"group_size": 64, **options}, "cpu", dtype)

    def layer(tensors, out_features=48, in_features=256, dtype=torch.float32):
        return Layer("q", Shape(out_features, in_features), tensors, None, dtype, CPU)

    torch.manual_seed(0)
    weight = torch.randn(48, 256) * 0.05
    tensors = backend().pack(weight)
    found["tensors"] = tensors
    for dtype in ("float32", "bfloat16"):
        built = backend(dtype).linear(layer(tensors, dtype=DTYPES[dtype])).train()
        x = torch.eye(256, dtype=DTYPES[dtype], requires_grad=True)
        y = built(x)
        found["identity", dtype] = y.detach().t().clone()
        torch.manual_seed(1)
        gradient = torch.randn(256, 48).to(y.dtype)
        y.backward(gradient)
        found["gradient", dtype] = (gradient.clone(), x.grad.clone())
    found["training"] = built.training

    for out_features, in_features, group in ((8, 64, 32), (48, 256, 64), (64, 576, 64), (1024, 128, 128)):
        made = backend(group_size=group)
        shape = Shape(out_features, in_features)
        packed = made.pack(torch.randn(out_features, in_features))
        built = made.linear(layer(packed, out_features, in_features))
        built(torch.ones(1, in_features, requires_grad=True)).sum().backward()
        counted = layer_bits(built, shape, made.codes)
        found["bits", out_features, in_features] = (counted, made.expected_bits(shape))

    if method == "awq":
        # Pieces that do not divide the layer evenly, as those of a large layer do not: 2, 2 and 1 groups.
        awq.WEIGHTS_AT_ONCE = 2 * 64 * 48
        for dtype in ("float32", "bfloat16"):
            made, shape = backend(dtype), Shape(48, 5 * 64)
            drawn = made.draw(shape, 0.02, torch.Generator().manual_seed(3), CPU)
            built = made.linear(layer(drawn, 48, 5 * 64, DTYPES[dtype]))
            whole = type(built).awq_weight_dequantize(built, CPU, DTYPES[dtype])
            found["pieces", dtype] = whole, built.awq_weight_dequantize(CPU, DTYPES[dtype]), made.notes

    if method == "gptq":
        torch.manual_seed(2)
        # A published checkpoint: zero points that are not 8, and groups by activation order.
        zeros = torch.randint(0, 15, (4, 48), dtype=torch.int32)
        words = torch.zeros(4, 6, dtype=torch.int32)
        for place in range(8):
            words |= zeros[:, place::8] << (4 * place)
        published = {**tensors, "qzeros": words, "g_idx": tensors["g_idx"][torch.randperm(256)]}
        for layout in ("gptq", "gptq_v2"):
            made = backend()
            made.adopt({"bits": 4, "group_size": 64, "checkpoint_format": layout})
            built = made.linear(layer(published)).train()
            found["published", layout] = built(torch.eye(256)).detach().t().clone()
        found["zeros"], found["g_idx"] = zeros, published["g_idx"]

    # A whole model: packed by us, then loaded by us and by transformers.
    torch.manual_seed(0)
    config = Qwen2Config(hidden_size=128, intermediate_size=256, num_hidden_layers=1, num_attention_heads=4,
                         num_key_value_heads=2, vocab_size=128, max_position_embeddings=64,
                         tie_word_embeddings=True, initializer_range=0.1)
    model = Qwen2ForCausalLM(config).bfloat16()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder / "dense")
    architecture = json.loads((folder / "dense" / "config.json").read_text())
    bare = skeleton(architecture, "sdpa")
    made = backend("bfloat16")
    made.fit(list(linear_shapes(bare).values()))
    pack_checkpoint(bare, CheckpointWeights(folder / "dense"), made, architecture, folder / "packed",
                    folder / "dense", lambda done, total: None)
    saved = json.loads((folder / "packed" / "config.json").read_text())["quantization_config"]
    ids = torch.arange(24).reshape(2, 12)

    def ours(dtype, **options):
        made = backend(dtype, **options)
        made.adopt(saved)
        weights = CheckpointWeights(folder / "packed")
        return build_model(skeleton(architecture, "sdpa"), weights, made, Layout.on(CPU)).model

    for dtype in ("float32", "bfloat16"):
        kind = {"gptq": GPTQConfig, "awq": AwqConfig}[method]
        settings = kind(bits=4, group_size=64, backend=KERNELS[method])
        theirs = AutoModelForCausalLM.from_pretrained(
            folder / "packed", quantization_config=settings, dtype=DTYPES[dtype], device_map="cpu").train()
        same = ours(dtype, kernel=KERNELS[method])
        with torch.no_grad():
            found["theirs", dtype] = theirs(input_ids=ids).logits
            found["same kernel", dtype] = same(input_ids=ids).logits
            found["own kernel", dtype] = ours(dtype)(input_ids=ids).logits
        names = [type(m.model.layers[0].mlp.up_proj).__name__ for m in (theirs, same)]
        found["kernels", dtype] = names
    torch.save(found, folder / "found.pt")


for name in sys.argv[2:]:
    work(name, Path(sys.argv[1]) / name)
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where the work above has left what it found, in a folder for each method."""
    folder = tmp_path_factory.mktemp("packed")
    # Without its own choice of workers gptqmodel refuses to load anything on one or two cores.
    environment = {**os.environ, "GPTQMODEL_CPU_WORKERS": "2", "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", WORK, str(folder), *METHODS]
    ended = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert ended.returncode == 0, ended.stderr[-3000:]
    return folder


@pytest.fixture(params=METHODS)
def done(request, folder):
    """A method, what was found about it, and its packed checkpoint."""
    found = torch.load(folder / request.param / "found.pt", weights_only=False)
    return request.param, found, folder / request.param / "packed"


def rows(words):
    """Codes of words that hold 8 rows each (GPTQ's qweight)."""
    return torch.stack([(words >> (4 * (i % 8)))[i // 8] & 15 for i in range(words.shape[0] * 8)])


def columns(words, order=range(8)):
    """Codes of words that hold 8 columns each; ``order[j]`` is the place of column j in its word."""
    return torch.stack(
        [(words >> (4 * order[j % 8]))[:, j // 8] & 15 for j in range(words.shape[1] * 8)], dim=1
    )


AUTOAWQ_REVERSE_ORDER = (0, 4, 1, 5, 2, 6, 3, 7)


def dense(method, tensors, group=64):
    """The weight (out x in) that packed tensors stand for, in float32. gptqmodel rounds it to float16."""
    scales = tensors["scales"].float()
    if method == "gptq":
        codes, zeros = rows(tensors["qweight"]), columns(tensors["qzeros"]) + 1
    else:
        codes, zeros = (columns(tensors[name], AUTOAWQ_REVERSE_ORDER) for name in ("qweight", "qzeros"))
    index = torch.arange(codes.shape[0]) // group
    return (scales[index] * (codes - zeros[index])).t()


def packed(method, weight, group=64):
    return get_backend(method).create({"group_size": group}, "cpu", "bfloat16").pack(weight)


def worst_error_in_steps(method, weight, group=64):
    tensors = packed(method, weight, group)
    steps = tensors["scales"].float().t().repeat_interleave(group, dim=1)
    return float(((dense(method, tensors, group) - weight).abs() / steps).max())


@given(st.integers(0, 2**31))
def test_packed_rows_unpack_again(seed):
    codes = torch.randint(0, 16, (16, 5), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    assert torch.equal(rows(_four_bit.pack_rows(codes)), codes)


@given(st.integers(0, 2**31))
def test_packed_columns_unpack_again(seed):
    codes = torch.randint(0, 16, (5, 16), generator=torch.Generator().manual_seed(seed), dtype=torch.int32)
    assert torch.equal(columns(_four_bit.pack_columns(codes, range(8))), codes)
    assert torch.equal(columns(_four_bit.pack_columns(codes, COLUMN_ORDER), AUTOAWQ_REVERSE_ORDER), codes)


@pytest.mark.parametrize(("method", "limit"), [("gptq", 0.51), ("awq", 1.01)])
@pytest.mark.parametrize("scale", [0.02, 1.0, 30.0])
def test_rounding_is_to_the_nearest_step(method, limit, scale):
    torch.manual_seed(0)
    assert worst_error_in_steps(method, torch.randn(16, 128) * scale) <= limit


@pytest.mark.parametrize("method", METHODS)
def test_rounding_is_to_the_nearest_step_in_groups_of_small_weights_too(method):
    torch.manual_seed(0)
    assert worst_error_in_steps(method, torch.randn(16, 128) * 1e-4) <= 1.01


@pytest.mark.parametrize("method", METHODS)
def test_a_weight_of_zeros_stays_zero(method):
    assert not bool(dense(method, packed(method, torch.zeros(16, 128))).any())


@pytest.mark.parametrize("method", METHODS)
def test_a_zero_in_a_group_stays_exactly_zero(method):
    torch.manual_seed(0)
    weight = torch.randn(16, 128) + 0.5
    weight[:, ::3] = 0
    assert not bool(dense(method, packed(method, weight))[:, ::3].any())


@pytest.mark.parametrize("method", METHODS)
def test_groups_of_one_sign_lose_no_more_than_others(method):
    torch.manual_seed(0)
    assert worst_error_in_steps(method, torch.rand(16, 128) + 1) <= 1.01
    assert worst_error_in_steps(method, -torch.rand(16, 128) - 1) <= 1.01


@pytest.mark.parametrize("method", METHODS)
def test_packed_tensors_have_the_layout_of_the_checkpoint(method):
    shapes = {name: (tuple(t.shape), t.dtype) for name, t in packed(method, torch.ones(48, 256)).items()}
    wanted = {"qzeros": ((4, 6), torch.int32), "scales": ((4, 48), torch.float16)}
    if method == "gptq":
        wanted |= {"qweight": ((32, 48), torch.int32), "g_idx": ((256,), torch.int32)}
    else:
        wanted |= {"qweight": ((256, 6), torch.int32)}
    assert shapes == wanted
    assert set(shapes) == set(get_backend(method).backend.packed_names)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gptqmodels_layer_multiplies_by_the_weight_that_was_packed(done, dtype):
    method, found, _ = done
    wanted = dense(method, found["tensors"]).half().to(getattr(torch, dtype))
    torch.testing.assert_close(found["identity", dtype], wanted, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_backward_multiplies_by_the_same_weight(done, dtype):
    method, found, _ = done
    gradient, arrived = found["gradient", dtype]
    wanted = gradient.float() @ dense(method, found["tensors"]).half().float()
    rough = float((arrived.float() - wanted).norm() / wanted.norm())
    assert rough < (1e-6 if dtype == "float32" else 0.01)


def test_a_layer_holds_the_bits_that_the_arithmetic_says_also_after_a_step(done):
    _, found, _ = done
    counted = {key: value for key, value in found.items() if key[0] == "bits"}
    assert len(counted) == 4
    for bits, expected in counted.values():
        assert bits == pytest.approx(expected, rel=1e-6)


@pytest.mark.parametrize("done", ["gptq"], indirect=True)
@pytest.mark.parametrize("layout", ["gptq", "gptq_v2"])
def test_published_zero_points_and_activation_order_are_kept(done, layout):
    _, found, _ = done
    zeros = found["zeros"] + (1 if layout == "gptq" else 0)
    index = found["g_idx"].long()
    scales = found["tensors"]["scales"].float()
    wanted = (scales[index] * (rows(found["tensors"]["qweight"]) - zeros[index])).t()
    torch.testing.assert_close(found["published", layout], wanted.half().float(), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_packed_model_computes_to_the_bit_what_transformers_computes(done, dtype):
    _, found, _ = done
    theirs, ours = found["kernels", dtype]
    assert theirs == ours
    assert torch.equal(found["same kernel", dtype], found["theirs", dtype])
    assert float(found["theirs", dtype].float().std()) > 0.1


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 0.005), ("bfloat16", 0.03)])
def test_the_kernel_that_is_chosen_on_a_cpu_is_near_the_one_that_transformers_takes(done, dtype, limit):
    """AwqConfig cannot name awq_torch_aten; torch_awq, which it can, rounds all it multiplies to float16."""
    method, found, _ = done
    ours, theirs = found["own kernel", dtype].float(), found["theirs", dtype].float()
    if method == "gptq":
        assert torch.equal(ours, theirs)
    assert float((ours - theirs).norm() / theirs.norm()) < limit


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_weight_in_pieces_is_to_the_bit_what_gptqmodel_makes_of_the_whole(folder, dtype):
    found = torch.load(folder / "awq" / "found.pt", weights_only=False)
    whole, pieces, notes = found["pieces", dtype]
    assert torch.equal(pieces, whole)
    assert float(whole.float().std()) > 0.01
    assert notes == [awq.IN_PIECES]


class Unpacked:
    """The tensors of a packed checkpoint, its layers as the dense weights that they stand for."""

    def __init__(self, method, folder):
        self._method, self._weights = method, CheckpointWeights(folder)

    def __contains__(self, name):
        return name in self._weights or f"{name.removesuffix('.weight')}.qweight" in self._weights

    def tensor(self, name, device=None):
        owner = name.removesuffix(".weight")
        if f"{owner}.qweight" not in self._weights:
            return self._weights.tensor(name)
        names = get_backend(self._method).backend.packed_names
        return dense(self._method, {n: self._weights.tensor(f"{owner}.{n}") for n in names}).half()


@pytest.mark.parametrize(("dtype", "limit"), [("float32", 1e-5), ("bfloat16", 0.02)])
def test_a_packed_model_computes_what_a_dense_one_of_its_unpacked_weights_computes(done, dtype, limit):
    method, found, folder = done
    architecture = json.loads((folder / "config.json").read_text())
    made = get_backend("bf16").create({}, "cpu", dtype)
    built = build_model(
        skeleton(architecture, "sdpa"), Unpacked(method, folder), made, Layout.on(torch.device("cpu"))
    )
    with torch.no_grad():
        wanted = built.model(input_ids=torch.arange(24).reshape(2, 12)).logits.float()
    assert float((found["own kernel", dtype].float() - wanted).norm() / wanted.norm()) < limit


def backend(method, device="cpu", dtype="bfloat16", **options):
    return get_backend(method).create(options, device, dtype)


@pytest.mark.parametrize("method", METHODS)
def test_a_group_that_does_not_divide_is_replaced_with_a_note(method):
    made = backend(method)
    made.fit([Shape(576, 576), Shape(1536, 576)])
    assert made.options.group_size == 64
    (note,) = made.notes
    assert note.startswith("group size 64 instead of 128")


@pytest.mark.parametrize("method", METHODS)
def test_a_group_that_divides_is_kept_without_a_note(method):
    made = backend(method)
    made.fit([Shape(128, 896), Shape(896, 4864)])
    assert (made.options.group_size, made.notes) == (128, [])


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("shape", [Shape(12, 128), Shape(16, 100)])
def test_a_shape_that_cannot_be_packed_is_refused(method, shape):
    with pytest.raises(ValueError, match="divide"):
        backend(method).fit([shape])


@pytest.mark.parametrize("method", METHODS)
def test_what_a_checkpoint_of_ours_says_of_itself_is_adopted_again(method):
    made, other = backend(method, group_size=32), backend(method)
    other.adopt(made.config())
    assert other.options.group_size == 32


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("changes", [{"bits": 8}, {"group_size": -1}, {"group_size": 1024}])
def test_a_checkpoint_that_cannot_be_trained_is_refused(method, changes):
    with pytest.raises(ValueError, match="the checkpoint"):
        backend(method).adopt(backend(method).config() | changes)


@pytest.mark.parametrize(
    ("method", "changes"), [("gptq", {"checkpoint_format": "marlin"}), ("awq", {"version": "gemv"})]
)
def test_a_layout_that_cannot_be_trained_is_refused(method, changes):
    with pytest.raises(ValueError, match="the checkpoint's"):
        backend(method).adopt(backend(method).config() | changes)


@pytest.mark.parametrize("method", METHODS)
def test_the_checkpoint_of_another_method_is_refused(method):
    other = "awq" if method == "gptq" else "gptq"
    with pytest.raises(ValueError, match=other):
        backend(method).adopt(backend(other).config())


def test_awq_computes_in_float16_on_cuda_and_says_so():
    made = backend("awq", "cuda")
    assert made.dtype == "float16"
    assert "float16 instead of bfloat16" in made.notes[0]


@pytest.mark.parametrize(("method", "device"), [("awq", "cpu"), ("gptq", "cpu"), ("gptq", "cuda")])
def test_elsewhere_the_asked_dtype_is_kept(method, device):
    made = backend(method, device)
    assert (made.dtype, made.notes) == ("bfloat16", [])


def test_an_option_that_does_not_exist_is_refused():
    with pytest.raises(BadValue, match="did you mean 'group_size'"):
        backend("gptq", groupsize=64)
