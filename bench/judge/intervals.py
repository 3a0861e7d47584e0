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

scipy is imported where it is used: asking for help must not wait for it.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final, Literal

LEVEL: Final = 0.95
"""How often such an interval holds the true ratio, where the repeats are independent of one another."""
NOISE_MARGIN: Final = 0.01
"""For measured times and resident memory: a ratio closer to 1 is nobody's reason to choose. The default
``noise_threshold`` of criterion.rs (src/lib.rs), which serves the same end. Exact figures, such as counted
tensor bytes, take 0."""
RESAMPLES: Final = 2000
"""Of the bootstrap: its ends then scatter by some 2 % of the width from seed to seed."""
SEED: Final = 0
"""Of the resampling: the same figures give the same interval every time."""

Direction = Literal["lower", "higher"]


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


def paired_ratio(pairs: Sequence[tuple[float, float]]) -> Ratio:
    """The ratio over pairs of (value, baseline's value), each of the same repeat.

    Raises ``ValueError`` where there is no pair.
    """
    if not pairs:
        raise ValueError("a ratio needs at least one pair")
    if not all(_measurable(figure) for pair in pairs for figure in pair):
        return Ratio(math.nan, None, len(pairs))
    logs = [math.log(value) - math.log(base) for value, base in pairs]
    return _ratio((logs,), len(pairs))


def unpaired_ratio(values: Sequence[float], base: Sequence[float]) -> Ratio:
    """The ratio of ``values`` to ``base``, two sessions whose repeats do not belong together.

    Raises ``ValueError`` where either side is empty.
    """
    if not values or not base:
        raise ValueError("a ratio needs at least one value on either side")
    pairs = min(len(values), len(base))
    if not all(_measurable(figure) for figure in (*values, *base)):
        return Ratio(math.nan, None, pairs)
    return _ratio(([math.log(value) for value in values], [math.log(value) for value in base]), pairs)


def _measurable(figure: float) -> bool:
    """Whether it has a logarithm; what has none is not dropped: it makes the ratio NaN."""
    return math.isfinite(figure) and figure > 0


Samples = tuple[Sequence[float], ...]
"""The log ratios of the pairs; or the logarithms of either side."""


def _ratio(samples: Samples, pairs: int) -> Ratio:
    """The estimate and the hull of both intervals, back from the logarithms."""
    middle = _mean(samples[0]) - (_mean(samples[1]) if len(samples) > 1 else 0.0)
    if pairs < 2:
        return Ratio(_exp(middle), None, pairs)
    # Rounding scatters equal ratios by an ulp or two; that is no scatter of the runs.
    rounding = 8 * sys.float_info.epsilon
    if all(max(logs) - min(logs) <= rounding * max(1.0, *map(abs, logs)) for logs in samples):
        return Ratio(_exp(middle), Interval(_exp(middle), _exp(middle)), pairs)
    ends = (_student(samples, middle), _bootstrap(samples))
    low, high = min(low for low, _ in ends), max(high for _, high in ends)
    return Ratio(_exp(middle), Interval(_exp(min(low, middle)), _exp(max(high, middle))), pairs)


def _student(samples: Samples, middle: float) -> tuple[float, float]:
    """Student's t; of two samples Welch's, with the degrees of freedom of Welch and Satterthwaite."""
    from scipy.stats import t

    parts = [_squared_error(logs) for logs in samples]
    error = math.fsum(parts)
    # As shares of the whole: squares of tiny errors would underflow.
    shares = math.fsum(
        (part / error) ** 2 / (len(logs) - 1) for part, logs in zip(parts, samples, strict=True)
    )
    reach = float(t.ppf((1 + LEVEL) / 2, 1 / shares)) * math.sqrt(error)
    return middle - reach, middle + reach


def _bootstrap(samples: Samples) -> tuple[float, float]:
    """Percentiles of the resampled mean, or of the difference of both means."""
    import numpy
    from scipy.stats import bootstrap

    def statistic(*drawn: numpy.ndarray, axis: int) -> numpy.ndarray:
        means = [sample.mean(axis=axis) for sample in drawn]
        found: numpy.ndarray = means[0] if len(means) == 1 else means[0] - means[1]
        return found

    found = bootstrap(
        samples, statistic, n_resamples=RESAMPLES, vectorized=True, confidence_level=LEVEL,
        method="percentile", rng=numpy.random.default_rng(SEED),
    )  # fmt: skip
    return float(found.confidence_interval.low), float(found.confidence_interval.high)


def _squared_error(logs: Sequence[float]) -> float:
    """Of the mean."""
    middle = _mean(logs)
    return math.fsum((value - middle) ** 2 for value in logs) / (len(logs) - 1) / len(logs)


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values)


def _exp(value: float) -> float:
    """A bound too large for a float is infinity, not an error."""
    return math.exp(value) if value < math.log(sys.float_info.max) else math.inf
