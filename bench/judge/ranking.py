"""Where each backend of a group stands: its ratio to the baseline, and a rank that says no more than the
intervals do.

``rank_figure(values, baseline, end, margin)`` compares one figure. A backend's rank is 1 plus the number of
backends that are surely better; where intervals overlap, none is, and they tie.

Two backends tie where their intervals overlap as they are shown. That is strict: each interval must hold its
own miss, so equal backends are set apart far more rarely than once in twenty times (Schenker and Gentleman
2001, "On Judging the Significance of Differences by Examining the Overlap Between Confidence Intervals", The
American Statistician 55(3)). The baseline has no interval of its own, for its ratio is 1 by definition; so
against it the others' intervals are widened until all of them hold at once with the probability `LEVEL`
(Bonferroni's correction). Without that one of eight equal backends would be set apart in every fourth session
with exact figures (tests/test_ranking.py simulates it).
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.errors import UserError, unknown
from bench.judge.intervals import LEVEL, Interval, Ratio, paired_ratios

End = Literal["lowest", "highest"]


@dataclass(frozen=True)
class Standing:
    """Where one backend stands in one figure."""

    ratio: Ratio | None
    """To the baseline, over the repeats that both completed. None: they share none."""
    rank: int | None = None
    """1 plus the number of backends that are surely better. None: the figure has no better end, or there is
    no interval (one run, or a value that is not finite)."""
    tied: bool = False
    """Whether at least one other backend cannot be told apart from it."""


@dataclass(frozen=True)
class Ranking:
    """All backends of a group in one figure."""

    standings: Mapping[str, Standing]
    """By label; a label that has no such figure is absent."""
    resolution: float | None = None
    """How far from the baseline a backend must have been to be ranked apart, as a factor above 1: half of
    the median widened interval, with the margin. None: nothing was ranked."""

    @property
    def best(self) -> tuple[str, ...] | None:
        """Everyone in the first place; empty where that is everyone ranked. None: nothing was ranked."""
        ranks = {label: one.rank for label, one in self.standings.items() if one.rank is not None}
        if not ranks:
            return None
        first = tuple(label for label, rank in ranks.items() if rank == 1)
        return first if len(first) < len(ranks) else ()


def rank_figure(
    values: Mapping[str, Mapping[int, float]], baseline: str, end: End | None, margin: float
) -> Ranking:
    """Compare one figure of several backends.

    ``values``: label -> repeat -> the figure. ``end``: which is better, None where neither is. ``margin``:
    how close two may be and still tie (0.01: 1 %).
    """
    base = values.get(baseline, {})
    pairs = {
        label: [(value, base[repeat]) for repeat, value in sorted(own.items()) if repeat in base]
        for label, own in values.items()
    }
    shared = {label: found for label, found in pairs.items() if found}
    ratios = dict(zip(shared, paired_ratios(list(shared.values())), strict=True))
    known = [label for label, ratio in ratios.items() if ratio.interval is not None]
    if end is None or len(known) < 2:
        return Ranking({label: Standing(ratios.get(label)) for label in values})
    level = 1 - (1 - LEVEL) / (len(known) - 1)
    widened = paired_ratios([shared[label] for label in known], level)
    wide = {label: ratio.interval for label, ratio in zip(known, widened, strict=True) if ratio.interval}
    shown = {label: ratio.interval for label, ratio in ratios.items() if ratio.interval}
    standings = {}
    for label in values:
        ratio = ratios.get(label)
        if label not in shown:
            standings[label] = Standing(ratio)
            continue
        met = [
            (wide[label], wide[other]) if baseline in (label, other) else (shown[label], shown[other])
            for other in shown
            if other != label
        ]
        apart = [(own, other) for own, other in met if not own.overlaps(other, margin)]
        better = sum((other.high < own.low) == (end == "lowest") for own, other in apart)
        standings[label] = Standing(ratio, 1 + better, len(apart) < len(met))
    others = [interval for label, interval in wide.items() if label != baseline]
    return Ranking(standings, statistics.median(_half(one) * (1 + margin) for one in others))


def _half(interval: Interval) -> float:
    """Half of an interval of a ratio, as a factor."""
    return math.sqrt(interval.high / interval.low) if 0 < interval.low < interval.high else 1.0


def choose_baseline(labels: Sequence[str], wanted: str | None, default: str) -> str:
    """The label that a group is compared with: the wanted one, else ``default``'s first, else the first."""
    if wanted is not None and wanted in labels:
        return wanted
    return next((label for label in labels if label.partition(" (")[0] == default), labels[0])


def check_baseline(wanted: str, completed: Sequence[str], failed: Sequence[str]) -> None:
    """Raise UserError where ``wanted`` is no label of a run that completed."""
    if wanted in completed:
        return
    if wanted in failed or not completed:
        raise UserError(
            f"baseline '{wanted}' has no completed run",
            f"completed: {', '.join(dict.fromkeys(completed)) or 'none'}",
        )
    raise unknown("baseline", wanted, dict.fromkeys(completed))
