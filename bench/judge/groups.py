"""Completed runs that are alike (``bench.judge.alike``): medians over repeats, best marks.

Figures are compared within a group only.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bench.judge.alike import Difference, find_alike
from bench.judge.rows import Row, median
from bench.judge.stability import GRAVITY, Verdict

FIGURES: Mapping[str, Literal["lowest", "highest"] | None] = {
    "storage_bits_per_weight": "lowest",
    "load_seconds": "lowest",
    "reload_seconds": "lowest",
    "step_seconds_median": "lowest",
    "tokens_per_second": "highest",
    "peak_memory_bytes": "lowest",
    "first_loss": None,
    "last_loss": None,
    "gradient_norm_median": None,
    "gradient_norm_max": None,
}
"""Row field -> its better end. Losses and gradient norms have none: so few steps are no training result."""


@dataclass(frozen=True)
class Spread:
    """A figure over the runs of one backend."""

    median: float
    low: float
    high: float
    runs: int


@dataclass(frozen=True)
class Summary:
    """The runs of one label: all completed ones of a group, or a single one that did not complete."""

    label: str
    rows: tuple[Row, ...]
    figures: Mapping[str, Spread]
    """Row field -> its spread; a field that no run has is absent."""
    verdict: Verdict
    """The gravest of the runs."""


@dataclass(frozen=True)
class Group:
    """Completed runs that are alike."""

    summaries: tuple[Summary, ...]
    best: Mapping[str, tuple[str, ...]]
    """Row field -> labels that have its lowest (or highest) value; empty where all are equal."""
    differences: tuple[Difference, ...] = ()
    """What sets it apart from the largest group."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every run of the group."""
        return tuple(row for summary in self.summaries for row in summary.rows)


def find_groups(completed: Sequence[Row], allow: Collection[str] = ()) -> tuple[Group, ...]:
    """Partition completed runs into alike ones, largest group first; ``allow``: what may differ."""
    return tuple(
        replace(_group(alike.rows), differences=alike.differences) for alike in find_alike(completed, allow)
    )


# ---- medians and marks ---------------------------------------------------------------------------


def _group(rows: Sequence[Row]) -> Group:
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row.label, []).append(row)
    summaries = tuple(summarize(label, members) for label, members in by_label.items())
    return Group(summaries, {field: _best(summaries, field) for field, end in FIGURES.items() if end})


def summarize(label: str, rows: Sequence[Row]) -> Summary:
    """Median, lowest and highest over ``rows`` of every figure that any of them has."""
    figures = {}
    for field in FIGURES:
        values = [value for row in rows if (value := getattr(row, field)) is not None]
        middle = median(values)
        if middle is not None:
            known = not math.isnan(middle)
            low, high = (min(values), max(values)) if known else (math.nan, math.nan)
            figures[field] = Spread(middle, low, high, len(values))
    return Summary(label, tuple(rows), figures, _gravest(rows))


def _gravest(rows: Sequence[Row]) -> Verdict:
    worst = min((row.verdict for row in rows), key=lambda verdict: GRAVITY.index(verdict.verdict))
    if len(rows) == 1:
        return worst
    share = sum(row.verdict.verdict == worst.verdict for row in rows)
    return Verdict(worst.verdict, f"{share} of {len(rows)} runs: {worst.reason}")


def _best(summaries: Sequence[Summary], field: str) -> tuple[str, ...]:
    values = {
        summary.label: spread.median
        for summary in summaries
        if (spread := summary.figures.get(field)) is not None and math.isfinite(spread.median)
    }
    # A lowest needs something to be lower than.
    if len(set(values.values())) < 2:
        return ()
    end = min(values.values()) if FIGURES[field] == "lowest" else max(values.values())
    return tuple(label for label, value in values.items() if value == end)
