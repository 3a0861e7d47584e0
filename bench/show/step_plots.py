"""Figures of single steps: times as strips of dots, loss and gradient norm as curves. ``bench.show.plots``
draws them; what has no place on a scale is a marker on the edge, never left out."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.judge.rows import Row, median, step_loss
from bench.record.schema import Step
from bench.show.bands import Band, band_of, draw_band
from bench.show.columns import number
from bench.show.drawing import (
    INK,
    Plot,
    finish,
    has_place,
    height_with_legend,
    legend_below,
    name_lines,
    new_figure,
)
from bench.show.owners import owner_id
from bench.show.styles import Style
from bench.show.wording import ended, extremes

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

Styles = Mapping[str, Style]
RUNS_ALONE = 24
"""Runs that have a line of their own; of more, all runs of one kind share one."""
SPREAD = " Of several runs: the line is their median, the band reaches from the lowest to the highest."

# ---- times ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Quantity:
    """What a strip of dots shows: one dot for each measured step, a bar for the figure of the run."""

    name: str
    title: str
    axis: str
    bar: str
    """What the bar is, where a line is one run."""
    of_step: Callable[[Step], float]
    of_run: Callable[[Row], float | None]
    unit: str


STEP_TIME = Quantity(
    "step-time",
    "Seconds per optimizer step",
    "seconds per optimizer step",
    "bar: median",
    lambda step: step.seconds,
    lambda row: row.step_seconds_median,
    "s at the median of the measured steps",
)
THROUGHPUT = Quantity(
    "throughput",
    "Tokens per second",
    "non-padding tokens per second",
    "bar: all measured steps",
    lambda step: step.tokens / step.seconds if step.seconds > 0 else math.nan,
    lambda row: row.tokens_per_second,
    "non-padding tokens/s over all measured steps",
)


def strip(rows: Sequence[Row], styles: Styles, quantity: Quantity) -> Plot | None:
    """A line of dots for each run that has the quantity; for each kind of run where there are too many."""
    measured = {row: value for row in rows if (value := quantity.of_run(row)) is not None}
    alone = len(measured) <= RUNS_ALONE
    lines = [_of_run(*pair, quantity) for pair in measured.items()] if alone else _by_kind(measured)
    if not lines:
        return None
    with new_figure(0.7 + 0.36 * len(lines)) as (figure, axes):
        for place, line in enumerate(lines):
            style, whose = styles[line.label], owner_id(line.label)
            # Fanned out in their order, so that no dot hides another.
            count = len(line.dots)
            dots = [value if has_place(value) else math.nan for value in line.dots]
            heights = [place + 0.5 * ((dot + 0.5) / count - 0.5) for dot in range(count)]
            look: Any = {"marker": style.marker, "mfc": "none", "color": style.color, "gid": whose}
            axes.plot(dots, heights, ls="", **look)
            bar: Any = {"color": INK, "lw": 2, "solid_capstyle": "butt", "gid": whose}
            if has_place(line.middle):
                axes.plot([line.middle] * 2, [place - 0.34, place + 0.34], **bar)
            at: Any = {"xycoords": ("axes fraction", "data"), "va": "center", "gid": whose}
            axes.annotate(number(line.middle), (1.01, place), **at)
        name_lines(axes, [line.name for line in lines], [line.label for line in lines])
        axes.set_xlabel(f"{quantity.axis} ({quantity.bar if alone else 'dot: one run; bar: their median'})")
        axes.set_xlim(left=0)
        named = {line.name: line.middle for line in lines}
        text = f"{quantity.title}. {extremes(named, number, quantity.unit)}"
        return finish(figure, quantity.name, quantity.title, text)


@dataclass(frozen=True)
class DotLine:
    """One horizontal line of dots, and the bar that stands for them."""

    label: str
    name: str
    dots: Sequence[float]
    middle: float


def _of_run(row: Row, value: float, quantity: Quantity) -> DotLine:
    dots = [quantity.of_step(step) for step in row.record.steps if not step.warmup]
    return DotLine(row.label, ended(row.name, row), dots, value)


def _by_kind(measured: Mapping[Row, float]) -> list[DotLine]:
    """A dot for each run of a kind."""
    kinds: dict[tuple[str, str], list[float]] = {}
    for row, value in measured.items():
        kinds.setdefault((row.label, ended(row.label, row)), []).append(value)
    return [DotLine(*kind, values, statistics.median(values)) for kind, values in kinds.items()]


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
    """A line for each kind of run, with a band where it was repeated."""
    kinds = kinds_of([row for row in rows if any(step.losses for step in row.record.steps)])
    if not kinds:
        return None
    bands = {
        name: band_of([_series(row, curve) for row in members], logarithmic=curve.logarithmic)
        for name, members in kinds.items()
    }
    with new_figure(height_with_legend(kinds)) as (figure, axes):
        axes.set_yscale("log" if curve.logarithmic else "linear")
        legend: dict[str, Line2D] = {}
        crossed = 0
        for name, band in bands.items():
            label = kinds[name][0].label
            legend[name] = draw_band(axes, band, styles[label], label, crossed)
            crossed += bool(band.broken)
        _frame_steps(axes, [row for members in kinds.values() for row in members])
        placed = [value for band in bands.values() for value in band.drawn]
        frame_values(axes, placed, logarithmic=curve.logarithmic)
        axes.set_ylabel(curve.axis)
        legend_below(figure, legend)
        told = "; ".join(_ends(name, kinds[name], band, curve) for name, band in bands.items())
        spread = SPREAD if any(band.runs > 1 for band in bands.values()) else ""
        return finish(figure, curve.name, curve.title, f"{curve.words}. {told}.{spread}")


def kinds_of(rows: Sequence[Row]) -> dict[str, list[Row]]:
    """Label, with the outcome where it is no completion -> its runs."""
    kinds: dict[str, list[Row]] = {}
    for row in rows:
        kinds.setdefault(ended(row.label, row), []).append(row)
    return kinds


def _series(row: Row, curve: Curve) -> dict[int, float | None]:
    return {step.index: curve.value(step) for step in row.record.steps if step.losses}


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


def _ends(name: str, rows: Sequence[Row], band: Band, curve: Curve) -> str:
    broken, places = len(band.broken), len(band.places)
    if len(rows) > 1:
        series = [_series(row, curve) for row in rows]
        # Of the values themselves: one that has no place on the axis, such as 0 on a logarithm, is a value.
        first, last = (
            median([value for run in series if (value := run.get(place)) is not None])
            for place in (band.places[0], band.places[-1])
        )
        text = f"{name}, {len(rows)} runs, from {number(first)} to {number(last)}"
        return f"{text}, {broken} of {places} steps not finite in one or more" if broken else text
    values = tuple(_series(rows[0], curve).values())
    text = f"{ended(rows[0].name, rows[0])} from {number(values[0])} to {number(values[-1])}"
    return f"{text}, {broken} of {places} steps not finite" if broken else text
