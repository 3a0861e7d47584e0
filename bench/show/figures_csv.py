"""Every figure of every backend as CSV: median, spread, ratio to the baseline, interval, rank.

One figure of one backend a line, raw: missing is empty, and NaN and Infinity are written out. The runs
themselves are in the CSV of ``bench.show.tables``.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

from bench.judge.comparison import Comparison
from bench.judge.intervals import LEVEL
from bench.judge.ranking import Standing
from bench.judge.scaler import spelt
from bench.show.escaping import cell_text

COLUMNS = (
    "group", "label", "figure", "runs", "median", "lowest", "highest", "baseline", "pairs", "ratio",
    "ratio_low", "ratio_high", "level", "rank", "tied",
)  # fmt: skip


def figures_csv(comparison: Comparison) -> str:
    """Every figure of every backend that completed, raw; missing is empty."""
    import pandas

    lines = [dict(zip(COLUMNS, map(_raw, line), strict=True)) for line in _figures(comparison)]
    frame = pandas.DataFrame(lines, columns=list(COLUMNS), dtype=object)
    return frame.to_csv(index=False, lineterminator="\n", na_rep="")


def _figures(comparison: Comparison) -> Iterator[tuple[object, ...]]:
    for place, group in enumerate(comparison.groups, start=1):
        for summary in group.summaries:
            for field, spread in summary.figures.items():
                standing = group.standing(field, summary.label) or Standing(None)
                ratio = standing.ratio
                interval = ratio.interval if ratio else None
                yield (
                    place, summary.label, field, spread.runs, spread.median, spread.low, spread.high,
                    group.baseline if ratio else None, ratio.pairs if ratio else None,
                    ratio.estimate if ratio else None, interval.low if interval else None,
                    interval.high if interval else None, LEVEL if interval else None, standing.rank,
                    None if standing.rank is None else standing.tied,
                )  # fmt: skip


def _raw(value: object) -> str | None:
    if isinstance(value, float) and not math.isfinite(value):
        return spelt(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, str):
        return cell_text(value)
    return None if value is None else repr(value) if isinstance(value, float) else str(value)
