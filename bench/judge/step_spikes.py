"""Spikes of a run: a gradient norm or a loss that leaves far behind what its other steps showed.

``norm_spike(steps)`` and ``loss_rise(steps)`` give the worst step of a run with the figures that
``bench.judge.stability`` holds against its thresholds. Warm-up steps count: it is kernels and allocators that
warm up, not gradients. Values that are not finite are left to the verdict on those, and a step that was found
to be out of line is no yardstick for the ones after it, so that a jump that stays is seen as well.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.judge.thresholds import LOSS_RISE, NORM_RATIO, ROBUST_Z
from bench.record.schema import Step

YARDSTICK_STEPS = 3
"""Other steps that a robust z needs: the MAD of two values is half their distance, whatever they are."""
START_STEPS = 3
"""Steps whose mean loss is the start."""
TOKEN_NATS = 3.0
"""Standard deviation of the loss of one token that is allowed for. Language models' losses range from near 0
to above 10 nats from token to token, so the mean over few tokens scatters; this project's own allowance."""


@dataclass(frozen=True)
class NormSpike:
    """The step whose norm stands out most."""

    step: int
    norm: float
    ratio: float
    """Over the mean of the norms before it."""
    robust_z: float | None
    """Infinity where all others are equal; None: fewer than `YARDSTICK_STEPS` others are in line."""

    @property
    def exceeds(self) -> bool:
        """Whether both thresholds are exceeded."""
        return self.ratio > NORM_RATIO.value and (self.robust_z or 0.0) > ROBUST_Z.value


@dataclass(frozen=True)
class LossRise:
    """The step whose loss rose furthest towards, or beyond, what is allowed there."""

    step: int
    loss: float
    start: float
    """Mean loss of the first steps before it that are in line."""
    allowed: float
    """Nats that the loss may rise above ``start``."""

    @property
    def rise(self) -> float:
        """Nats above the start."""
        return self.loss - self.start

    @property
    def exceeds(self) -> bool:
        """Whether the loss rose further than allowed."""
        return self.rise > self.allowed


def norm_spike(steps: Sequence[Step]) -> NormSpike | None:
    """The worst norm among ``steps``, or None where none has a finite norm with another before it.

    The worst is the one with the highest ratio, those first that exceed both thresholds.
    """
    finite = [step for step in steps if math.isfinite(step.gradient_norm)]
    ratios: dict[int, float] = {}
    in_line: list[Step] = []
    for place, step in enumerate(finite):
        before = _mean([other.gradient_norm for other in in_line]) if in_line else 0.0
        if before > 0:
            ratios[place] = step.gradient_norm / before
        # A zero is no history to be measured by: it would make any norm after it a spike.
        if ratios.get(place, 0.0) <= NORM_RATIO.value and step.gradient_norm > 0:
            in_line.append(step)
    found = []
    for place, ratio in ratios.items():
        step = finite[place]
        others = [other.gradient_norm for other in in_line if other is not step]
        found.append(NormSpike(step.index, step.gradient_norm, ratio, robust_z(step.gradient_norm, others)))
    return max(found, key=lambda spike: (spike.exceeds, spike.ratio), default=None)


def robust_z(value: float, others: Sequence[float]) -> float | None:
    """0.6745 (value - median) / MAD of ``others`` (Iglewicz and Hoaglin 1993); None: they are too few.

    Where all others are equal, their MAD is zero and the result an infinity with the sign of the difference,
    or 0 where there is none.
    """
    if len(others) < YARDSTICK_STEPS:
        return None
    middle = statistics.median(others)
    spread = statistics.median(abs(other - middle) for other in others)
    distance = 0.6745 * (value - middle)
    if spread == 0:
        return math.copysign(math.inf, distance) if distance else 0.0
    return distance / spread


def loss_rise(steps: Sequence[Step]) -> LossRise | None:
    """The worst loss among ``steps``, or None where none has a finite loss with another before it."""
    in_line: list[Step] = []
    found = []
    for step in steps:
        loss = mean_loss(step)
        if loss is None:
            continue
        start = in_line[:START_STEPS]
        if start:
            began = _mean([mean_loss(other) or 0.0 for other in start])
            rise = LossRise(step.index, loss, began, _allowed(began, step, start))
            found.append(rise)
            if rise.exceeds:
                continue
        in_line.append(step)
    return max(found, key=lambda rise: rise.rise - rise.allowed, default=None)


def mean_loss(step: Step) -> float | None:
    """Mean over the micro-batches; None where there is none or one of them is not finite."""
    if not step.losses or not all(math.isfinite(loss) for loss in step.losses):
        return None
    return _mean(step.losses)


def _mean(values: Sequence[float]) -> float:
    """The mean; of values so large that their sum leaves the range of floats, the sum of their shares."""
    try:
        return statistics.fmean(values)
    except OverflowError:
        return sum(value / len(values) for value in values)


def _allowed(began: float, step: Step, start: Sequence[Step]) -> float:
    """The threshold's base, and three standard errors of the difference of the two means."""
    here, there = max(step.loss_tokens, 1), max(sum(other.loss_tokens for other in start), 1)
    scatter = 3 * TOKEN_NATS * math.sqrt(1 / here + 1 / there)
    return max(LOSS_RISE.value + scatter, began / 2)
