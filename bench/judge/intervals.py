"""How sure a ratio of two measured figures is: the ratio, its interval, and whether it differs from 1.

``paired_ratio(pairs)`` is for runs that belong together (repeat k of a backend and repeat k of the baseline
share a seed and stood side by side in time), ``unpaired_ratios(many)`` for two sessions whose repeats do
not. ``differs(ratio, margin)`` says whether the whole interval lies beyond the margin.

Everything is computed on logarithms, so that the ratio of swapped figures is the reciprocal. The estimate is
the geometric mean. The interval is the hull of two that fail in different ways:

- Student's t on the log ratios (Welch's where unpaired) assumes that they are normally distributed;
- a percentile bootstrap of their mean assumes no distribution, but is too narrow for a handful of values
  (Hesterberg 2015, "What Teachers Should Know About the Bootstrap", The American Statistician 69(4)): it
  cannot leave their range, and the range of n values holds their median with probability 1 - 2^(1-n)
  only, which is 75 % for 3 and 94 % for 5.

Simulated runs (tests/test_intervals.py): noise that is normal, or skewed alike on both sides, is covered as
often as `LEVEL` says, from three pairs on. Where one side alone is held up now and then (exponential noise
against hardly any), the interval holds the truth in about 90 % of cases and not in 95 %.

scipy is imported where it is used: asking for help must not wait for it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Final, Literal

LEVEL: Final = 0.95
"""How often such an interval holds the true ratio, where the repeats are independent of one another."""
NOISE_MARGIN: Final = 0.01
"""For measured times and resident memory: a ratio closer to 1 is nobody's reason to choose. The default
``noise_threshold`` of criterion.rs (src/lib.rs), which serves the same end. Exact figures, such as counted
tensor bytes, take 0."""
RESAMPLES: Final = 2000
"""Of the bootstrap: its ends then scatter by some 2 % of the width from seed to seed."""
AT_ONCE: Final = 4_000_000
"""Values drawn at once (32 MB), so that thousands of ratios need no more memory than some."""
SEED: Final = 0
"""Of the resampling: the same figures give the same interval every time."""

Direction = Literal["lower", "higher"]
Pairs = Sequence[tuple[float, float]]
"""(value, the baseline's value of the same repeat)."""
Ends = tuple[float, float]
"""Of an interval of a log ratio."""


@dataclass(frozen=True)
class Interval:
    """From ``low`` to ``high``, both included, at `LEVEL`."""

    low: float
    high: float

    def overlaps(self, other: Interval, margin: float = 0.0) -> bool:
        """Whether they share a value, or come closer to one another than ``margin`` (0.01: 1 %)."""
        return self.low <= other.high * (1 + margin) and other.low <= self.high * (1 + margin)


@dataclass(frozen=True)
class Ratio:
    """A figure over that of the baseline."""

    estimate: float
    """Geometric mean; NaN where a figure was not finite or not above 0."""
    interval: Interval | None
    """None: a single pair (a single run of either side) tells nothing about the scatter, or ``estimate`` is
    NaN."""
    pairs: int
    """Pairs; where unpaired, the runs of the smaller side."""

    def excludes_one(self, margin: float) -> bool:
        """Whether the whole interval is at least the factor 1 + ``margin`` away from 1."""
        return differs(self, margin) is not None


def differs(ratio: Ratio, margin: float) -> Direction | None:
    """Where the whole interval lies: below 1 / (1 + ``margin``), above 1 + ``margin``, or None: neither.

    The lower bound is the reciprocal of the upper one (0.9901 for 1 %), so that swapping the two sides swaps
    the answer. None too where there is no interval: nothing can be concluded.
    """
    if ratio.interval is None:
        return None
    if ratio.interval.high < 1 / (1 + margin):
        return "lower"
    return "higher" if ratio.interval.low > 1 + margin else None


def paired_ratio(pairs: Pairs, level: float = LEVEL) -> Ratio:
    """The ratio over pairs of (value, baseline's value), each of the same repeat.

    ``level``: of the interval, where it is not `LEVEL`. Raises ``ValueError`` where there is no pair.
    """
    return paired_ratios([pairs], level)[0]


def paired_ratios(many: Sequence[Pairs], level: float = LEVEL) -> list[Ratio]:
    """As `paired_ratio`, for many at once: those of as many pairs share their resamples, which is faster."""
    if not all(many):
        raise ValueError("a ratio needs at least one pair")
    logs = [
        [math.log(value) - math.log(base) for value, base in pairs]
        if all(_measurable(figure) for pair in pairs for figure in pair)
        else None
        for pairs in many
    ]
    scattered = [(found,) for found in logs if found and len(found) > 1 and not _equal(found)]
    resampled = iter(_bootstraps(scattered, level))
    made = []
    for found, pairs in zip(logs, many, strict=True):
        if found is None:
            made.append(Ratio(math.nan, None, len(pairs)))
        else:
            middle = _mean(found)
            hull = None if len(pairs) < 2 else (middle, middle)
            if hull and not _equal(found):
                hull = _hull(middle, _student((found,), middle, level), next(resampled))
            made.append(_ratio(middle, hull, len(pairs)))
    return made


def unpaired_ratios(many: Sequence[tuple[Sequence[float], Sequence[float]]]) -> list[Ratio]:
    """The ratio of the values of one session to those of another, whose repeats do not belong together; for
    many at once, since those of as many values share their resamples.

    Raises ``ValueError`` where either side is empty.
    """
    if not all(values and base for values, base in many):
        raise ValueError("a ratio needs at least one value on either side")
    logs = [
        tuple([math.log(figure) for figure in side] for side in sides)
        if all(_measurable(figure) for side in sides for figure in side)
        else None
        for sides in many
    ]
    several = [min(map(len, sides)) > 1 for sides in many]
    scattered = [
        found
        for found, more in zip(logs, several, strict=True)
        if found and more and not all(map(_equal, found))
    ]
    resampled = iter(_bootstraps(scattered, LEVEL))
    made = []
    for found, sides, more in zip(logs, many, several, strict=True):
        pairs = min(map(len, sides))
        if found is None:
            made.append(Ratio(math.nan, None, pairs))
        else:
            middle = _mean(found[0]) - _mean(found[1])
            hull = (middle, middle) if more else None
            if hull and not all(map(_equal, found)):
                hull = _hull(middle, _student(found, middle, LEVEL), next(resampled))
            made.append(_ratio(middle, hull, pairs))
    return made


def _measurable(figure: float) -> bool:
    """Whether it has a logarithm; what has none is not dropped: it makes the ratio NaN."""
    return math.isfinite(figure) and figure > 0


def _equal(logs: Sequence[float]) -> bool:
    """Whether they are one value: rounding scatters equal ratios by an ulp or two."""
    return max(logs) - min(logs) <= 8 * sys.float_info.epsilon * max(1.0, *map(abs, logs))


def _hull(middle: float, *intervals: Ends) -> Ends:
    """From the lowest to the highest end; the estimate is never outside."""
    return min(middle, *(low for low, _ in intervals)), max(middle, *(high for _, high in intervals))


def _ratio(middle: float, ends: Ends | None, pairs: int) -> Ratio:
    """Back from the logarithms."""
    return Ratio(_exp(middle), None if ends is None else Interval(*map(_exp, ends)), pairs)


def _student(samples: Sequence[Sequence[float]], middle: float, level: float) -> Ends:
    """Student's t; of two samples Welch's, with the degrees of freedom of Welch and Satterthwaite."""
    parts = [_squared_error(logs) for logs in samples]
    error = math.fsum(parts)
    # As shares of the whole: squares of tiny errors would underflow.
    shares = math.fsum(
        (part / error) ** 2 / (len(logs) - 1) for part, logs in zip(parts, samples, strict=True)
    )
    reach = _student_quantile((1 + level) / 2, 1 / shares) * math.sqrt(error)
    return middle - reach, middle + reach


@cache
def _student_quantile(probability: float, degrees: float) -> float:
    # What scipy.stats.t.ppf computes with, without half a millisecond of checks for each pair of samples.
    from scipy.special import stdtrit

    return float(stdtrit(degrees, probability))


def _bootstraps(many: Sequence[Sequence[Sequence[float]]], level: float) -> list[Ends]:
    """Percentiles of the resampled mean of each sample, or of the difference of the means of each two. Those
    of the same lengths are resampled alike."""
    found: dict[int, Ends] = {}
    by_lengths: dict[tuple[int, ...], list[int]] = {}
    for place, samples in enumerate(many):
        by_lengths.setdefault(tuple(map(len, samples)), []).append(place)
    for lengths, places in by_lengths.items():
        batch = max(1, AT_ONCE // (RESAMPLES * max(lengths)))
        for start in range(0, len(places), batch):
            part = places[start : start + batch]
            sides = list(zip(*(many[place] for place in part), strict=True))
            found |= dict(zip(part, _percentiles(sides, level), strict=True))
    return [found[place] for place in range(len(many))]


def _percentiles(sides: Sequence[Sequence[Sequence[float]]], level: float) -> list[Ends]:
    """scipy's bootstrap over tables of values, one or two: the ends for each of their rows."""
    import numpy
    from scipy.stats import bootstrap

    def difference(one: Any, *other: Any, axis: int) -> Any:
        return sum((-table.mean(axis=axis) for table in other), one.mean(axis=axis))

    found = bootstrap(
        sides, difference, n_resamples=RESAMPLES, vectorized=True, axis=-1, confidence_level=level,
        method="percentile", rng=numpy.random.default_rng(SEED),
    ).confidence_interval  # fmt: skip
    return list(zip(map(float, found.low), map(float, found.high), strict=True))


def _squared_error(logs: Sequence[float]) -> float:
    """Of the mean."""
    middle = _mean(logs)
    return math.fsum((value - middle) ** 2 for value in logs) / (len(logs) - 1) / len(logs)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _exp(value: float) -> float:
    """A bound too large for a float is infinity, not an error."""
    return math.exp(value) if value < math.log(sys.float_info.max) else math.inf
