"""Which optimizer steps each window of a foreign log speaks of, and how many micro-batches those had.

Both follow from the log alone: a Trainer divides by the steps since its last entry, so the distance between
entries counts, not ``logging_steps``; and an epoch that is not a multiple of the accumulation ends with a
shorter step, which shows in the epochs. Used by ``bench.judge.logs.first_nan``.
"""

from __future__ import annotations

import itertools
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from bench.errors import BadValue
from bench.record.logs.logged_values import LoggedWindow
from bench.record.logs.training_log import TrainingLog

EPOCH_AGREES = 1e-9
"""Relative. Epochs stored in full are fractions of whole numbers, so they agree to the last bits; for
printed ones their rounding comes on top."""
MOST_BATCHES = 1e12
"""Per epoch; beyond it an epoch count is a damaged number."""


@dataclass(frozen=True, slots=True)
class Span:
    """The optimizer steps of a window: ``first`` to ``last``, counted from 1."""

    first: int
    last: int

    @property
    def length(self) -> int:
        """Optimizer steps in it."""
        return self.last - self.first + 1


@dataclass(frozen=True, slots=True)
class Windows:
    """Where the windows of a log lie."""

    spans: tuple[Span | None, ...]
    """One a window. None: the log does not tell, and nobody said."""
    logging_steps: int | None
    notes: tuple[str, ...] = ()
    """What was assumed."""


def lay_out(log: TrainingLog, logging_steps: int | None) -> Windows:
    """Where the windows lie. ``logging_steps`` is what a person said, if anything.

    Raises BadValue if the steps in the file contradict it.
    """
    steps = [window.step for window in log.windows if window.step is not None]
    if len(steps) == len(log.windows):
        return _from_steps(log, steps, logging_steps)
    stated = logging_steps or log.logging_steps
    if stated is None:
        return Windows((None,) * len(log.windows), None)
    spans = tuple(Span(place * stated + 1, (place + 1) * stated) for place in range(len(log.windows)))
    note = (
        f"the log has no step numbers: its entries are taken for those of steps {stated}, {2 * stated}, ..."
    )
    return Windows(spans, stated, (note,))


def _from_steps(log: TrainingLog, steps: Sequence[int], said: int | None) -> Windows:
    distances = Counter(after - before for before, after in itertools.pairwise(steps))
    usual = distances.most_common(1)[0][0] if distances else None
    if said is not None and usual is not None and usual != said:
        raise BadValue(
            f"--logging-steps {said} contradicts '{log.path}', whose entries are {usual} steps apart",
            "leave it out",
        )
    length = said or usual or log.logging_steps or steps[0]
    # A log may begin in the middle of a run; its first window is then taken for an ordinary one.
    before = [max(0, steps[0] - length), *steps]
    notes: tuple[str, ...] = ()
    if steps[0] > length:
        notes = (f"the log begins at step {steps[0]}: its first entry is taken for one of {length} steps",)
    spans = tuple(Span(start + 1, end) for start, end in itertools.pairwise(before))
    return Windows(tuple(span if span.length > 0 else None for span in spans), length, notes)


def micro_batches(log: TrainingLog, span: Span, accumulation: int) -> list[int]:
    """Micro-batches of each step of a window: ``accumulation``, or fewer where an epoch ends.

    Source: the last optimizer step of an epoch takes the batches that remain (transformers 4.46 and later,
    ``Trainer._run_epoch``). The epochs in the log show how many those are; where they fit no whole
    number of batches, or more than one, every step is taken for a full one.
    """
    batches = _batches_per_epoch(log, accumulation)
    rest = batches % accumulation if batches else 0
    if batches is None or not rest:
        return [accumulation] * span.length
    steps = _steps_per_epoch(batches, accumulation)
    return [rest if step % steps == 0 else accumulation for step in range(span.first, span.last + 1)]


def _steps_per_epoch(batches: int, accumulation: int) -> int:
    return -(-batches // accumulation)


def _batches_per_epoch(log: TrainingLog, accumulation: int) -> int | None:
    """Micro-batches in an epoch, if one whole number and no other explains every epoch that was logged."""
    logged = [window for window in log.windows if window.step and window.epoch and window.epoch > 0]
    low, high = 1.0, MOST_BATCHES
    for window in logged:
        if window.step and window.epoch and window.epoch + window.epoch_rounding < 1:
            done, slack = window.step * accumulation, window.epoch_rounding + EPOCH_AGREES * window.epoch
            low = max(low, done / (window.epoch + slack))
            high = min(high, done / (window.epoch - slack)) if window.epoch > slack else high
    # ``low`` may be infinite: epochs in a damaged log may be anything.
    if high == MOST_BATCHES or low > high:
        return None
    batches = math.ceil(low)
    if batches > high or batches + 1 <= high:
        return None
    return batches if all(_agrees(window, batches, accumulation) for window in logged) else None


def _agrees(window: LoggedWindow, batches: int, accumulation: int) -> bool:
    if window.step is None or window.epoch is None:
        return True
    whole, more = divmod(window.step, _steps_per_epoch(batches, accumulation))
    expected = whole + more * accumulation / batches
    return abs(window.epoch - expected) <= window.epoch_rounding + EPOCH_AGREES * expected
