"""Steps of one model at several depths, timed in turns in one process: what was asked for, and what it gave.

Made by ``bench.run.depths`` for ``qlora-bench forecast``, and kept as ``KEY.depths.json`` beside the records
of the slices, so that a forecast that was interrupted goes on where it was.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Final, Literal, Self

from pydantic import Field, model_validator

from bench.ask.plan import RunRequest
from bench.record.recorded import Recorded, Seconds
from bench.record.schema import Record, Status
from bench.record.store import REPEATED_STATUSES, read_document
from bench.record.writing import write_atomically

DEPTHS_VERSION: Final = 1
SUFFIX = ".depths.json"
SELDOM = 2
"""A depth that is timed seldom is timed in every second round."""


class Turns(Recorded):
    """Which depths take turns, and how often."""

    depths: tuple[Annotated[int, Field(ge=1)], ...]
    """Numbers of decoder layers, rising; the model is built with the last."""
    warmup_rounds: Annotated[int, Field(ge=0)]
    """Leading rounds that are recorded and left out of the statistics."""
    rounds: Annotated[int, Field(ge=1)]
    """Rounds after them."""
    seldom: int | None = None
    """A depth that is timed in the warm-up and then in every second round only: the full depth, whose noise
    nothing amplifies, and which costs the most."""

    @model_validator(mode="after")
    def _rising(self) -> Self:
        if not self.depths or list(self.depths) != sorted(set(self.depths)):
            raise ValueError(f"depths {self.depths} do not rise")
        return self

    def of_round(self, index: int) -> tuple[int, ...]:
        """The depths of one round, shallow to deep; ``index`` counts the warm-up rounds too."""
        measured = index - self.warmup_rounds
        spared = self.seldom if measured >= 0 and measured % SELDOM else None
        return tuple(depth for depth in self.depths if depth != spared)


class DepthTimes(Recorded):
    """What one process measured."""

    depths_version: Literal[1] = DEPTHS_VERSION
    key: str
    request: RunRequest
    """Of the deepest model."""
    turns: Turns
    status: Status
    message: str | None
    """Why, in one line, where it is not completed."""
    seconds: Mapping[int, tuple[float | None, ...]]
    """Depth -> seconds of its optimizer step in each round, the warm-up's first; null: not its turn."""
    losses: Mapping[int, tuple[float | None, ...]]
    """Depth -> mean over the micro-batches of that step."""
    tokens_per_step: int | None
    """Non-padding tokens of the last step."""
    started_at: str
    """UTC, ISO 8601."""
    wall_seconds: Seconds

    def rounds(self) -> tuple[dict[int, float], ...]:
        """Seconds by depth of each round after the warm-up that was finished."""
        length = max((len(values) for values in self.seconds.values()), default=0)
        found = []
        for place in range(self.turns.warmup_rounds, length):
            of_round = {
                depth: value
                for depth, values in self.seconds.items()
                if place < len(values) and (value := values[place]) is not None
            }
            if set(of_round) == set(self.turns.of_round(place)):
                found.append(of_round)
        return tuple(found)


@dataclass(frozen=True)
class Repeat:
    """What one repeat of one backend's forecast measured."""

    index: int
    records: Mapping[int, Record]
    """By the number of decoder layers; the full depth among them where it was run."""
    times: DepthTimes | None = None
    """None: the steps were not timed, since a slice did not complete."""
    abandoned: DepthTimes | None = None
    """An attempt with the full depth among the turns that did not complete; ``times`` are then without it."""


def times_key(request: RunRequest, turns: Turns) -> str:
    """Name of the file: unique for what the times depend on."""
    digest = hashlib.sha256(f"{request.key} {turns.model_dump_json()}".encode()).hexdigest()
    return f"{request.backend}-{request.dtype}-r{request.repeat}-{digest[:10]}"


def save_times(folder: Path, times: DepthTimes) -> Path:
    """Write ``times`` into ``folder``, whole or not at all."""
    return write_atomically(folder / f"{times.key}{SUFFIX}", times.model_dump_json(indent=1) + "\n")


def read_times(folder: Path, key: str) -> DepthTimes | None:
    """The times of that key that stand; None: there are none, or the attempt said nothing of the backend.

    Raises BrokenFile, naming the first thing wrong.
    """
    times = read_document(folder / f"{key}{SUFFIX}", DepthTimes, "a file of step times")
    return None if times is None or times.status in REPEATED_STATUSES else times
