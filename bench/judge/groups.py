"""Completed runs that are alike (``bench.judge.alike``): medians over repeats, ratios and ranks.

Figures are compared within a group only.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bench.ask.reference import REFERENCE_BACKEND
from bench.judge.alike import Difference, find_alike
from bench.judge.intervals import NOISE_MARGIN
from bench.judge.ranking import Ranking, Standing, choose_baseline, rank_figure
from bench.judge.rows import Row, median
from bench.judge.scaler import failing_steps
from bench.judge.stability import BAD, GRAVITY, Verdict
from bench.record.schema import Step

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
EXACT = ("storage_bits_per_weight",)
"""Counted, not measured: any difference is one."""


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

    @property
    def failing_step(self) -> Step | None:
        """The first step of any run that was not finite, in earnest, whatever the verdict: synthetic weights
        leave that open, and a loss of NaN trains nothing with any weights."""
        return next((step for row in self.rows for step in failing_steps(row.record.steps)), None)

    @property
    def sound(self) -> bool:
        """Whether nothing is known to have broken the training."""
        return self.verdict.verdict not in BAD and self.failing_step is None


@dataclass(frozen=True)
class Group:
    """Completed runs that are alike."""

    summaries: tuple[Summary, ...]
    best: Mapping[str, tuple[str, ...]]
    """Row field -> everyone in the first place. Where nothing is ranked: who has the lowest (or highest)
    median. Empty where nobody differs."""
    baseline: str
    """The label that ratios are to."""
    rankings: Mapping[str, Ranking]
    """Row field -> where each label stands."""
    differences: tuple[Difference, ...] = ()
    """What sets it apart from the largest group."""

    @property
    def rows(self) -> tuple[Row, ...]:
        """Every run of the group."""
        return tuple(row for summary in self.summaries for row in summary.rows)

    @property
    def ranked(self) -> bool:
        """Whether there are enough repeats for any rank."""
        return any(ranking.best is not None for ranking in self.rankings.values())

    def standing(self, field: str, label: str) -> Standing | None:
        """Where a label stands in a figure; None where it does not have it."""
        ranking = self.rankings.get(field)
        return ranking.standings.get(label) if ranking else None


def find_groups(
    completed: Sequence[Row], allow: Collection[str] = (), baseline: str | None = None
) -> tuple[Group, ...]:
    """Partition completed runs into alike ones, largest group first.

    ``allow``: what may differ. ``baseline``: the label that ratios are to, in the groups that have it.
    """
    return tuple(
        replace(_group(alike.rows, baseline), differences=alike.differences)
        for alike in find_alike(completed, allow)
    )


# ---- medians and marks ---------------------------------------------------------------------------


def _group(rows: Sequence[Row], wanted: str | None) -> Group:
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        by_label.setdefault(row.label, []).append(row)
    summaries = tuple(summarize(label, members) for label, members in by_label.items())
    baseline = choose_baseline(list(by_label), wanted, REFERENCE_BACKEND)
    rankings = {field: _ranking(summaries, field, baseline) for field in FIGURES}
    best = {field: rankings[field].best for field, end in FIGURES.items() if end}
    return Group(
        summaries,
        {field: _extreme(summaries, field) if first is None else first for field, first in best.items()},
        baseline,
        rankings,
    )


def _ranking(summaries: Sequence[Summary], field: str, baseline: str) -> Ranking:
    values = {
        summary.label: {row.repeat: v for row in summary.rows if (v := getattr(row, field)) is not None}
        for summary in summaries
        if field in summary.figures
    }
    return rank_figure(values, baseline, FIGURES[field], 0.0 if field in EXACT else NOISE_MARGIN)


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


def _extreme(summaries: Sequence[Summary], field: str) -> tuple[str, ...]:
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
