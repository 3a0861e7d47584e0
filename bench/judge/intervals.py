"""How sure a ratio of two measured figures is: the ratio, its interval, and whether it differs from 1.

``paired_ratio(pairs)`` is for runs that belong together (repeat k of a backend and repeat k of the baseline
share a seed and stood side by side in time), ``unpaired_ratio(values, base)`` for two sessions whose repeats
do not. ``differs(ratio, margin)`` says whether the whole interval lies beyond the margin.

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
from collections.abc import Callable, Sequence
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
    scattered = [found for found in logs if found and len(found) > 1 and not _equal(found)]
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


def unpaired_ratio(values: Sequence[float], base: Sequence[float]) -> Ratio:
    """The ratio of ``values`` to ``base``, two sessions whose repeats do not belong together.

    Raises ``ValueError`` where either side is empty.
    """
    if not values or not base:
        raise ValueError("a ratio needs at least one value on either side")
    pairs = min(len(values), len(base))
    if not all(_measurable(figure) for figure in (*values, *base)):
        return Ratio(math.nan, None, pairs)
    samples = [math.log(value) for value in values], [math.log(value) for value in base]
    middle = _mean(samples[0]) - _mean(samples[1])
    if pairs < 2:
        return _ratio(middle, None, pairs)
    if all(_equal(logs) for logs in samples):
        return _ratio(middle, (middle, middle), pairs)
    return _ratio(middle, _hull(middle, _student(samples, middle, LEVEL), _bootstrap(samples)), pairs)


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


def _bootstraps(many: Sequence[Sequence[float]], level: float) -> list[Ends]:
    """Percentiles of the resampled mean of each sample; those of one length are resampled alike."""
    import numpy

    found: dict[int, Ends] = {}
    by_length: dict[int, list[int]] = {}
    for place, logs in enumerate(many):
        by_length.setdefault(len(logs), []).append(place)
    for length, places in by_length.items():
        batch = max(1, AT_ONCE // (RESAMPLES * length))
        for start in range(0, len(places), batch):
            part = places[start : start + batch]
            ends = _percentiles(([many[place] for place in part],), numpy.mean, level)
            found |= dict(zip(part, ends, strict=True))
    return [found[place] for place in range(len(many))]


def _bootstrap(samples: Sequence[Sequence[float]]) -> Ends:
    """Percentiles of the resampled difference of two means."""

    def difference(one: Any, other: Any, axis: int) -> Any:
        return one.mean(axis=axis) - other.mean(axis=axis)

    return _percentiles(samples, difference, LEVEL)[0]


def _percentiles(samples: Sequence[Any], statistic: Callable[..., Any], level: float) -> list[Ends]:
    """scipy's bootstrap over the last axis of the samples: the ends for each place of the others."""
    import numpy
    from scipy.stats import bootstrap

    found = bootstrap(
        samples, statistic, n_resamples=RESAMPLES, vectorized=True, axis=-1, confidence_level=level,
        method="percentile", rng=numpy.random.default_rng(SEED),
    ).confidence_interval  # fmt: skip
    low, high = numpy.atleast_1d(found.low), numpy.atleast_1d(found.high)
    return list(zip(map(float, low), map(float, high), strict=True))


def _squared_error(logs: Sequence[float]) -> float:
    """Of the mean."""
    middle = _mean(logs)
    return math.fsum((value - middle) ** 2 for value in logs) / (len(logs) - 1) / len(logs)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _exp(value: float) -> float:
    """A bound too large for a float is infinity, not an error."""
    return math.exp(value) if value < math.log(sys.float_info.max) else math.inf
