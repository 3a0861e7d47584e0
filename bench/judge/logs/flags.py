"""Two things that a log shows indirectly: were the trained weights poisoned, and was every update skipped?

The learning rate tells: a scheduler advances only with an update that was applied (transformers,
``Trainer._run_epoch``: ``if not self.accelerator.optimizer_step_was_skipped``). float16 training uses a
loss scaler that skips an update whose gradients are not finite; without one the optimizer applies it, and
AdamW then writes NaN into every trainable tensor. Each answer is yes, no, or cannot be told, with a reason.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bench.judge.logs.ordinary_loss import is_ordinary
from bench.record.logs.logged_values import LoggedWindow

WINDOWS_THAT_MOVED = 3
"""Differences of the learning rate before the NaN that are looked at."""
UNFILTERED_WINDOWS = 3
"""Chosen: a loss once NaN stays NaN in an unfiltered log, so there only gradient norms speak of later steps,
one step a window; this many in a row that are not finite are taken for all."""
ASK_THE_WEIGHTS = (
    "look whether the saved adapter is finite: torch.isfinite(tensor).all() of each tensor in "
    "adapter_model.safetensors"
)
ASK_THE_SCHEDULE = (
    "lr_scheduler_type of the run: with a schedule that changes, a rate that stands still means that no "
    "update was applied"
)


@dataclass(frozen=True, slots=True)
class Flag:
    """Yes, no, or (None) cannot be told."""

    value: bool | None
    reason: str
    would_tell: str | None = None
    """What would, if it cannot be told."""


@dataclass(frozen=True, slots=True)
class Flags:
    """Both answers."""

    poisoned: Flag
    """The trained weights are not finite any more."""
    skipped: Flag
    """Every update since the NaN was skipped, as float16's loss scaler does."""


def flags_without_nan() -> Flags:
    """For a log in which nothing is NaN."""
    return Flags(
        Flag(False, "no loss and no gradient norm in the log is NaN or infinite"),
        Flag(False, "no gradient norm in the log is NaN or infinite"),
    )


def flags_since(windows: Sequence[LoggedWindow], began: int) -> Flags:
    """For a log in which the windows from ``began`` on have to do with NaN."""
    since, before = windows[began:], windows[:began]
    if (back := next((window for window in since[1:] if _is_healthy_again(window)), None)) is not None:
        reason = f"at {back.where} loss and gradient norm are finite again"
        return Flags(Flag(False, reason), Flag(False, f"{reason}, so updates were applied"))
    rate = _rate_since(since, before)
    if rate == "advances":
        return _flags_of_applied_updates(since)
    if rate in ("stands", "at_zero"):
        words = "is still 0, where its warm-up begins" if rate == "at_zero" else "stands still since the NaN"
        return Flags(
            Flag(False, f"the learning rate {words}: the loss scaler skipped every update"),
            Flag(True, f"the learning rate {words}, and it advances with every applied update"),
        )
    return Flags(
        Flag(None, "the log does not show whether updates were applied", ASK_THE_WEIGHTS),
        Flag(None, _why_unknown(since), ASK_THE_SCHEDULE),
    )


def _flags_of_applied_updates(since: Sequence[LoggedWindow]) -> Flags:
    moved = "the learning rate goes on changing, so updates were applied"
    if any(is_ordinary_loss(window) for window in since[1:]):
        return Flags(
            Flag(False, "whole windows after it have an ordinary loss"),
            Flag(False, f"{moved}, though not necessarily all of them"),
        )
    unfiltered = any(not math.isfinite(window.loss) for window in since)
    norms = sum(window.gradient_norm is not None for window in since)
    if unfiltered and norms < UNFILTERED_WINDOWS:
        reason = f"{moved}; but a loss once NaN stays NaN in this log, and {norms} gradient norms are too few"
        return Flags(Flag(None, reason, ASK_THE_WEIGHTS), Flag(False, moved))
    return Flags(
        Flag(True, f"{moved}, with gradients that are not finite: AdamW writes NaN into every weight"),
        Flag(False, moved),
    )


def is_ordinary_loss(window: LoggedWindow) -> bool:
    """Whether the loss alone is finite and above 0, whatever the gradient norm."""
    return math.isfinite(window.loss) and window.loss > 0


def _is_healthy_again(window: LoggedWindow) -> bool:
    norm = window.gradient_norm
    # A loss once NaN stays NaN in an unfiltered log whatever happens, so a finite norm is enough.
    return is_ordinary(window) or (norm is not None and math.isfinite(norm))


def _rate_since(
    since: Sequence[LoggedWindow], before: Sequence[LoggedWindow]
) -> Literal["advances", "stands", "at_zero"] | None:
    """How the learning rate behaves since the NaN. None: it is not known, or it was constant all along."""
    rates = [window.learning_rate for window in since]
    known = [rate for rate in rates if rate is not None]
    if len(known) < len(rates) or len(known) < 2:
        return None
    if len(set(known)) > 1:
        return "advances"
    earlier = [window.learning_rate for window in before][-WINDOWS_THAT_MOVED - 1 :]
    if known[0] == 0:
        # A decay that has ended is at 0, too, and says nothing.
        return None if any(earlier) else "at_zero"
    changes = [one != other for one, other in itertools.pairwise(earlier)]
    return "stands" if changes and all(changes) else None


def _why_unknown(since: Sequence[LoggedWindow]) -> str:
    if all(window.learning_rate is None for window in since):
        return "the log has no learning rate"
    if len(since) < 2:
        return "only one entry since the NaN"
    return "the learning rate does not change in this log, before the NaN or after it"
