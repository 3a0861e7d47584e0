"""Memory that grows from step to step: a run whose figures are those of so many steps and no more.

``find_leak(record)`` looks at the memory after each measured step: reserved by the allocator on CUDA,
resident on a CPU. A heap that settles grows less and less, and one larger piece makes one jump; a leak is as
steep at the end as at any time before. At the beginning it may be less steep: what the load and the first
steps freed takes in the first of what is leaked, and the process does not grow yet.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from statistics import median
from typing import Final, Literal

from bench.judge.stability import measured_steps
from bench.record.schema import Record

FEWEST_STEPS: Final = 12
"""Measured steps; fewer tell a leak from a settling heap by chance only."""
BYTES_PER_STEP: Final = 2**20
"""Less is passed over: a gigabyte in a thousand steps."""
STEADY: Final = 0.6
"""Of the growths from quarter to quarter of the steps, the second and the third are at least this share of
the largest. Growth like a square root gives 0.56, like a logarithm 0.31, a single jump 0."""
BEGUN: Final = 0.25
"""And the first is at least this share: what begins halfway is two jumps as well as a leak."""


@dataclass(frozen=True)
class Leak:
    """Steady growth."""

    bytes_per_step: float
    """Between the medians of the first and the last quarter of the measured steps."""
    steps: int
    """Measured ones."""
    measure: Literal["reserved", "resident"]


    @property
    def sentence(self) -> str:
        """What it means for a person's training, and what to do."""
        grew = f"{self.measure} memory grew by {self.bytes_per_step / 2**20:.2g} MiB a step"
        return (
            f"{grew} over {self.steps} measured steps and did not level off: a longer training needs more "
            "than the peak shown here. Run it with more --steps before you plan with that peak."
        )


def find_leak(record: Record) -> Leak | None:
    """Growth that goes on. None: there is none, or too few steps were measured to tell."""
    steps = measured_steps(record)
    reserved = [step.peak_reserved_bytes for step in steps if step.peak_reserved_bytes is not None]
    resident = [step.resident_bytes for step in steps if step.resident_bytes is not None]
    values = reserved or resident
    if len(values) < FEWEST_STEPS:
        return None
    quarter = len(values) // 4
    # What a remainder leaves over is passed over at the beginning, where a heap still settles.
    kept = values[len(values) - 4 * quarter :]
    medians = [median(kept[place * quarter : (place + 1) * quarter]) for place in range(4)]
    growths = [later - earlier for earlier, later in pairwise(medians)]
    slope = (medians[-1] - medians[0]) / (3 * quarter)
    first, *later = growths
    steady = first >= BEGUN * max(growths) and min(later) >= STEADY * max(growths)
    if slope < BYTES_PER_STEP or not steady:
        return None
    return Leak(slope, len(values), "reserved" if reserved else "resident")
