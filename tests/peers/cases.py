"""What is run beside what: the cases of a session, and the arms of each."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.errors import unknown

Environment = Literal["today", "older"]
OURS = "qlora-bench"
TRAINER = "transformers.Trainer"
OPTIMUM = "optimum-benchmark"
INLINE = "optimum-benchmark, inline launcher"
OPTIMUM_TODAY = "optimum-benchmark, today's transformers"
BY_METHOD = "optimum-benchmark, 4 bits by quant_method"


@dataclass(frozen=True)
class Arm:
    """One way to do the work. This project's own has no module: it is run by the front door's own code."""

    name: str
    module: str | None = None
    environment: Environment = "today"
    flags: tuple[str, ...] = ()
    rounds: int | None = None
    """Run in the first so many rounds only; None: in all. One, where what it shows does not depend on the clock."""


ARMS = {
    arm.name: arm
    for arm in (
        Arm(OURS),
        Arm(TRAINER, "tests.peers.trainer_peer"),
        # Its launcher takes a core from the run it waits for: on a processor ten times as slow as inline, which
        # two rounds show as well as many.
        Arm(OPTIMUM, "tests.peers.optimum_peer", "older", rounds=2),
        Arm(INLINE, "tests.peers.optimum_peer", "older", ("--launcher", "inline")),
        Arm(OPTIMUM_TODAY, "tests.peers.optimum_peer", "today", rounds=1),
        Arm(
            BY_METHOD,
            "tests.peers.optimum_peer",
            "older",
            ("--launcher", "inline", "--quantize-by", "method"),
            rounds=1,
        ),
    )
}


@dataclass(frozen=True)
class Case:
    """One piece of work, done by several arms side by side."""

    name: str
    says: str
    """What it is, for the reader."""
    arms: tuple[str, ...]
    backend: str = "bf16"
    settings: tuple[str, ...] = ()
    """As ``--set`` takes them."""
    rounds: int | None = None
    """None: as many as the session has."""
    with_data: bool = False
    """Trained on `data_without_a_target` instead of the generated text."""


CASES = {
    case.name: case
    for case in (
        Case(
            "bf16",
            "not quantized, rows packed full",
            (OURS, TRAINER, OPTIMUM, INLINE, OPTIMUM_TODAY),
        ),
        Case(
            "bnb-nf4",
            "NF4, rows packed full",
            (OURS, TRAINER, OPTIMUM, INLINE, BY_METHOD),
            backend="bnb-nf4",
        ),
        Case(
            "bf16-padded",
            "not quantized, one conversation a row, padded on the right",
            (OURS, TRAINER),
            settings=("workload.padding=right",),
        ),
        Case(
            "bf16-no-target",
            "not quantized, padded; one row's prompt fills it, so there is nothing to predict and its loss is 0/0",
            (OURS, TRAINER),
            settings=("workload.padding=right", "workload.without_targets=train"),
            rounds=1,
            with_data=True,
        ),
    )
}


def choose(names: Sequence[str]) -> list[Case]:
    """The cases of these names; all where there are none. Raises BadValue for a name that does not exist."""
    for name in names:
        if name not in CASES:
            raise unknown("case", name, CASES)
    return [CASES[name] for name in names] or list(CASES.values())


def data_without_a_target(path: Path, rows: int, place: int, sequence_length: int) -> Path:
    """A file of ``rows`` conversations, of which that at ``place`` has a prompt longer than a row."""
    lines = []
    for row in range(rows):
        words = 4 * sequence_length if row == place else 8
        prompt = " ".join(f"item{row}x{word}" for word in range(words))
        lines.append(json.dumps({"prompt": f"List: {prompt}", "response": f"That is list {row}, all of it."}))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path
