"""Curves of several runs as one: a line at their median and a band from the lowest to the highest of them.

``band_of(runs, logarithmic=...)`` merges them place by place and ``draw_band`` draws what comes out; one run
alone is a line. What has no place on the scale is a marker on the edge, and the line has a gap there: a value
that is not finite is neither left out nor averaged away.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.show.drawing import SMALLEST_DRAWN, has_place
from bench.show.owners import owner_id
from bench.show.styles import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

PALE = 0.2
"""Opacity of a band."""
CROSS_STEP = 0.055
"""Each curve's crosses a little higher than those of the one before, as a share of the axes."""


@dataclass(frozen=True)
class Band:
    """The runs of one kind, place by place (a step, or a layer)."""

    runs: int
    places: tuple[int, ...]
    median: tuple[float, ...]
    """NaN where one of the runs has no value that has a place on the scale."""
    low: tuple[float, ...]
    """Of those that have a place; NaN: none has."""
    high: tuple[float, ...]
    broken: tuple[int, ...]
    """Places where a run is not finite, or too large for any scale."""
    below: tuple[int, ...]
    """Places where a run lies below all that has a place on a logarithmic scale, as zero does."""

    @property
    def drawn(self) -> tuple[float, ...]:
        """Every value that has a place on the scale, as far as the axis must reach."""
        return tuple(value for value in (*self.low, *self.high) if not math.isnan(value))


def band_of(runs: Sequence[Mapping[int, float | None]], *, logarithmic: bool) -> Band:
    """Merge ``runs``, each of which maps places to values; None: the run has no value there."""
    places = sorted({place for run in runs for place in run})
    columns = [[value for run in runs if (value := run.get(place)) is not None] for place in places]
    kept = [[v for v in column if has_place(v, logarithmic=logarithmic)] for column in columns]

    def is_below(value: float) -> bool:
        return logarithmic and math.isfinite(value) and value < SMALLEST_DRAWN

    def is_broken(value: float) -> bool:
        return not is_below(value) and not has_place(value, logarithmic=logarithmic)

    return Band(
        runs=len(runs),
        places=tuple(places),
        median=tuple(
            statistics.median(placed) if placed and len(placed) == len(column) else math.nan
            for placed, column in zip(kept, columns, strict=True)
        ),
        low=tuple(min(placed, default=math.nan) for placed in kept),
        high=tuple(max(placed, default=math.nan) for placed in kept),
        broken=_where(places, columns, is_broken),
        below=_where(places, columns, is_below),
    )


def _where(places: Sequence[int], columns: Sequence[Sequence[float]], holds: Any) -> tuple[int, ...]:
    return tuple(place for place, column in zip(places, columns, strict=True) if any(map(holds, column)))


def draw_band(axes: Axes, band: Band, style: Style, label: str, crossed: int, size: float = 6.0) -> Line2D:
    """Draw one kind of run and give its line for the legend.

    ``crossed``: how many curves before this one have crosses on the edge. ``size``: of markers, in points.
    """
    whose = owner_id(label)
    look: Any = {"color": style.color, "marker": style.marker, "ls": style.line, "ms": size, "gid": whose}
    (line,) = axes.plot(band.places, band.median, **look)
    if band.runs > 1:
        known = [not math.isnan(value) for value in band.low]
        pale: Any = {"color": style.color, "alpha": PALE, "lw": 0, "gid": whose}
        axes.fill_between(band.places, band.low, band.high, where=known, **pale)
    edge_markers(axes, band.broken, 1.0 + CROSS_STEP * crossed, "x", style, whose)
    edge_markers(axes, band.below, 0.0, "v", style, whose)
    return line


def edge_markers(
    axes: Axes, places: Sequence[int], height: float, marker: str, style: Style, whose: str
) -> None:
    """Markers on an edge of the plot, for values that have no place on its scale."""
    if places:
        big: Any = {"ls": "", "ms": 9, "mew": 2.2, "clip_on": False, "gid": whose}
        where = axes.get_xaxis_transform()
        axes.plot(places, [height] * len(places), marker=marker, color=style.color, transform=where, **big)
