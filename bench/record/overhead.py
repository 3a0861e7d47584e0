"""What the harness's loop costs, as measured: step times of fresh processes, some without the harness.

Made by ``bench.run.overhead``, judged by ``bench.judge.overhead``, and written with ``--json``.
"""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import Field

from bench.ask.plan import RunRequest
from bench.record.environment import Environment
from bench.record.recorded import Recorded, Seconds

OVERHEAD_VERSION: Final = 1

Way = Literal["bare", "bare_again", "harness"]
"""``bare`` and ``bare_again`` are the same loop, written by hand; ``harness`` is a run as every other."""
WAYS: Final[tuple[Way, ...]] = ("bare", "bare_again", "harness")


class BareStep(Recorded):
    """What the loop written by hand tells of a step."""

    index: Annotated[int, Field(ge=0)]
    seconds: Seconds
    loss: float
    """Mean over its micro-batches."""


class ProcessTimes(Recorded):
    """One fresh process: its measured steps, the warm-up left out."""

    way: Way
    round: Annotated[int, Field(ge=0)]
    place: Annotated[int, Field(ge=0)]
    """Which of its round's processes it was, in the order in which they ran."""
    step_seconds: Annotated[tuple[Seconds, ...], Field(min_length=1)]
    """From before the forward to after the update, by the clock of the process; a run records the same."""
    between_seconds: tuple[Seconds, ...]
    """From the report of one step to the report of the next, by the clock of the parent: the whole loop, its
    reading, probing and reporting included. One less than there are steps."""
    losses: tuple[float, ...]
    """Of every step, the warm-up's included: the mean over its micro-batches."""
    wall_seconds: Seconds
    """Of the whole process."""


class OverheadTimes(Recorded):
    """Every process of one measurement."""

    overhead_version: Literal[1] = OVERHEAD_VERSION
    request: RunRequest
    """What each of them trained."""
    environment: Environment | None
    """Of a harness process; null: none was finished."""
    processes: tuple[ProcessTimes, ...]
    started_at: str
    """UTC, ISO 8601."""
    wall_seconds: Seconds

    def rounds(self) -> tuple[dict[Way, ProcessTimes], ...]:
        """The rounds in which every way was finished, in order."""
        found: dict[int, dict[Way, ProcessTimes]] = {}
        for process in self.processes:
            found.setdefault(process.round, {})[process.way] = process
        return tuple(ways for _, ways in sorted(found.items()) if set(ways) == set(WAYS))
