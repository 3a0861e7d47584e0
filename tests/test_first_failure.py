"""The incident through the front door: the real command, a real worker, a real backend, on a small checkpoint.

The same on SmolLM2's real weights is in ``test_smollm2.py``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

from bench.judge.stability import judge_stability
from bench.record.schema import Record
from tests.checkpoint import make_checkpoint
from tests.command import Command

UP = "model.layers.1.mlp.up_proj"
FACTOR = 2**18


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_checkpoint(tmp_path_factory.mktemp("model") / "small")


def run(command: Command, checkpoint: Path, out: Path, *arguments: str) -> Record:
    (body,) = command.json(
        "run", "--preset", "tiny", "--model", checkpoint, "--out", out, "--set", "fidelity=off", *arguments
    )
    return Record.model_validate(body)


@pytest.fixture(scope="module")
def overflow(command: Command, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Record:
    out = tmp_path_factory.mktemp("overflow")
    return run(
        command, checkpoint, out, "--backend", "bnb-nf4", "--dtype", "float16", "--stress", f"{UP}={FACTOR}"
    )


def test_the_first_failure_is_located(overflow: Record) -> None:
    failure = overflow.first_failure
    assert overflow.status == "completed"
    assert judge_stability(overflow).verdict == "non_finite"
    assert failure is not None
    assert (failure.kind, failure.phase, failure.step, failure.micro_batch) == (
        "forward_overflow",
        "forward",
        0,
        0,
    )
    assert (failure.module, failure.tensor, failure.device) == (UP, "output", "cpu")
    assert failure.dtype_max == 65504
    assert UP in judge_stability(overflow).reason


def test_the_dial_is_proven(overflow: Record) -> None:
    (pair,) = overflow.stress
    assert (pair.scaled, pair.compensated, pair.factor) == (UP, UP.replace("up_proj", "down_proj"), FACTOR)
    assert pair.float32_difference == 0.0


def test_the_replay_names_the_operation_and_what_heals(overflow: Record) -> None:
    replay = overflow.replay
    assert replay is not None
    assert replay.reproduced
    assert replay.error is None
    assert replay.module == UP
    assert replay.operation is not None
    heals = {remedy.change: remedy.heals for remedy in replay.remedies}
    assert heals == {"attention": False, "float32_adapters": False, "bfloat16": True}
    bfloat16 = next(remedy for remedy in replay.remedies if remedy.change == "bfloat16")
    assert bfloat16.abs_max_there is not None
    assert bfloat16.abs_max_there > 65504


def test_every_step_has_its_probe(overflow: Record) -> None:
    assert overflow.lora is not None
    assert len(overflow.lora.names) == overflow.lora.tensors == 28
    for step in overflow.steps:
        assert step.probe is not None
        assert len(step.probe.activation_abs_max) == len(step.probe.gradient_abs_max) == 2
        assert len(step.probe.tensor_norms) == 28
        # The layer before the fault is finite in forward, and the fault is not averaged away.
        before, at = step.probe.activation_abs_max
        assert before is not None
        assert math.isfinite(before)
        assert at is not None
        assert not math.isfinite(at)


@pytest.mark.soak
def test_in_bfloat16_the_dial_changes_nothing(command: Command, checkpoint: Path, out: Path) -> None:
    """The healthy control: with a power of two, losses and norms are those of the model without the dial."""
    arguments = ["--backend", "bnb-nf4", "--steps", "3"]
    plain = run(command, checkpoint, out, *arguments)
    dialled = run(command, checkpoint, out, *arguments, "--stress", f"{UP}={FACTOR}")
    assert judge_stability(dialled).verdict == "healthy"
    assert dialled.first_failure is None
    assert dialled.replay is None
    assert [step.losses for step in dialled.steps] == [step.losses for step in plain.steps]
    assert [step.gradient_norm for step in dialled.steps] == [step.gradient_norm for step in plain.steps]
    assert dialled.lora == plain.lora


def test_trace_sees_inside_the_adapters(command: Command, checkpoint: Path, out: Path) -> None:
    record = run(command, checkpoint, out, "--backend", "bf16", "--dtype", "float16", "--trace", "--steps", "2",
                 "--stress", f"model.layers.0.self_attn.v_proj={FACTOR}")  # fmt: skip
    failure = record.first_failure
    assert record.request.trace
    assert "--trace" in record.command
    assert failure is not None
    assert (failure.module, failure.phase) == ("model.layers.0.self_attn.v_proj", "forward")


def test_a_batch_without_targets_is_named(
    command: Command, checkpoint: Path, out: Path, tmp_path: Path
) -> None:
    data = tmp_path / "long.jsonl"
    lines = [{"prompt": "word " * 400, "response": "yes"}]
    data.write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    record = run(command, checkpoint, out, "--backend", "bf16", "--data", str(data), "--steps", "2",
                 "--set", "workload.padding=right", "--set", "workload.without_targets=train")  # fmt: skip
    failure = record.first_failure
    assert failure is not None
    assert (failure.kind, failure.tensor, failure.step) == ("bad_batch", "labels", 0)
    assert "no answer token" in failure.evidence
    assert record.replay is None
    assert judge_stability(record).verdict in ("non_finite", "poisoned")


def test_float16_adapters_fail_as_they_do_elsewhere(command: Command, checkpoint: Path, out: Path) -> None:
    record = run(command, checkpoint, out, "--backend", "bf16", "--dtype", "float16", "--steps", "2",
                 "--set", "lora.precision=compute")  # fmt: skip
    assert record.status == "error"
    assert record.message is not None
    assert "unscale FP16 gradients" in record.message


@pytest.mark.parametrize(
    "settings",
    [
        ["attention=sdpa_math", "workload.padding=left", "checkpointing=none"],
        pytest.param(
            ["attention=eager", "lora.precision=float32", "checkpointing=reentrant"], marks=pytest.mark.soak
        ),
    ],
    ids=" ".join,
)
def test_what_triage_changes_can_be_asked_for(
    command: Command, checkpoint: Path, out: Path, settings: list[str]
) -> None:
    asked = [part for setting in settings for part in ("--set", setting)]
    record = run(command, checkpoint, out, "--backend", "bf16", "--steps", "3", *asked)
    assert record.status == "completed", record.message
    assert judge_stability(record).verdict == "healthy", judge_stability(record).reason
    assert all(step.probe and None not in step.probe.gradient_abs_max for step in record.steps)


def test_fidelity_to_the_unquantized_model(checkpoint: Path, out: Path, tmp_path: Path) -> None:
    """On by itself for real weights; one reference serves both backends."""
    command = Command(tmp_path / "cache")
    bodies: Any = command.json("run", "--preset", "tiny", "--model", checkpoint, "--out", out, "--steps", "2",
                               "--backend", "bf16", "--backend", "bnb-nf4")  # fmt: skip
    reference, quantized = (Record.model_validate(body).fidelity for body in bodies)
    assert reference is not None
    assert quantized is not None
    assert reference.reference_dtype == quantized.reference_dtype == "float32"
    assert reference.batch_digest == quantized.batch_digest
    assert reference.overall is not None
    assert quantized.overall is not None
    assert reference.overall.cosine is not None
    assert quantized.overall.cosine is not None
    assert reference.overall.cosine > 0.999 > quantized.overall.cosine > 0.9
    assert len(quantized.layers) == 2
    assert [error.projection for error in quantized.weight_errors] == [
        "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]  # fmt: skip
    assert all(0.08 < error.relative_error < 0.1 for error in quantized.weight_errors)
    assert all(error.relative_error == 0 for error in reference.weight_errors)
    assert len(list((command.cache / "references").glob("*.safetensors"))) == 1


@pytest.mark.parametrize(
    ("stress", "said"),
    [
        ("model.layers.1.mlp.gate_proj=4", "not linear"),
        ("model.layers.9.mlp.up_proj=4", "did you mean 'model.layers.1.mlp.up_proj'?"),
        ("model.layers.1.mlp.up_proj", "is not MODULE=FACTOR"),
        ("model.layers.1.mlp.up_proj=-2", "finite factor above 0"),
        ("model.layers.1.mlp.up_proj=inf", "finite factor above 0"),
        ("model.layers.1.mlp.*_proj=2", "cannot be rescaled"),
        ("model.layers.*=2", "rescales already"),
    ],
)
def test_a_dial_that_fits_nothing_is_refused(command: Command, out: Path, stress: str, said: str) -> None:
    line = command.refused("run", "--preset", "tiny", "--out", out, "--stress", stress)
    assert said in line
    assert not out.exists()


def test_two_dials_on_one_pair_are_refused(command: Command, out: Path) -> None:
    line = command.refused("run", "--preset", "tiny", "--out", out, "--stress", f"{UP}=2", "--stress",
                           f"{UP.replace('up', 'down')}=2")  # fmt: skip
    assert "already" in line
