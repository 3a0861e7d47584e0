"""Does a backend keep the contract? The checks of ``qlora-bench check NAME``, which our tests run too.

The backend and the reference each train a toy model for a few steps through the real worker; the findings
compare the two records.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

from bench.load.registry import PROBED_BY_PEFT, find_backends
from bench.record.schema import Record
from bench.run.asked import Asked

REFERENCE = "bf16"
PRESET = "tiny"
LOSS_TOLERANCE = 0.02
"""Relative difference of the first loss to the reference's. Measured on the toy: at most 0.4 % for every
backend of ours (GPTQ's rounding), so 2 % leaves room for coarser formats."""


@dataclass(frozen=True)
class Finding:
    """One check and how it went."""

    name: str
    passed: bool
    detail: str


def findings(record: Record, reference: Record) -> list[Finding]:
    """Every check of one backend's record against the reference's, on the same work."""
    if record.status != "completed":
        return [Finding("trains", False, f"{record.status} in stage {record.stage}: {record.message}")]
    assert record.quantization and record.load and record.lora and record.workload and record.environment
    assert reference.load and reference.lora and reference.workload
    quantization, proof = record.quantization, record.proof
    loss, wanted = record.steps[0].losses[0], reference.steps[0].losses[0]
    required = find_backends()[record.request.backend].backend.requires
    strangers = [
        name
        for name in record.environment.quantization_libraries_imported
        if name not in required and name in PROBED_BY_PEFT
    ]
    return [
        Finding("trains", True, f"{len(record.steps)} steps with {quantization.kernel}"),
        Finding(
            "is quantized as it says",
            proof.quantized is True,
            f"{quantization.storage_bits_per_weight:.4f} bits per weight counted, "
            f"{quantization.expected_bits_per_weight:.4f} by arithmetic",
        ),
        Finding("keeps the base frozen", proof.base_frozen is True, "only adapter tensors train"),
        Finding(
            "lets gradients through",
            proof.gradients_reach_adapters is True,
            "every adapter has a gradient after the first backward",
        ),
        Finding(
            "stays finite",
            all(math.isfinite(step.gradient_norm) for step in record.steps),
            f"gradient norms {', '.join(f'{step.gradient_norm:.3g}' for step in record.steps)}",
        ),
        Finding(
            "computes the same function",
            abs(loss - wanted) <= LOSS_TOLERANCE * wanted,
            f"first loss {loss:.4f}, reference {wanted:.4f}",
        ),
        _equal("same data", record.workload.digest, reference.workload.digest),
        _equal("same initial adapters", record.lora.initial_digest, reference.lora.initial_digest),
        _equal("same unquantized weights", record.load.weights_digest, reference.load.weights_digest),
        Finding("imports no stranger's library", not strangers, ", ".join(strangers) or "none imported"),
    ]


def _equal(name: str, digest: str | None, reference: str | None) -> Finding:
    same = digest is not None and digest == reference
    return Finding(
        name, same, f"digest {str(digest)[:12]}" + ("" if same else f", reference {str(reference)[:12]}")
    )


def asked_for(backend: str, out: Path) -> Asked:
    """The sweep under which a backend is checked: the reference and it, on the toy."""
    return Asked(
        preset=PRESET,
        backends=tuple(dict.fromkeys((REFERENCE, backend))),
        weights="synthetic",
        calibration="rtn",
        timeout_seconds=300.0,
        out=out,
        force=True,
    )
