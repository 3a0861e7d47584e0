"""Figures of single steps: times as strips of dots, loss and gradient norm as curves. ``bench.show.plots``
draws them; what has no place on a scale is a marker on the edge, never left out."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.judge.rows import Row, step_loss
from bench.record.schema import Step
from bench.show.columns import number
from bench.show.drawing import (
    INK,
    SMALLEST_DRAWN,
    Plot,
    Style,
    finish,
    has_place,
    height_with_legend,
    legend_below,
    name_lines,
    new_figure,
)
from bench.show.wording import ended, extremes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

Styles = Mapping[str, Style]

# ---- times ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantity:
    """What a strip of dots shows: one dot for each measured step, a bar for the figure of the run."""

    name: str
    title: str
    axis: str
    of_step: Callable[[Step], float]
    of_run: Callable[[Row], float | None]
    unit: str


STEP_TIME = Quantity(
    "step-time",
    "Seconds per optimizer step",
    "seconds per optimizer step (bar: median)",
    lambda step: step.seconds,
    lambda row: row.step_seconds_median,
    "s at the median of the measured steps",
)
THROUGHPUT = Quantity(
    "throughput",
    "Tokens per second",
    "non-padding tokens per second (bar: all measured steps)",
    lambda step: step.tokens / step.seconds if step.seconds > 0 else math.nan,
    lambda row: row.tokens_per_second,
    "non-padding tokens/s over all measured steps",
)


def strip(rows: Sequence[Row], styles: Styles, quantity: Quantity) -> Plot | None:
    """A line of dots for each run that has the quantity."""
    middles = {row: middle for row in rows if (middle := quantity.of_run(row)) is not None}
    if not middles:
        return None
    with new_figure(0.7 + 0.36 * len(middles)) as (figure, axes):
        for place, (row, middle) in enumerate(middles.items()):
            style = styles[row.label]
            seen = [quantity.of_step(step) for step in row.record.steps if not step.warmup]
            dots = [value if has_place(value) else math.nan for value in seen]
            # Fanned out in the order of the steps, so that no dot hides another.
            heights = [place + 0.5 * ((dot + 0.5) / len(dots) - 0.5) for dot in range(len(dots))]
            axes.plot(dots, heights, ls="", marker=style.marker, mfc="none", color=style.color)
            if has_place(middle):
                bar = [place - 0.34, place + 0.34]
                axes.plot([middle, middle], bar, color=INK, lw=2, solid_capstyle="butt")
            axes.annotate(number(middle), (1.01, place), xycoords=("axes fraction", "data"), va="center")
        name_lines(axes, [ended(row.name, row) for row in middles])
        axes.set_xlabel(quantity.axis)
        axes.set_xlim(left=0)
        named = {ended(row.name, row): middle for row, middle in middles.items()}
        text = f"{quantity.title}. {extremes(named, number, quantity.unit)}"
        return finish(figure, quantity.name, quantity.title, text)


# ---- curves --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """What is drawn over the steps, warm-up included."""

    name: str
    title: str
    axis: str
    words: str
    value: Callable[[Step], float]
    logarithmic: bool

    def has_place(self, value: float) -> bool:
        """Whether a value can be drawn on the scale."""
        return has_place(value, logarithmic=self.logarithmic)

    def is_below(self, value: float) -> bool:
        """Whether it lies below all that has a place on a logarithmic scale."""
        return self.logarithmic and math.isfinite(value) and value < SMALLEST_DRAWN


LOSS = Curve("loss", "Loss", "mean loss per loss token (nats)", "Loss of each step", step_loss, False)
GRADIENT_NORM = Curve(
    "gradient-norm",
    "Gradient norm",
    "gradient norm (log scale)",
    "Gradient norm of each step, before clipping",
    lambda step: step.gradient_norm,
    True,
)


def curves(rows: Sequence[Row], styles: Styles, curve: Curve) -> Plot | None:
    """A line for each run; what has no place on the scale is a marker on the edge."""
    series = {
        row: {step.index: curve.value(step) for step in row.record.steps if step.losses} for row in rows
    }
    series = {row: values for row, values in series.items() if values}
    if not series:
        return None
    names = {ended(row.label, row) for row in series}
    with new_figure(height_with_legend(names)) as (figure, axes):
        axes.set_yscale("log" if curve.logarithmic else "linear")
        # Repeats share a style, so the first line of each label stands for all in the legend.
        legend: dict[str, Line2D] = {}
        crossed = 0
        for row, values in series.items():
            style = styles[row.label]
            drawn = [value if curve.has_place(value) else math.nan for value in values.values()]
            (line,) = axes.plot(list(values), drawn, color=style.color, marker=style.marker, ls=style.line)
            legend.setdefault(ended(row.label, row), line)
            below = [index for index, value in values.items() if curve.is_below(value)]
            off = [index for index, value in values.items() if not curve.has_place(value)]
            broken = [index for index in off if index not in below]
            # Each run a little higher than the one before: crosses of two runs must not cover each other.
            edge_markers(axes, broken, 1.0 + 0.055 * crossed, "x", style)
            edge_markers(axes, below, 0.0, "v", style)
            crossed += bool(broken)
        _frame_steps(axes, rows)
        placed = [v for values in series.values() for v in values.values() if curve.has_place(v)]
        frame_values(axes, placed, logarithmic=curve.logarithmic)
        axes.set_ylabel(curve.axis)
        legend_below(figure, legend)
        return finish(figure, curve.name, curve.title, f"{curve.words}. {_ends(series)}")


def edge_markers(axes: Axes, steps: Sequence[int], height: float, marker: str, style: Style) -> None:
    """Markers on an edge of the plot, for values that have no place on its scale."""
    if not steps:
        return
    heights, where = [height] * len(steps), axes.get_xaxis_transform()
    big: dict[str, Any] = {"ls": "", "ms": 9, "mew": 2.2, "clip_on": False}
    axes.plot(steps, heights, marker=marker, color=style.color, transform=where, **big)


def _frame_steps(axes: Axes, rows: Sequence[Row]) -> None:
    from matplotlib.ticker import MaxNLocator

    axes.set_xlabel("optimizer step (shaded: warm-up)")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
    warm = [step.index for row in rows for step in row.record.steps if step.warmup]
    if warm:
        axes.axvspan(min(warm) - 0.5, max(warm) + 0.5, color=INK, alpha=0.06, lw=0)


def frame_values(axes: Axes, placed: Sequence[float], *, logarithmic: bool) -> None:
    """Ticks of the vertical axis for the values ``placed`` on it."""
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator

    if not placed:
        # Nothing finite leaves no scale: an axis with made-up numbers would be worse than none.
        axes.set_yscale("linear")
        axes.set_yticks([])
    elif logarithmic:
        # Within one decade the powers of ten would leave a single tick.
        wide = max(placed) / min(placed) > 20
        axes.yaxis.set_major_locator(LogLocator(subs=(1.0, 3.0)) if wide else MaxNLocator(nbins=6))
        axes.yaxis.set_minor_locator(NullLocator())
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:.4g}"))


def _ends(series: Mapping[Row, Mapping[int, float]]) -> str:
    parts = []
    for row, found in series.items():
        values = list(found.values())
        bad = sum(not math.isfinite(value) for value in values)
        text = f"{ended(row.name, row)} from {number(values[0])} to {number(values[-1])}"
        parts.append(f"{text}, {bad} of {len(values)} steps not finite" if bad else text)
    return "; ".join(parts) + "."
