"""What the loss would have been without the NaN: a level and a scatter, from the windows before.

``ordinary_loss(windows)`` is used by ``bench.judge.logs.first_nan`` to compare what a window logged with what
it should have logged. Where the log has too little before the NaN, it says what was assumed instead.
"""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass

from bench.record.logs.logged_values import LoggedWindow

LEVEL_WINDOWS = 3
"""The level is their median: few, because a loss falls; more than one, because it scatters."""
SCATTER_WINDOWS = 8
SCATTER_NEEDS = 3
"""Windows: two differences are the fewest whose size means anything."""
ASSUMED_SCATTER = 0.1
"""Where it cannot be measured: a tenth of the loss. Assumed, not measured, and shown as such."""
LARGEST_SCATTER = 0.5
"""Chosen: what fewer steps can add to it. A long window's scatter is drift rather than noise, and would be
blown up without limit by the rule for noise."""


@dataclass(frozen=True, slots=True)
class OrdinaryLoss:
    """The loss of a window in which nothing is wrong."""

    level: float
    level_from: str
    """Where the level comes from, in words."""
    scatter: float
    """Root mean square of ln(loss of a window / loss of the window before), and of what rounding may hide.
    It holds noise and trend."""
    scatter_from: str
    scatter_is_measured: bool

    def tolerance(self, window_length: int, finite_steps: float, sigmas: float) -> float:
        """How far the logarithm of a loss over ``finite_steps`` steps may lie from that of the level.

        A mean over fewer steps than a window has scatters more, as one over the square root of their number
        (up to LARGEST_SCATTER; an assumed scatter is left as it is). The level itself is about as uncertain
        as one window.
        """
        few = self.scatter
        if self.scatter_is_measured:
            few = max(few, min(few * math.sqrt(window_length / finite_steps), LARGEST_SCATTER))
        return sigmas * math.hypot(self.scatter, few)


def is_ordinary(window: LoggedWindow) -> bool:
    """Whether a window shows a loss to compare with: finite, above 0, its gradient norm not bad."""
    norm = window.gradient_norm
    return math.isfinite(window.loss) and window.loss > 0 and (norm is None or math.isfinite(norm))


def ordinary_loss(windows: Sequence[LoggedWindow], said: float | None) -> OrdinaryLoss | None:
    """From the windows before the NaN, oldest first, and what a person said the loss was. None: neither."""
    usable = [window for window in windows if is_ordinary(window)][-SCATTER_WINDOWS:]
    assumed = f"assumed: fewer than {SCATTER_NEEDS} windows before it to measure a scatter from"
    measured = len(usable) >= SCATTER_NEEDS
    if measured:
        logs = [math.log(window.loss) for window in usable]
        squares = [(after - before) ** 2 for before, after in itertools.pairwise(logs)]
        hidden = max(window.loss_rounding / window.loss for window in usable)
        scatter = math.hypot(math.sqrt(statistics.fmean(squares)), hidden)
        scatter_from = f"measured between the {len(usable)} windows before"
    else:
        scatter, scatter_from = ASSUMED_SCATTER, assumed
    if said is not None:
        return OrdinaryLoss(said, "given", scatter, scatter_from, measured)
    if not usable:
        return None
    last = usable[-LEVEL_WINDOWS:]
    level = statistics.median(window.loss for window in last)
    words = "the window before" if len(last) == 1 else f"median of the {len(last)} windows before"
    return OrdinaryLoss(level, words, scatter, scatter_from, measured)
