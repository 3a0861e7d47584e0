"""Dots and whiskers: the ratio of every backend to the baseline with its interval; needs repeats."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from bench.judge.comparison import Comparison
from bench.judge.groups import Group
from bench.judge.intervals import LEVEL, NOISE_MARGIN, Ratio
from bench.show.columns import number
from bench.show.drawing import INK, LONGEST_OF_LINES, Plot, elided, finish, name_lines, new_figure
from bench.show.marks import rank_in_words
from bench.show.owners import owner_id
from bench.show.styles import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes

PLOTTED: Mapping[str, tuple[str, str]] = {
    "step_seconds_median": ("ratio-step-time", "Step time"),
    "peak_memory_bytes": ("ratio-peak-memory", "Peak memory"),
    "load_seconds": ("ratio-load-time", "Load time"),
}
"""Figure -> name and title of its plot. Tokens/s are the step time upside down."""
NARROW = 1.02
"""A scale never covers less than from 1/this to this: a hair's breadth must look like one."""
FARTHEST = 1e6
"""Nor more than this: two runs of which one was held up can have intervals of any width."""


def ratio_plots(comparison: Comparison, styles: Mapping[str, Style]) -> Iterator[Plot]:
    """The plots of the largest group in which ratios have intervals."""
    for group in comparison.groups:
        drawn = [plot for field in PLOTTED if (plot := _plot(group, field, styles))]
        if drawn:
            yield from drawn
            return


def _plot(group: Group, field: str, styles: Mapping[str, Style]) -> Plot | None:
    standings = group.rankings[field].standings
    ratios = {
        label: one.ratio
        for label, one in standings.items()
        if label in styles and one.ratio is not None and math.isfinite(one.ratio.estimate)
    }
    if not any(ratio.interval and label != group.baseline for label, ratio in ratios.items()):
        return None
    name, title = PLOTTED[field]
    with new_figure(0.75 + 0.36 * len(ratios)) as (figure, axes):
        axes.set_xscale("log")
        axes.axvspan(1 / (1 + NOISE_MARGIN), 1 + NOISE_MARGIN, color=INK, alpha=0.1, lw=0)
        axes.axvline(1, color=INK, lw=1)
        for place, (label, ratio) in enumerate(ratios.items()):
            style, whose = styles[label], owner_id(label)
            if ratio.interval:
                # What lies beyond the scale is drawn up to its edge.
                ends = [max(ratio.interval.low, 1 / FARTHEST), min(ratio.interval.high, FARTHEST)]
                axes.plot(ends, [place] * 2, color=style.color, lw=2.4, solid_capstyle="butt", gid=whose)
                axes.plot(ends, [place] * 2, ls="", marker="|", ms=9, mew=2, color=style.color, gid=whose)
            axes.plot([ratio.estimate], [place], ls="", marker=style.marker, color=style.color, gid=whose)
            rank = rank_in_words(standings[label])
            beside = f"{number(ratio.estimate)}{f'  #{rank}' if rank else ''}"
            at: Any = {"xycoords": ("axes fraction", "data"), "va": "center", "gid": whose}
            axes.annotate(beside, (1.01, place), **at)
        name_lines(axes, list(ratios), list(ratios))
        _frame(axes, ratios)
        against = elided(group.baseline, LONGEST_OF_LINES)
        axes.set_xlabel(f"ratio to {against} (log scale; bar: {100 * LEVEL:g} % interval; #: rank)")
        words = f"{title} as a ratio to {group.baseline}, with {100 * LEVEL:g} % intervals. "
        return finish(figure, name, f"{title} against {against}", words + _said(ratios, group))


def _frame(axes: Axes, ratios: Mapping[str, Ratio]) -> None:
    """A scale that holds every finite end, 1 included, with ticks that are read as numbers."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    ends = [1.0, NARROW, 1 / NARROW]
    for ratio in ratios.values():
        ends += [ratio.estimate, *((ratio.interval.low, ratio.interval.high) if ratio.interval else ())]
    placed = [end for end in ends if 1 / FARTHEST < end < FARTHEST]
    low, high = min(placed), max(placed)
    room = (high / low) ** 0.04
    axes.set_xlim(low / room, high * room)
    wide = high / low > 20
    axes.xaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)) if wide else MaxNLocator(nbins=6))
    axes.xaxis.set_minor_locator(NullLocator())
    axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))


def _said(ratios: Mapping[str, Ratio], group: Group) -> str:
    parts = []
    for label, ratio in ratios.items():
        if label == group.baseline:
            continue
        ends = ratio.interval
        beside = f" ({number(ends.low)} to {number(ends.high)})" if ends else " (no interval)"
        parts.append(f"{label} {number(ratio.estimate)}{beside}")
    return "; ".join(parts) + "."
