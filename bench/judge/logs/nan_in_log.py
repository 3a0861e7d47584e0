"""NaN in a foreign log: in the loss itself, behind the filter's zeros, or in the gradient norm alone.

``find_nan(case)`` gives what happened, the window in which it began, and the step as far as it follows.
Used by ``bench.judge.logs.diagnosis``, which judges the logs that have none of it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.judge.logs.first_nan import FirstNaN, Search, at_the_latest, without_formula
from bench.judge.logs.flags import is_ordinary_loss
from bench.judge.logs.ordinary_loss import OrdinaryLoss, ordinary_loss
from bench.judge.logs.windows import Windows
from bench.judge.scaler import spelt
from bench.record.logs.logged_values import LoggedWindow
from bench.record.logs.training_log import TrainingLog

NOT_ROUNDED_TO_ZERO = 0.01
"""A loss of 0.0 beside a missing gradient norm counts as the filter's if the losses before it were at least
this: 200 times what transformers 4 rounds to 0.0 (5e-5), so it did not get there by learning."""

STAYS_NAN = (
    "once a logged loss is NaN every later entry is NaN, whatever the steps do: the Trainer resets its sum "
    "by subtracting it from itself. Only the gradient norms speak of later steps"
)
OVERFLOW_OR_REAL = (
    "a loss that is really infinite looks the same with the filter off; logging_nan_inf_filter tells"
)
ZERO_WITHOUT_NORM = (
    "the log has no gradient norm: a loss that is really 0 (no label to learn from) looks the same"
)
NEXT_ENTRY_TELLS = (
    "it is the last entry: a loss of 0.0 in the next one would mean that the weights are lost, an ordinary "
    "loss that the update was skipped"
)
LAST_STEP_ONLY = (
    "a logged gradient norm is that of an entry's last step; other steps may have been bad before"
)


@dataclass(frozen=True, slots=True)
class Case:
    """A log, where its windows lie, and what a person said about it."""

    log: TrainingLog
    laid_out: Windows
    accumulation: int | None
    """Micro-batches per optimizer step."""
    finite_loss: float | None
    """The loss before the NaN, if a person said it."""

    @property
    def windows(self) -> Sequence[LoggedWindow]:
        """Those of the log."""
        return self.log.windows

    def ordinary(self, place: int) -> OrdinaryLoss | None:
        """The loss to expect of a window, from those before it."""
        return ordinary_loss(self.windows[:place], self.finite_loss)

    def search(self, place: int) -> Search | None:
        """The search for the first NaN in a window. None: its steps are not known."""
        span, window = self.laid_out.spans[place], self.windows[place]
        if span is None:
            return None
        return Search(self.log, window, span, self.accumulation, self.ordinary(place), norm_is_bad(window))


@dataclass(frozen=True, slots=True)
class NanFinding:
    """NaN in a log."""

    verdict: Literal["filtered_nan", "non_finite"]
    reason: str
    began: int
    """Place of the first window that has to do with it."""
    first_nan: FirstNaN
    notes: tuple[str, ...] = ()


def find_nan(case: Case) -> NanFinding | None:
    """What there is of NaN or infinity in a log, the plainest evidence first; None: nothing."""
    return _visible(case) or _zeros(case) or _raised(case) or _norms(case)


def norm_is_bad(window: LoggedWindow) -> bool:
    """Whether a gradient norm was logged that is not finite."""
    return window.gradient_norm is not None and not math.isfinite(window.gradient_norm)


def _norm_is_good(window: LoggedWindow) -> bool:
    return window.gradient_norm is not None and math.isfinite(window.gradient_norm)


def _first(windows: Sequence[LoggedWindow], holds: Callable[[LoggedWindow], bool]) -> int | None:
    return next((place for place, window in enumerate(windows) if holds(window)), None)


def _visible(case: Case) -> NanFinding | None:
    """NaN or infinity in the loss itself."""
    place = _first(case.windows, lambda window: not math.isfinite(window.loss))
    if place is None:
        return None
    window = case.windows[place]
    reason, notes = (
        f"the loss is {spelt(window.loss)} at {window.where}: no NaN filter was at work",
        [STAYS_NAN],
    )
    search = case.search(place) if window.loss == math.inf else None
    if search is not None and case.accumulation:
        found = search.solve()
        if found.candidates:
            reason = (
                f"the loss is Infinity at {window.where}: with {case.accumulation} micro-batches a step the "
                "NaN filter lets the Trainer's float32 sum overflow"
            )
            return NanFinding("filtered_nan", reason, place, found, (OVERFLOW_OR_REAL, STAYS_NAN))
    elif search is not None and (least := search.least_overflowing_accumulation()) is not None:
        reason = f"the loss is Infinity at {window.where}"
        notes.append(f"from an accumulation of {least} on the NaN filter itself can make it infinite")
    found = without_formula(window, case.laid_out.spans[place], None)
    return NanFinding("non_finite", reason, place, found, tuple(notes))


def _zeros(case: Case) -> NanFinding | None:
    """The filter's fingerprint: a loss of exactly 0.0 without a good gradient norm."""
    windows = case.windows
    zero = _first(windows, lambda window: window.loss == 0 and not _norm_is_good(window))
    if zero is None:
        return None
    window, span = windows[zero], case.laid_out.spans[zero]
    before = windows[zero - 1] if zero else None
    notes: tuple[str, ...] = ()
    if not norm_is_bad(window):
        level = case.ordinary(zero)
        if level is not None and level.level < NOT_ROUNDED_TO_ZERO:
            return None
        notes = (ZERO_WITHOUT_NORM,)
    norm = "" if window.gradient_norm is None else f" with a gradient norm of {spelt(window.gradient_norm)}"
    reason = (
        f"the loss is exactly 0.0{norm} at {window.where}: the NaN filter left out every loss of that entry"
    )
    if before is None or _norm_is_good(before) or not is_ordinary_loss(before):
        # The last step before was good, so NaN began with the very first micro-batch of this entry.
        found = without_formula(window, span, span.first if span else None)
        return NanFinding("filtered_nan", reason, zero, found, notes)
    search = case.search(zero - 1)
    found = search.solve() if search else without_formula(before, None, None)
    after = span is not None and found.step == span.first and not norm_is_bad(before)
    return NanFinding("filtered_nan", reason, zero if after else zero - 1, found, notes)


def _raised(case: Case) -> NanFinding | None:
    """A bad gradient norm beside a loss that is finite but not the ordinary one."""
    for place, window in enumerate(case.windows):
        if not norm_is_bad(window) or not is_ordinary_loss(window):
            continue
        search = case.search(place)
        if search is None or search.loss_is_ordinary():
            continue
        reason = (
            f"the gradient norm is {_norm(window)} at {window.where}, and a loss of {window.loss:.4g} there "
            "is what the NaN filter makes of NaN"
        )
        return NanFinding("filtered_nan", reason, place, search.solve())
    return None


def _norms(case: Case) -> NanFinding | None:
    """Gradient norms that are not finite beside ordinary losses."""
    place = _first(case.windows, norm_is_bad)
    if place is None:
        return None
    window, span = case.windows[place], case.laid_out.spans[place]
    bad = sum(norm_is_bad(window) for window in case.windows)
    reason = (
        f"the gradient norm is {_norm(window)} at {window.where} while the loss is ordinary "
        f"({bad} of {len(case.windows)} entries)"
    )
    last = place == len(case.windows) - 1
    notes = (LAST_STEP_ONLY, NEXT_ENTRY_TELLS) if last else (LAST_STEP_ONLY,)
    return NanFinding("non_finite", reason, place, at_the_latest(window, span), notes)


def _norm(window: LoggedWindow) -> str:
    return "missing" if window.gradient_norm is None else spelt(window.gradient_norm)
