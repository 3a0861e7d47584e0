"""Memory that was planted beside what the records say: no process is started here.

Two processes that do the same differ in their resident memory by heap layout and thread timing, and by how much
is not known beforehand. So an answer is right where its interval, out of the runs themselves, holds what was
planted, and is narrow beside it: noise that could hide the plant is a wrong answer, not a right one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from statistics import fmean, stdev
from typing import Any

from bench.record.memory import MemoryReading
from bench.record.schema import Record
from tests.truth.verdicts import Finding, of

MIB = 2**20
PHASE_READINGS = {
    "loaded": ("allocated_bytes", "resident_bytes"),
    "attached": ("allocated_bytes", "resident_bytes"),
    "forward": ("peak_allocated_bytes", "peak_resident_bytes"),
    "backward": ("peak_allocated_bytes", "peak_resident_bytes"),
    "optimizer_step": ("peak_allocated_bytes", "peak_resident_bytes"),
}
"""Phase -> the reading that shows what is held in it, on a card and on a CPU: peaks of training phases count
from the phase's beginning, those before the training from the process's."""
NARROW = 0.25
"""An interval may reach so far from what was planted, as a share of it."""
ERROR_RATE = 0.05
"""That one of the intervals of a `make truth` does not hold what was planted, although all is measured right."""
INTERVALS = 21
"""In a `make truth`: five phases of four adapters, and one of hidden weights. Each has its share of the error
rate (Bonferroni)."""


@dataclass(frozen=True)
class Difference:
    """Bytes that one adapter's runs have more than another's, repeat by repeat."""

    mean: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Difference:
        """Student's interval of the mean. NaN where there are fewer than two values."""
        from scipy import stats  # type: ignore[import-untyped]

        if len(values) < 2:
            return cls(fmean(values), math.nan, math.nan)
        quantile = float(stats.t.ppf(1 - ERROR_RATE / INTERVALS / 2, len(values) - 1))
        reach = quantile * stdev(values) / math.sqrt(len(values))
        return cls(fmean(values), fmean(values) - reach, fmean(values) + reach)

    def is_what_was_planted(self, planted: float, scale: float) -> bool:
        """Whether the interval holds it and reaches no further from it than `NARROW` of ``scale``."""
        return self.low <= planted <= self.high and max(self.high - planted, planted - self.low) <= NARROW * scale

    def __str__(self) -> str:
        return f"{self.mean / MIB:+.1f} [{self.low / MIB:+.1f}, {self.high / MIB:+.1f}]"


def judge_held(records: Sequence[Record], plain: str, holding: str, phase: str, planted_bytes: int) -> Finding:
    """So much more in that phase's reading, and nothing in any other's.

    What is held when a phase is read, and let go of later, shows in that phase alone.
    """
    more = {name: _more(records, plain, holding, name) for name in PHASE_READINGS}
    return Finding(
        f"held in {phase}",
        f"{planted_bytes / MIB:+.0f} MiB there, nothing elsewhere",
        ", ".join(f"{name} {difference}" for name, difference in more.items()) + " MiB",
        right=all(
            difference.is_what_was_planted(planted_bytes if name == phase else 0, planted_bytes)
            for name, difference in more.items()
        ),
        values={"planted_bytes": planted_bytes, "phase": phase, "more_bytes": _values(more)},
    )


def judge_hidden_weights(records: Sequence[Record], plain: str, hiding: str) -> Finding:
    """Dense weights that no walk over a layer finds are in the process's memory all the same."""
    quantization = of(records, plain)[0].quantization
    assert quantization
    planted = 2 * quantization.weights
    more = _more(records, plain, hiding, "loaded")
    return Finding(
        "computes with dense weights that it hides",
        f"{planted / MIB:+.1f} MiB after the load",
        f"{more} MiB",
        right=more.is_what_was_planted(planted, planted),
        values={"planted_bytes": planted, "more_bytes": _values({"loaded": more})},
    )


def widest_reach(records: Sequence[Record], plain: str, others: Iterable[str]) -> float:
    """How far the widest interval of any of them in any phase reaches to either side, in bytes."""
    found = [_more(records, plain, other, phase) for other in others for phase in PHASE_READINGS]
    reaches = [(difference.high - difference.low) / 2 for difference in found]
    return math.inf if any(map(math.isnan, reaches)) else max(reaches)


def _more(records: Sequence[Record], plain: str, other: str, phase: str) -> Difference:
    pairs = zip(of(records, other), of(records, plain), strict=True)
    return Difference.of([_reading(held, phase) - _reading(base, phase) for held, base in pairs])


def _reading(record: Record, phase: str) -> int:
    readings: dict[str, MemoryReading] = {reading.phase: reading for reading in record.memory.readings}
    values = (getattr(readings[phase], name) for name in PHASE_READINGS[phase])
    return int(next(value for value in values if value is not None))


def _values(more: Mapping[str, Difference]) -> dict[str, Any]:
    return {name: vars(difference) for name, difference in more.items()}
