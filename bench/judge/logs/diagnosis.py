"""What happened in a training that another program logged, and at which optimizer step NaN began.

``diagnose(log)`` gives one word, the sentence that carries it, the step of the first NaN as far as the log
determines it, two flags, and what was assumed.

    finite         nothing in the log speaks against the run
    spiking        finite, with values far above those before them (bench.judge.logs.spikes)
    dead           the gradient norm is exactly 0, or the loss does not change at all
    filtered_nan   NaN, which the Trainer's filter hid behind a loss of 0.0 (bench.judge.logs.filtered_loss)
    non_finite     NaN or infinity stands in the log itself: in the loss, or in the gradient norm alone
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from bench.errors import BadValue
from bench.judge.logs.first_nan import FirstNaN
from bench.judge.logs.flags import Flags, flags_since, flags_without_nan
from bench.judge.logs.nan_in_log import Case, find_nan
from bench.judge.logs.spikes import SPIKE_DEVIATIONS, SPIKE_FACTOR, Spike, spikes
from bench.judge.logs.windows import Windows, lay_out
from bench.record.logs.logged_values import LoggedWindow
from bench.record.logs.training_log import TrainingLog

LogVerdict = Literal["finite", "spiking", "dead", "filtered_nan", "non_finite"]

FLAT_WINDOWS = 3
"""Chosen: entries of one and the same loss, to the last digit; fewer are not called flat."""
DEAD_WINDOWS = 2
"""Chosen: entries at the end of a log whose gradient norm is exactly 0."""

SKIPPED_CAN_SPIKE = (
    "a single step with NaN whose update was skipped can look like this, too: the NaN filter raises the loss "
    "of its entry"
)


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """Everything that was concluded from a log."""

    log: TrainingLog
    windows: Windows
    verdict: LogVerdict
    reason: str
    """In one sentence."""
    flags: Flags
    first_nan: FirstNaN | None
    """None: the log shows no NaN."""
    began: int | None
    """Place of the first window that has to do with NaN. None: there is none."""
    spikes: tuple[Spike, ...]
    """Those before the NaN."""
    notes: tuple[str, ...]
    """What was assumed, and what else should be known."""


def diagnose(
    log: TrainingLog,
    logging_steps: int | None = None,
    accumulation: int | None = None,
    finite_loss: float | None = None,
) -> Diagnosis:
    """Diagnose a log.

    ``logging_steps`` (optimizer steps between entries) and ``accumulation`` (micro-batches per optimizer
    step) are needed only where the log does not have them; ``finite_loss`` is the loss before the NaN, for
    a log that does not show it. Raises BadValue where one of them contradicts the log or is no loss.
    """
    if accumulation is not None and log.accumulation not in (None, accumulation):
        raise BadValue(
            f"--accumulation {accumulation} contradicts '{log.path}', which says {log.accumulation}",
            "leave it out",
        )
    if finite_loss is not None and not 0 < finite_loss < math.inf:
        raise BadValue(f"--finite-loss {finite_loss} is no loss", "give a number above 0")
    laid_out = lay_out(log, logging_steps)
    notes = (*log.notes, *laid_out.notes)
    found = find_nan(Case(log, laid_out, accumulation or log.accumulation, finite_loss))
    if found is not None:
        return Diagnosis(
            log=log,
            windows=laid_out,
            verdict=found.verdict,
            reason=found.reason,
            flags=flags_since(log.windows, found.began),
            first_nan=found.first_nan,
            began=found.began,
            spikes=spikes(log.windows[: found.began]),
            notes=(*notes, *found.notes),
        )
    standing_out = spikes(log.windows)
    verdict, reason = _of_finite_values(log.windows, standing_out)
    if any(spike.quantity == "loss" for spike in standing_out):
        notes = (*notes, SKIPPED_CAN_SPIKE)
    return Diagnosis(log, laid_out, verdict, reason, flags_without_nan(), None, None, standing_out, notes)


def _of_finite_values(
    windows: Sequence[LoggedWindow], standing_out: Sequence[Spike]
) -> tuple[LogVerdict, str]:
    if (reason := _why_dead(windows)) is not None:
        return "dead", reason
    if standing_out:
        worst = max(standing_out, key=lambda spike: spike.factor)
        return "spiking", (
            f"{len(standing_out)} values stand out by {SPIKE_DEVIATIONS} deviations and {SPIKE_FACTOR} times "
            f"or more; the largest, a {worst.quantity} of {worst.value:.4g} at {worst.window.where}, is "
            f"{worst.factor:.3g} times the median before it"
        )
    norms = any(window.gradient_norm is not None for window in windows)
    what = "every loss and gradient norm" if norms else "every loss (the log has no gradient norm)"
    return "finite", f"{what} of {len(windows)} entries is finite, and none stands out"


def _why_dead(windows: Sequence[LoggedWindow]) -> str | None:
    """Why nothing is learned: gradients of exactly zero, or a loss that never changes. None: it is."""
    zeros = 0
    for window in reversed(windows):
        if window.gradient_norm != 0:
            break
        zeros += 1
    if zeros >= min(DEAD_WINDOWS, len(windows)):
        first = windows[len(windows) - zeros]
        return f"the gradient norm is exactly 0 in the last {zeros} entries, from {first.where} on"
    norms = any(window.gradient_norm is not None for window in windows)
    if norms or len(windows) < FLAT_WINDOWS or len({window.loss for window in windows}) > 1:
        return None
    return f"the loss is {windows[0].loss:.6g} in all {len(windows)} entries; the log has no gradient norm"
