"""One line of a comparison of BASE with NEW: what was compared, how it changed, and what to call that.

The other modules named ``regression_*`` make them, and ``bench.show.regression`` writes them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from bench.judge.intervals import Interval

Result = Literal["worse", "incomparable", "better", "changed", "untold", "same"]
"""``worse``, ``better``: beyond the limit. ``incomparable``: nothing is known, and that fails too.
``changed``: told, and no reason to fail. ``untold``: so few or so scattered runs cannot tell.
``same``: within the limit."""
Unit = Literal["s", "tokens/s", "bytes", "bits", "nats", "ratio"]


@dataclass(frozen=True)
class Finding:
    """What became of one figure, or of one thing that is no figure, from BASE to NEW."""

    label: str
    """Of the runs: backend and what tells it apart."""
    figure: str
    """The key of its limit in regression.toml, or of the gate."""
    title: str
    """What it is, in a few words."""
    result: Result
    unit: Unit | None = None
    """None: it is told in words."""
    base: tuple[float, ...] = ()
    """A value for each run (or what stands for them)."""
    new: tuple[float, ...] = ()
    base_words: str = ""
    new_words: str = ""
    factor: float | None = None
    """NEW over BASE."""
    interval: Interval | None = None
    """Of ``factor``; None: counted exactly, or too few runs."""
    difference: float | None = None
    """NEW less BASE, of figures that have no sensible ratio."""
    limit: float | None = None
    """Of ``factor`` or of ``difference``: the last value that is still allowed; None: not judged."""
    beyond: bool = False
    """Whether the estimate lies beyond the limit on the bad side, told or not."""
    note: str = ""

    @property
    def fails(self) -> bool:
        """Whether it is a reason for the comparison to fail."""
        return self.result in ("worse", "incomparable")
