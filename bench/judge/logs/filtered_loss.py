"""What transformers' NaN filter makes of a loss: the arithmetic, and every beginning of NaN that explains it.

With ``logging_nan_inf_filter=True`` (the default) ``Trainer`` keeps one float32 sum a logging window. A
micro-batch with finite loss adds its share of the step's loss. One whose loss is NaN or infinite adds
(trainer.py, "if loss is nan or inf simply add the average of previous logged losses"):

    total += total / (1 + global_step - step_of_the_last_log)

and the window is logged as ``total / N``, N its optimizer steps. ``global_step`` counts finished steps, so
each NaN micro-batch of step i of the window (from 1) multiplies the sum by (i + 1)/i: the divisor is a
number of steps where the sum grew by micro-batches, which is why accumulation lets the loss explode.

Let the steps have loss L, G micro-batches each, and s steps pass before. Then what is logged is

    NaN from a step's first micro-batch on   L/N * s                                     * ((N+1)/(s+1))**G
    NaN after m micro-batches of that step   L/N * (s + m/G) * ((s+2)/(s+1))**(G-m)      * ((N+1)/(s+2))**G
    one NaN micro-batch after m, and all     L/N * ((s + m/G) * (s+2)/(s+1) + (G-1-m)/G) * ((N+1)/(s+2))**G
      of the steps after (broken weights)

The first is 0.0 for s = 0. Where an epoch ends within the window its last step has fewer micro-batches,
so the products are taken step by step (``sizes``) instead of as powers. The recursion is the same in
transformers 4.44.2, 4.46.3, 4.57.1 and 5.24.0 (read), and was measured with 5.24.0
(tests/test_diagnose_real_trainer.py). What a micro-batch adds differs between versions by a constant
factor only, which is in L, too. Logarithms are used throughout: 255**8 is an ordinary factor here.
"""

from __future__ import annotations

import bisect
import itertools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

FLOAT32_LARGEST_LOG = math.log(3.4028234663852886e38)
"""Beyond it the Trainer's sum becomes infinite. That is logged as inf, and then as NaN for ever: the sum
is reset by subtracting it from itself."""

Pattern = Literal["from_a_step", "within_a_step", "one_micro_batch", "after_the_window"]
"""Where NaN began: with a step's first micro-batch; with a later one; in one micro-batch alone, whose step
then broke the weights; or not in the loss of this window at all."""
WHOLE_STEPS: tuple[Pattern, ...] = ("from_a_step", "after_the_window")


@dataclass(frozen=True, slots=True)
class Beginning:
    """One way in which NaN may have begun in a window, and what the window then logs."""

    pattern: Pattern
    accumulation: int
    step: int
    """Optimizer step of the run, from 1, with the first loss that is not finite."""
    micro_batch: int
    """Which of that step's, from 1."""
    finite_steps: float
    """Steps' worth of finite loss before it."""
    log_factor: float
    """Natural logarithm of logged loss over L."""


Wanted = Callable[[float, float, float], bool]
"""``wanted(lowest, highest, finite_steps)``: whether log factors in this range are of interest, where at
least ``finite_steps`` steps of finite loss are behind them."""


def beginnings(
    start: int, sizes: Sequence[int], accumulation: int, target: float, wanted: Wanted
) -> Iterator[Beginning]:
    """The beginnings of NaN in a window that log more than 0.0: one for each step and pattern.

    It is the one whose micro-batch brings the log factor nearest to ``target``, and it is left out if it is
    not ``wanted``. ``start`` is the optimizer steps done before the window, ``sizes`` the micro-batches of
    each of its steps.
    """
    length = len(sizes)
    if wanted(0.0, 0.0, length):
        # Every loss of the window was finite; the next step's is the first that is not.
        yield Beginning("after_the_window", accumulation, start + length + 1, 1, length, 0.0)
    for place, (size, growth) in enumerate(zip(sizes, _growth_after_each_step(sizes), strict=True)):
        step = _Step(place, size, growth - math.log(length))
        for pattern, micro_batch, finite_steps, log_factor in step.beginnings(target, wanted):
            number = start + place + 1
            yield Beginning(pattern, accumulation, number, micro_batch + 1, finite_steps, log_factor)


@dataclass(frozen=True, slots=True)
class _Step:
    """A step in which NaN may begin. Micro-batches are counted from 0 here."""

    place: int
    """Steps of the window before it."""
    size: int
    """Its micro-batches."""
    rest: float
    """Logarithm of what happens to the sum after it, the division by the window's length included."""

    def beginnings(self, target: float, wanted: Wanted) -> Iterator[tuple[Pattern, int, float, float]]:
        """Pattern, micro-batch, steps of finite loss and log factor of the nearest beginning of each kind."""
        place, size = self.place, self.size
        if place and wanted(value := self._from(0), value, place):
            yield "from_a_step", 0, place, value
        if size == 1:
            # A step of one micro-batch has nothing within it.
            return
        # ``_from`` never grows with the micro-batch and ``_alone`` always does: their ends bound them, and
        # the nearest is found by halving.
        if wanted(self._from(size - 1), self._from(1), place + 1 / size):
            nearest = _nearest(range(size - 1, 0, -1), self._from, target)
            value, done = self._from(nearest), place + nearest / size
            if wanted(value, value, done):
                yield "within_a_step", nearest, done, value
        done = place + (size - 1) / size
        if wanted(self._alone(0), self._alone(size - 1), done):
            nearest = _nearest(range(size), self._alone, target)
            value = self._alone(nearest)
            if wanted(value, value, done):
                yield "one_micro_batch", nearest, done, value

    def _from(self, micro_batch: int) -> float:
        """Log factor when this micro-batch and all after it are NaN."""
        grown = (self.size - micro_batch) * math.log((self.place + 2) / (self.place + 1))
        return math.log(self.place + micro_batch / self.size) + grown + self.rest

    def _alone(self, micro_batch: int) -> float:
        """Log factor when of this step only this micro-batch is NaN, and all of the steps after it."""
        grown = (self.place + micro_batch / self.size) * (self.place + 2) / (self.place + 1)
        return math.log(grown + (self.size - 1 - micro_batch) / self.size) + self.rest


def _nearest(choices: range, value: Callable[[int], float], target: float) -> int:
    """The choice whose value is nearest to the target; values do not fall along the choices."""
    after = bisect.bisect_left(choices, target, key=value)
    around = choices[max(0, after - 1) : after + 1]
    return min(around, key=lambda choice: abs(value(choice) - target))


def _growth_after_each_step(sizes: Sequence[int]) -> list[float]:
    """Place of a step -> logarithm of how the sum grows in the later steps when all of their loss is NaN."""
    growth = [size * math.log((place + 2) / (place + 1)) for place, size in enumerate(sizes)]
    return list(itertools.accumulate(reversed(growth[1:]), initial=0.0))[::-1]
