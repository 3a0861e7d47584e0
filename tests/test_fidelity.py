"""Fidelity: the reference against itself, the quantized formats against it, and their weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open

from bench.load.model import DTYPES
from bench.record.stability import Fidelity, WeightError
from bench.run.fidelity import (
    LARGEST_B,
    batch_digest,
    compare_gradients,
    fixed_values,
    gradients_on,
    make_reference,
    weight_errors,
)
from bench.run.training import Trainer, make_trainer
from bench.run.workload import Batch
from tests.rig import CPU, Rig, ask, quiet, settled

__all__ = ["settled"]  # a fixture for this whole module

pytestmark = quiet

PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def ready(backend: str, dtype: str = "float32", **changes: Any) -> tuple[Rig, Trainer, Batch]:
    """A model, its trainer, and the first batch of the work."""
    rig = Rig(ask(backend, dtype=dtype, **changes))
    rig.adapters.model._forward_pre_hooks.clear()  # the rig's own, which wants to know the batch
    source = rig.builder.reader()
    return rig, make_trainer(rig.adapters, rig.request, source, [CPU], rig.backend.dtype), source.next_batch()


@pytest.fixture(scope="module")
def reference(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The unquantized gradients in float32."""
    file = tmp_path_factory.mktemp("references") / "of" / "the-toy.safetensors"
    _, trainer, batch = ready("bf16")
    make_reference(trainer, batch, file)
    return file


def compared(backend: str, dtype: str, file: Path, **changes: Any) -> Fidelity:
    _, trainer, batch = ready(backend, dtype, **changes)
    return compare_gradients(trainer, batch, file)


def test_the_reference_is_equal_to_itself(reference: Path) -> None:
    found = compared("bf16", "float32", reference)
    assert found.note is None
    assert (found.reference_dtype, found.loss) == ("float32", found.reference_loss)
    assert len(found.layers) == 2
    for part in (found.overall, *found.layers):
        assert part is not None
        assert part.cosine == pytest.approx(1, abs=1e-12)
        assert part.norm_ratio == pytest.approx(1, abs=1e-12)
        assert part.relative_error == pytest.approx(0, abs=1e-6)


def test_the_reference_file_is_whole_or_not_there(reference: Path) -> None:
    assert [file.name for file in reference.parent.iterdir()] == [reference.name]
    with safe_open(reference, framework="pt") as opened:
        names = list(opened.keys())
        assert opened.get_tensor(names[0]).dtype == torch.float32
    assert len(names) == 28


@pytest.mark.parametrize(
    ("backend", "dtype", "low", "high"),
    [
        ("bf16", "bfloat16", 0.999, 1.0),
        ("bf16", "float16", 0.9999, 1.0),
        ("bnb-int8", "float32", 0.998, 0.99999),
        ("eetq", "float32", 0.998, 0.99999),
        ("bnb-nf4", "float32", 0.97, 0.99),
        ("bnb-nf4", "bfloat16", 0.97, 0.99),
        ("bnb-nf4-dq", "float32", 0.97, 0.99),
        ("hqq", "float32", 0.97, 0.992),
        ("gptq", "float32", 0.95, 0.99),
        ("awq", "float32", 0.96, 0.99),
    ],
)
def test_each_format_is_as_near_as_its_bits(
    reference: Path, backend: str, dtype: str, low: float, high: float
) -> None:
    found = compared(backend, dtype, reference)
    assert found.overall is not None
    cosine, ratio, error = found.overall.cosine, found.overall.norm_ratio, found.overall.relative_error
    assert cosine is not None
    assert ratio is not None
    assert error is not None
    assert low < cosine < high
    assert 0.9 < ratio < 1.1
    # Of two vectors at this angle and ratio.
    assert error**2 == pytest.approx(1 + ratio**2 - 2 * ratio * cosine, abs=1e-6)
    assert all(layer.cosine is not None and layer.cosine > low - 0.03 for layer in found.layers)


def test_the_dial_leaves_the_fidelity_as_it_is(reference: Path) -> None:
    plain = compared("bnb-nf4", "float32", reference)
    dialled = compared("bnb-nf4", "float32", reference, stress={"model.layers.1.mlp.up_proj": 2.0**14})
    assert dialled == plain


def test_the_comparison_has_no_update_and_leaves_no_gradient() -> None:
    rig, trainer, batch = ready("bnb-nf4")
    first = gradients_on(trainer, batch)
    assert all(tensor.grad is None for tensor in trainer.parameters)
    second = gradients_on(trainer, batch)
    assert first[0] == second[0]
    assert all(torch.equal(first[1][name], second[1][name]) for name in first[1])
    assert set(first[1]) == set(rig.adapters.tensors)
    # A's gradients too, for no B is zero.
    assert all(bool(gradient.any()) for gradient in first[1].values())


def test_the_fixed_adapters_are_the_same_everywhere_and_no_b_is_zero() -> None:
    name = "model.layers.0.mlp.up_proj.lora_B"
    b = fixed_values(name, torch.Size([64, 8]))
    assert torch.equal(b, fixed_values(name, torch.Size([64, 8])))
    assert not torch.equal(b, fixed_values(name.replace("up", "gate"), torch.Size([64, 8])))
    assert 0.9 * LARGEST_B < float(b.abs().max()) <= LARGEST_B
    a = fixed_values(name.replace("_B", "_A"), torch.Size([8, 64]))
    assert float(a.abs().max()) <= 1 / 8


def test_another_batch_is_not_compared(reference: Path) -> None:
    _, trainer, batch = ready("bf16")
    other = replace(batch, input_ids=batch.input_ids.roll(1))
    found = compare_gradients(trainer, other, reference)
    assert found.note == "the reference was made on another batch"
    assert found.overall is None
    assert found.batch_digest == batch_digest(other) != batch_digest(batch)


@pytest.mark.parametrize("lora", [{"rank": 4}, {"target_modules": ("q_proj", "v_proj")}])
def test_other_adapters_are_not_compared(reference: Path, lora: Mapping[str, Any]) -> None:
    found = compared("bf16", "float32", reference, lora=lora)
    assert found.note == "the adapters have other shapes than the reference's"
    assert found.overall is None


def test_a_gradient_of_zero_has_no_angle(reference: Path) -> None:
    _, trainer, batch = ready("bf16")
    with torch.no_grad():
        for tensor in trainer.adapters.model.get_input_embeddings().parameters():
            tensor.zero_()
    found = compare_gradients(trainer, batch, reference)
    assert found.overall is not None
    assert (found.overall.cosine, found.overall.norm_ratio, found.overall.relative_error) == (None, 0.0, 1.0)


# ---- weights


def errors_of(backend: str, dtype: str = "float32", **changes: Any) -> dict[str, WeightError]:
    rig, _, _ = ready(backend, dtype, **changes)
    _, _, dense = rig.builder.open(rig.request, None)
    found = weight_errors(rig.built, rig.shapes, dense, DTYPES[dtype])
    assert tuple(error.projection for error in found) == PROJECTIONS
    return {error.projection: error for error in found}


@pytest.mark.parametrize(
    ("backend", "dtype", "low", "high"),
    [
        ("bf16", "float32", 0.0, 1e-12),  # the toy's weights are bfloat16
        ("bf16", "bfloat16", 0.0, 1e-12),
        ("bnb-nf4", "float32", 0.09, 0.095),
        ("bnb-nf4", "bfloat16", 0.09, 0.096),
        ("bnb-nf4-dq", "float32", 0.09, 0.095),
        ("hqq", "float32", 0.08, 0.1),
        ("gptq", "float32", 0.09, 0.13),
        ("awq", "float32", 0.08, 0.11),
        ("bnb-int8", "float32", 0.004, 0.01),
        ("eetq", "float32", 0.004, 0.01),
    ],
)
def test_weights_of_a_normal_distribution_lose_what_the_format_costs(
    backend: str, dtype: str, low: float, high: float
) -> None:
    for error in errors_of(backend, dtype).values():
        assert low <= error.relative_error <= high
        assert error.worst_relative_error >= error.relative_error
        assert error.worst_module.endswith(error.projection)


def test_the_worst_layer_is_named() -> None:
    rig, _, _ = ready("bf16")
    with torch.no_grad():
        rig.module("model.layers.1.mlp.up_proj").base_layer.weight.mul_(1.5)
    _, _, dense = rig.builder.open(rig.request, None)
    found = {e.projection: e for e in weight_errors(rig.built, rig.shapes, dense, torch.float32)}
    up = found["up_proj"]
    assert up.worst_module == "model.layers.1.mlp.up_proj"
    assert up.worst_relative_error == pytest.approx(0.5, rel=1e-5)
    assert up.relative_error == pytest.approx(0.5 / 2**0.5, rel=0.02)  # of two layers one is right
    assert found["q_proj"].relative_error == pytest.approx(0, abs=1e-6)


def test_biases_are_no_error() -> None:
    """q, k and v of the toy have biases, which the identity's rows pick up."""
    assert errors_of("bf16")["q_proj"].relative_error < 1e-6
