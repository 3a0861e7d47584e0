"""The traps of the libraries, each with the test that keeps us out of it."""

from __future__ import annotations

import weakref
from pathlib import Path

import pytest
import torch

from bench.ask.preset import load_preset
from bench.load.contract import Layer, Shape
from bench.load.layout import Layout
from bench.load.model import build_model, skeleton
from bench.load.registry import find_backends, foreign_libraries
from bench.load.weights import CPU, SyntheticWeights

ARCHITECTURE = load_preset("tiny").architecture or {}


@pytest.mark.parametrize("backend", ["bnb-nf4", "bnb-nf4-dq", "bnb-int8", "hqq", "eetq"])
def test_no_more_than_one_dense_layer_is_held_while_loading(backend: str) -> None:
    """The full 16-bit model and the quantized one are never both in memory."""
    alive: list[weakref.ref[torch.Tensor]] = []
    most = 0

    class Watched(SyntheticWeights):
        def tensor(self, name: str, device: torch.device = CPU) -> torch.Tensor:
            nonlocal most
            most = max(most, sum(reference() is not None for reference in alive))
            drawn = super().tensor(name, device)
            if name.endswith("proj.weight"):
                alive.append(weakref.ref(drawn))
            return drawn

    model = skeleton(ARCHITECTURE, "sdpa")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    made = find_backends()[backend].create({}, "cpu", "bfloat16")
    # A library's first use may log a failed optional import, and the log keeps that moment's frames alive.
    first = next(name for name in shapes if name.endswith("proj.weight"))
    dense = SyntheticWeights(shapes, 0.02).tensor(first)
    made.linear(
        Layer("first", Shape(*dense.shape), {"weight": dense}, None, torch.bfloat16, torch.device("cpu"))
    )
    build_model(model, Watched(shapes, 0.02), made, Layout.on(torch.device("cpu")))
    assert len(alive) == 14
    assert most <= 1


def test_awq_says_that_it_computes_in_float16_on_cuda() -> None:
    awq = find_backends()["awq"]
    on_cuda = awq.backend(awq.defaults, "cuda", "bfloat16")
    assert on_cuda.dtype == "float16"
    assert "float16 instead of bfloat16" in on_cuda.notes[0]
    on_cpu = awq.backend(awq.defaults, "cpu", "bfloat16")
    assert (on_cpu.dtype, on_cpu.notes) == ("bfloat16", [])


def test_eetq_refuses_its_native_kernel_where_it_cannot_run() -> None:
    eetq = find_backends()["eetq"]
    with pytest.raises(ValueError, match="CUDA device and the eetq package"):
        eetq.backend(eetq.options({"kernel": "native"}), "cpu", "bfloat16")


@pytest.mark.parametrize("backend", ["gptq", "awq"])
def test_the_default_kernel_is_named_for_every_device(backend: str) -> None:
    """gptqmodel's own choice on a CPU compiles for a minute and cannot train."""
    import importlib

    kernels = importlib.import_module(f"backends.{backend}").AUTOMATIC_KERNELS
    assert set(kernels) == {"cpu", "cuda"}
    assert "auto" not in "".join(kernels.values())


@pytest.mark.parametrize(("backend", "group"), [("gptq", 64), ("awq", 64), ("hqq", 64)])
def test_a_group_size_that_does_not_divide_is_replaced_and_told(backend: str, group: int) -> None:
    """SmolLM2's hidden size 576 is 9 x 64."""
    made = find_backends()[backend].create({"group_size": 128}, "cpu", "bfloat16")
    made.fit([Shape(576, 576), Shape(576, 1536)])
    assert made.options.group_size == group  # type: ignore[attr-defined]
    assert any("instead of 128" in note for note in made.notes)


def test_a_run_hides_every_library_but_its_own() -> None:
    """PEFT imports gptqmodel in every run where it is installed, and gptqmodel rewrites the allocator."""
    entries = find_backends()
    assert "gptqmodel" in foreign_libraries(entries["bnb-nf4"].backend)
    assert "bitsandbytes" in foreign_libraries(entries["gptq"].backend)
    assert "gptqmodel" not in foreign_libraries(entries["gptq"].backend)
    assert {"bitsandbytes", "hqq", "gptqmodel", "optimum", "torchao"} <= foreign_libraries(
        entries["bf16"].backend
    )


def test_embeddings_norms_and_head_keep_the_compute_dtype_under_every_backend(tmp_path: Path) -> None:
    """peft.prepare_model_for_kbit_training would make them float32 for some backends and not for others."""
    for backend in ("bf16", "bnb-nf4", "hqq", "eetq"):
        model = skeleton(ARCHITECTURE, "sdpa")
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        built = build_model(model, SyntheticWeights(shapes, 0.02), find_backends()[backend].create({}, "cpu", "bfloat16"),
                            Layout.on(torch.device("cpu")))  # fmt: skip
        dtypes = {p.dtype for n, p in built.model.named_parameters() if "proj" not in n}
        assert dtypes == {torch.bfloat16}
        assert built.model.get_output_embeddings().weight is built.model.get_input_embeddings().weight  # type: ignore[operator]
