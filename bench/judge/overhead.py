"""What the harness's loop costs: the noise of the comparison, the overhead with its interval, and the
smallest overhead that so many processes would have shown.

``judge_overhead(times)`` takes what ``bench.run.overhead`` measured. The process is the unit of replication:
each gives one value, the median of its measured steps. In every round the harness's value stands over the
geometric mean of both loops by hand, and the second loop by hand over the first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from statistics import median, stdev
from typing import Final, Literal

from bench.judge.intervals import LEVEL, NOISE_MARGIN, Ratio, differs, paired_ratio
from bench.record.overhead import OverheadTimes, ProcessTimes, Way

TARGET: Final = NOISE_MARGIN
"""What the harness may add to a step: as much as is nobody's reason to choose a backend."""
POWER: Final = 0.8
"""Share of measurements that would show the minimum detectable effect; the customary value."""
FEW_ROUNDS: Final = 5
"""Fewer than this are warned about."""
LOSS_AGREEMENT: Final = 1e-3
"""Relative. Both loops train the same, so losses differ by the rounding of the gradient norm at most."""

View = Literal["step", "between"]
VIEWS: Final[Mapping[View, str]] = {
    "step": "a step as recorded, from before the forward to after the update",
    "between": "from the report of a step to the report of the next, on the parent's clock",
}
Verdict = Literal["held", "exceeded", "undecided"]


@dataclass(frozen=True)
class Cost:
    """One view of the overhead."""

    view: View
    seconds: Mapping[Way, float]
    """Median over the processes of a way."""
    noise: Ratio
    """The loop by hand again, over the loop by hand: what a ratio of 1 looks like here."""
    overhead: Ratio
    """The harness over the loops by hand."""
    minimum_detectable: float | None
    """As a share of the step, see `minimum_detectable`; None: a single round."""

    @property
    def noise_floor(self) -> float | None:
        """How far the interval of the noise reaches from 1, as a share. None: a single round."""
        interval = self.noise.interval
        return None if interval is None else max(interval.high, 1 / interval.low) - 1

    @property
    def within_noise(self) -> bool | None:
        """Whether the overhead is no further from 1 than the noise floor. None: a single round."""
        floor = self.noise_floor
        return None if floor is None else abs(math.log(self.overhead.estimate)) <= math.log1p(floor)

    @property
    def verdict(self) -> Verdict:
        """``held``: the whole interval is at most the target. ``exceeded``: it lies beyond it. Else more
        processes are needed to tell."""
        if differs(self.overhead, TARGET) == "higher":
            return "exceeded"
        interval = self.overhead.interval
        return "held" if interval is not None and interval.high <= 1 + TARGET else "undecided"


@dataclass(frozen=True)
class Overhead:
    """Both views, and whether the loops did the same work."""

    rounds: int
    costs: tuple[Cost, ...]
    loss_difference: float
    """The largest relative difference of a step's loss to that of the first loop by hand; NaN where one is
    not finite."""

    @property
    def same_work(self) -> bool:
        """Whether the losses agree; what they say of the costs means nothing where they do not."""
        return self.loss_difference <= LOSS_AGREEMENT


def judge_overhead(times: OverheadTimes) -> Overhead:
    """Every figure. Raises ValueError where no round is complete."""
    rounds = times.rounds()
    if not rounds:
        raise ValueError("no round is complete")
    costs = (
        _cost("step", rounds, lambda process: median(process.step_seconds)),
        _cost("between", rounds, lambda process: median(process.between_seconds)),
    )
    return Overhead(len(rounds), costs, _loss_difference(rounds))


def minimum_detectable(log_ratios: Sequence[float]) -> float | None:
    """The smallest overhead that ``len(log_ratios)`` rounds would show with probability `POWER`, as a share.

    ``log_ratios``: of the second loop by hand over the first, one a round; a difference of two processes,
    whose variance is twice that of one process. Bloom 1995 ("Minimum Detectable Effects", Evaluation Review
    19(5)): (t[1 - alpha/2] + t[power]) times the standard error, with n - 1 degrees of freedom and alpha
    1 - `LEVEL`. The overhead is a difference between one process and the mean of two, whose variance is one
    and a half times that of one process, hence the factor sqrt(3/4). None: a single round.
    """
    from scipy.stats import t

    count = len(log_ratios)
    if count < 2:
        return None
    error = stdev(log_ratios) / math.sqrt(count) * math.sqrt(3 / 4)
    reach = float(t.ppf((1 + LEVEL) / 2, count - 1) + t.ppf(POWER, count - 1))
    return math.expm1(reach * error)


def _cost(
    view: View, rounds: Sequence[Mapping[Way, ProcessTimes]], value: Callable[[ProcessTimes], float]
) -> Cost:
    values = [{way: value(process) for way, process in ways.items()} for ways in rounds]
    return Cost(
        view=view,
        seconds={way: median(of_round[way] for of_round in values) for way in values[0]},
        noise=paired_ratio([(v["bare_again"], v["bare"]) for v in values]),
        overhead=paired_ratio([(v["harness"], math.sqrt(v["bare"] * v["bare_again"])) for v in values]),
        minimum_detectable=minimum_detectable([math.log(v["bare_again"] / v["bare"]) for v in values]),
    )


def _loss_difference(rounds: Sequence[Mapping[Way, ProcessTimes]]) -> float:
    wanted = rounds[0]["bare"].losses
    found = [
        abs(loss - target) / abs(target) if target else math.nan
        for ways in rounds
        for process in ways.values()
        for loss, target in zip(process.losses, wanted, strict=True)
    ]
    return math.nan if any(map(math.isnan, found)) else max(found)
