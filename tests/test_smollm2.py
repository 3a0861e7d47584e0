"""The incident on real weights: SmolLM2-135M-Instruct, through the front door (``make stability``).

Skipped where the model is not in the cache; with QLORA_BENCH_REQUIRE_SMOLLM2 set, that is a failure.
"""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.ask.models import CONFIG_NAME
from bench.judge.stability import judge_stability
from bench.load.smollm2 import folder
from bench.record.schema import Record
from tests.command import Command

UP = "model.layers.10.mlp.up_proj"
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not (folder() / CONFIG_NAME).is_file() and "QLORA_BENCH_REQUIRE_SMOLLM2" not in os.environ,
        reason="SmolLM2 is not in the cache; `make smollm2` brings it",
    ),
]


@pytest.fixture(scope="module")
def command() -> Command:
    """The person's own cache, where the model is."""
    return Command(folder().parents[1])


def run(command: Command, out: Path, *arguments: str) -> Record:
    (body,) = command.json(
        "run", "--preset", "smollm2-135m", "--backend", "bnb-nf4", "--out", out, "--steps", "3", *arguments
    )
    record = Record.model_validate(body)
    assert record.status == "completed", record.message
    assert record.request.model.weights == "real"
    return record


def test_float16_fails_where_the_dial_was_turned(command: Command, out: Path) -> None:
    record = run(command, out, "--dtype", "float16", "--stress", f"{UP}=16384")
    failure = record.first_failure
    assert failure is not None
    assert judge_stability(record).verdict == "non_finite"
    assert (failure.module, failure.phase, failure.step) == (UP, "forward", 0)
    assert failure.kind == "forward_overflow"
    assert record.replay is not None
    assert {remedy.change: remedy.heals for remedy in record.replay.remedies}["bfloat16"] is True


def test_less_of_it_overflows_in_the_product_that_follows(command: Command, out: Path) -> None:
    record = run(command, out, "--dtype", "float16", "--stress", f"{UP}=4096")
    failure = record.first_failure
    assert failure is not None
    assert (failure.module, failure.tensor) == (UP.replace("up_proj", "down_proj"), "input")
    assert record.replay is not None
    assert record.replay.operation == "aten.mul.Tensor"


def test_bfloat16_trains_as_if_there_were_no_dial(command: Command, out: Path) -> None:
    dialled, plain = run(command, out, "--stress", f"{UP}=16384"), run(command, out)
    assert judge_stability(dialled).verdict == "healthy"
    assert [step.losses for step in dialled.steps] == [step.losses for step in plain.steps]
