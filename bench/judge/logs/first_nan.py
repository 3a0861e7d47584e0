"""The optimizer step of the first NaN, recovered from what was logged of its window.

``first_nan_in(...)`` looks at one window in which NaN began. Where the filter was on, the logged value is
compared with what each beginning of NaN would have logged (``bench.judge.logs.filtered_loss``). The loss of
the steps before is not known exactly, so an answer is a best step, the interval of steps that fit as well as
the scatter of the loss allows, and the candidates themselves. Nothing that the log leaves open is settled:
with the accumulation unknown there is a best step only if every accumulation names the same one.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

from bench.judge.logs.filtered_loss import FLOAT32_LARGEST_LOG, WHOLE_STEPS, Beginning, Wanted, beginnings
from bench.judge.logs.ordinary_loss import OrdinaryLoss
from bench.judge.logs.windows import Span, micro_batches
from bench.record.logs.logged_values import LoggedWindow
from bench.record.logs.training_log import TrainingLog

SIGMAS = 3
"""A beginning fits if its prediction is at most this many scatters off (Shewhart's three-sigma limits)."""
MOST_ACCUMULATION = 256
"""Accumulations from 1 to this are tried when it is not known."""
MOST_MICRO_BATCHES = 2**17
"""In a window; more are not solved for (500 steps at an accumulation of 256 are 128,000)."""
LOSS_OF_GUESSING = math.log(262_144)
"""12.48: the cross-entropy of guessing among 262,144 tokens, Gemma's vocabulary and about the largest in
use. A first loss above it is implausible; used only where no finite window tells the loss."""
LOWEST_FIRST_LOSS = 0.1
"""Chosen: a fine-tuning whose first loss is lower has nothing left to learn. Used only there, too."""
FLOAT32_STEP = 2.0**-24
"""Relative rounding of one addition to the Trainer's sum."""


@dataclass(frozen=True, slots=True)
class Candidate:
    """A beginning of NaN, and how well it explains what was logged."""

    beginning: Beginning
    predicted_loss: float | None
    """What the window would have logged. None: there is no finite window to predict from."""
    log_error: float | None
    """ln(predicted / logged); 0 is a perfect fit."""
    implied_loss: float | None
    """The loss of the finite steps with which it would fit perfectly."""


@dataclass(frozen=True, slots=True)
class FirstNaN:
    """What a window tells of the step of the first NaN."""

    window: LoggedWindow
    span: Span | None
    """Its optimizer steps. None: not known."""
    accumulation: int | None
    """Micro-batches per step that were reckoned with. None: not known, all were tried."""
    ordinary: OrdinaryLoss | None
    step: int | None
    """The best answer. None: the log leaves it open."""
    earliest: int | None
    latest: int | None
    """What cannot be excluded. None: nothing is known."""
    certain: bool
    """The step follows from the log without any estimate."""
    fits: bool
    """Whether a candidate explains the logged value within the scatter."""
    best: Candidate | None = None
    runner_up: Candidate | None = None
    """The nearest candidate of another step."""
    candidates: tuple[Candidate, ...] = ()
    """All that fit, the best first if there is one; else by step."""
    tried_accumulation: int | None = None
    """The largest that was tried, when it is not known."""


def without_formula(window: LoggedWindow, span: Span | None, step: int | None) -> FirstNaN:
    """The answer where the log shows the step itself, or (``step`` None) no more than its window."""
    first, last = (step, step) if step is not None else (span.first, span.last) if span else (None, None)
    return FirstNaN(window, span, None, None, step, first, last, certain=step is not None, fits=True)


def at_the_latest(window: LoggedWindow, span: Span | None) -> FirstNaN:
    """The answer where only the last step of a window is known to be bad."""
    last = span.last if span else None
    alone = span is not None and span.length == 1
    step = last if alone else None
    return FirstNaN(window, span, None, None, step, step, last, certain=alone, fits=True)


@dataclass(frozen=True, slots=True)
class Search:
    """One window to be explained, and what is known for it."""

    log: TrainingLog
    window: LoggedWindow
    span: Span
    accumulation: int | None
    ordinary: OrdinaryLoss | None
    gradient_is_bad: bool
    """The norm of the window's last step is not finite, so NaN began in the window at the latest."""

    def solve(self) -> FirstNaN:
        """The steps in which NaN may have begun."""
        known, tried = self.accumulation, self._accumulations()
        if not tried or (known is None and math.isinf(self.window.loss)):
            return without_formula(self.window, self.span, None)
        found = [candidate for count in tried for candidate in self._fitting(count)]
        limit = None if known else tried[-1]
        if known and not found and self.ordinary is not None and math.isfinite(self.window.loss):
            return self._answer(self._nearest(known), fits=False, limit=limit)
        return self._answer(found, fits=bool(found), limit=limit)

    def loss_is_ordinary(self) -> bool:
        """Whether the window's loss is one that the windows before it, or mere guessing, explain."""
        if self.ordinary is None:
            return self.window.loss <= LOSS_OF_GUESSING
        _, wanted = self._wanted(0)
        return wanted(0.0, 0.0, self.span.length)

    def least_overflowing_accumulation(self) -> int | None:
        """The smallest accumulation with which the filter could have made an infinite loss here."""
        return next((count for count in self._accumulations() if self._fitting(count)), None)

    def _accumulations(self) -> range:
        most = MOST_MICRO_BATCHES // self.span.length
        if self.accumulation is None:
            return range(1, min(MOST_ACCUMULATION, most) + 1)
        return range(self.accumulation, self.accumulation + 1) if self.accumulation <= most else range(0)

    def _answer(self, found: list[Candidate], *, fits: bool, limit: int | None) -> FirstNaN:
        steps = sorted({candidate.beginning.step for candidate in found})
        best = None
        if self.accumulation and found and all(c.log_error is not None for c in found):
            whole = [c for c in found if c.beginning.pattern in WHOLE_STEPS]
            # Weights that broke in a step make every loss from the next step on NaN, so a beginning at a
            # step's first micro-batch is the common one: it is preferred where the scatter allows it.
            best = min(whole if whole and fits else found, key=error_size)
        step = best.beginning.step if best else steps[0] if len(steps) == 1 else None
        certain = self.gradient_is_bad and self.span.length == 1
        if certain:
            # An entry of one step, and its gradient is bad: no arithmetic is needed.
            step, steps = self.span.last, [self.span.last]
        others = self._nearest(self.accumulation) if best and self.accumulation else []
        others = [c for c in others if c.beginning.step != step]
        return FirstNaN(
            window=self.window,
            span=self.span,
            accumulation=self.accumulation,
            ordinary=self.ordinary,
            step=step,
            earliest=steps[0] if steps else self.span.first,
            latest=steps[-1] if steps else self.span.last,
            certain=certain,
            fits=fits,
            best=best,
            runner_up=min(others, key=error_size, default=None),
            candidates=tuple(sorted(found, key=lambda c: (c is not best, c.beginning.step, error_size(c)))),
            tried_accumulation=limit,
        )

    def _fitting(self, accumulation: int) -> list[Candidate]:
        sizes = micro_batches(self.log, self.span, accumulation)
        target, wanted = self._wanted(sum(sizes))
        found = beginnings(self.span.first - 1, sizes, accumulation, target, wanted)
        return [self._candidate(beginning) for beginning in found]

    def _nearest(self, accumulation: int) -> list[Candidate]:
        """One candidate a step, the nearest, whether or not it fits."""
        sizes = micro_batches(self.log, self.span, accumulation)
        target, _ = self._wanted(sum(sizes))
        every = beginnings(self.span.first - 1, sizes, accumulation, target, lambda *_: True)
        nearest: dict[int, Candidate] = {}
        for candidate in sorted(map(self._candidate, every), key=error_size):
            nearest.setdefault(candidate.beginning.step, candidate)
        return list(nearest.values())

    def _wanted(self, micro_batch_count: int) -> tuple[float, Wanted]:
        """The log factor to look for, and which ones explain the window."""
        window, ordinary, length = self.window, self.ordinary, self.span.length
        if math.isinf(window.loss):
            # The sum outgrew float32. Without a level, a first loss as high as guessing is allowed for.
            level = ordinary.level if ordinary else LOSS_OF_GUESSING
            bound = FLOAT32_LARGEST_LOG - math.log(level) - math.log(length)
            return math.inf, lambda low, high, steps: high >= bound - self._slack(steps, 0.0)
        rounding = micro_batch_count * FLOAT32_STEP + window.loss_rounding / window.loss
        logged = math.log(window.loss)
        if ordinary is None:
            lowest = logged - math.log(LOSS_OF_GUESSING) - rounding
            highest = logged - math.log(LOWEST_FIRST_LOSS) + rounding
            return (lowest + highest) / 2, lambda low, high, _: high >= lowest and low <= highest
        target = logged - math.log(ordinary.level)

        def wanted(low: float, high: float, finite_steps: float) -> bool:
            slack = self._slack(finite_steps, rounding)
            return low - slack <= target <= high + slack

        return target, wanted

    def _slack(self, finite_steps: float, rounding: float) -> float:
        if self.ordinary is None:
            return rounding
        return self.ordinary.tolerance(self.span.length, finite_steps, SIGMAS) + rounding

    def _candidate(self, beginning: Beginning) -> Candidate:
        factor, logged = beginning.log_factor, self.window.loss
        if beginning.pattern == "after_the_window" and self.gradient_is_bad:
            # Every loss of the window was finite and its last gradient was not: that step is the first.
            beginning = replace(beginning, step=self.span.last)
        if math.isinf(logged):
            return Candidate(beginning, None, None, None)
        implied = _exponential(math.log(logged) - factor)
        if self.ordinary is None:
            return Candidate(beginning, None, None, implied)
        predicted = math.log(self.ordinary.level) + factor
        return Candidate(beginning, _exponential(predicted), predicted - math.log(logged), implied)


def error_size(candidate: Candidate) -> float:
    """How far off a prediction is, in logarithms; 0 where there is none."""
    return abs(candidate.log_error) if candidate.log_error is not None else 0.0


def _exponential(value: float) -> float | None:
    """e**value; None where that is no number that a float64 holds."""
    return math.exp(value) if -700 < value < 700 else None
