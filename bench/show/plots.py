"""The comparison as figures: SVG text that goes into the page or stands alone as a file.

``plots(comparison)`` draws every figure that there is data for, runs that failed underway included. Each
figure has a sentence that says what it shows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from bench.judge.comparison import Comparison
from bench.judge.rows import TRAINING_PHASES, Row, step_loss
from bench.record.schema import Step
from bench.show.columns import GIB, gib, number, words
from bench.show.drawing import (
    INK,
    Plot,
    Style,
    assign_styles,
    box,
    finish,
    legend_below,
    name_lines,
    new_figure,
    shading,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

Styles = Mapping[str, Style]

PHASES = {"loaded": 0.25, "attached": 0.4, "forward": 0.6, "backward": 0.8, "optimizer_step": 1.0}
"""Phase -> opacity of its bar."""
KINDS = {
    "quantized_weights": ("quantized weights", 0.85, ""),
    "quantization_metadata": ("scales and other metadata", 0.55, ""),
    "unquantized_weights": ("unquantized weights", 0.25, ""),
    "lora": ("LoRA weights", 0.0, "////"),
    "gradients": ("gradients", 0.0, "\\\\\\\\"),
    "optimizer_state": ("optimizer state", 0.0, "xxxx"),
}


def plots(comparison: Comparison) -> tuple[Plot, ...]:
    """Every figure that there is data for."""
    labels = [row.label for row in comparison.rows]
    # A failed request must not take the backend's own style from one that completed.
    styles = assign_styles([row.label for row in sorted(comparison.rows, key=lambda row: not row.completed)])
    # The repeats of one backend lie together.
    rows = sorted(comparison.rows, key=lambda row: labels.index(row.label))
    drawn = (
        _memory_by_phase(rows, styles),
        _bytes_by_kind(rows),
        *(_strip(rows, styles, quantity) for quantity in (STEP_TIME, THROUGHPUT)),
        *(_curves(rows, styles, curve) for curve in (LOSS, GRADIENT_NORM)),
    )
    return tuple(plot for plot in drawn if plot is not None)


# ---- memory --------------------------------------------------------------------------------------


def _memory_by_phase(rows: Sequence[Row], styles: Styles) -> Plot | None:
    """Peak memory of the fullest device in each phase, grouped by backend."""
    peaks = {row: found for row in _first_runs(rows) if (found := _phase_peaks(row))}
    if not peaks:
        return None
    with new_figure(0.9 + 0.62 * len(peaks)) as (figure, axes):
        for place, (row, found) in enumerate(peaks.items()):
            for offset, (phase, shade) in enumerate(PHASES.items()):
                if phase in found:
                    y, width = place + 0.15 * (offset - 2), found[phase] / GIB
                    axes.barh(y, width, height=0.13, color=styles[row.label].color, alpha=shade)
            top = max(found.values())
            axes.annotate(gib(top), (top / GIB, place), (5, 0), textcoords="offset points", va="center")
        name_lines(axes, [_ended(row.label, row) for row in peaks])
        axes.set_xlabel("peak memory of the fullest device (GiB)")
        axes.set_xlim(0, 1.12 * max(max(found.values()) for found in peaks.values()) / GIB)
        legend_below(figure, {words(phase): box(color=INK, alpha=shade) for phase, shade in PHASES.items()})
        training = {
            _ended(row.label, row): max(reached)
            for row, found in peaks.items()
            if (reached := [found[phase] for phase in TRAINING_PHASES if phase in found])
        }
        text = "Peak memory by phase. " + _extremes(training, gib, "GiB in training")
        return finish(figure, "memory-by-phase", "Peak memory by phase", text)


def _phase_peaks(row: Row) -> dict[str, int]:
    readings = row.record.memory.readings
    on_card = any(reading.peak_reserved_bytes is not None for reading in readings)
    found: dict[str, int] = {}
    for reading in readings:
        peak = reading.peak_reserved_bytes if on_card else reading.peak_resident_bytes
        if peak is not None:
            found[reading.phase] = max(peak, found.get(reading.phase, 0))
    return found


def _bytes_by_kind(rows: Sequence[Row]) -> Plot | None:
    """What the tensors themselves occupy, stacked by kind, summed over the devices."""
    shown = {
        _ended(row.label, row): {kind: size or 0 for kind, size in row.tensor_bytes.items()}
        for row in _first_runs(rows)
        if row.record.memory.bytes_by_kind
    }
    if not shown:
        return None
    with new_figure(1.1 + 0.36 * len(shown)) as (figure, axes):
        for place, sizes in enumerate(shown.values()):
            left = 0.0
            for kind, (_, shade, hatch) in KINDS.items():
                if sizes[kind]:
                    axes.barh(place, sizes[kind] / GIB, 0.62, left, **shading(shade, hatch))
                    left += sizes[kind] / GIB
        name_lines(axes, list(shown))
        axes.set_xlabel("bytes of the tensors, all devices (GiB)")
        legend_below(figure, {label: box(**shading(shade, hatch)) for label, shade, hatch in KINDS.values()})
        sums = {name: sum(sizes.values()) for name, sizes in shown.items()}
        text = "Exact tensor bytes by kind. " + _extremes(sums, gib, "GiB in all")
        return finish(figure, "bytes-by-kind", "What the tensors occupy", text)


def _first_runs(rows: Sequence[Row]) -> list[Row]:
    """One run a label: memory repeats to the byte on a card, and twenty bars a backend hide it."""
    first: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: not row.completed):
        first.setdefault(row.label, row)
    return [row for row in rows if first[row.label] is row]


# ---- time ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Quantity:
    """What a strip of dots shows: one dot for each measured step, a bar for the figure of the run."""

    name: str
    title: str
    axis: str
    of_step: Callable[[Step], float]
    of_run: Callable[[Row], float | None]
    unit: str


STEP_TIME = _Quantity(
    "step-time",
    "Seconds per optimizer step",
    "seconds per optimizer step (bar: median)",
    lambda step: step.seconds,
    lambda row: row.step_seconds_median,
    "s at the median of the measured steps",
)
THROUGHPUT = _Quantity(
    "throughput",
    "Tokens per second",
    "non-padding tokens per second (bar: all measured steps)",
    lambda step: step.tokens / step.seconds if step.seconds > 0 else math.nan,
    lambda row: row.tokens_per_second,
    "non-padding tokens/s over all measured steps",
)


def _strip(rows: Sequence[Row], styles: Styles, quantity: _Quantity) -> Plot | None:
    middles = {row: middle for row in rows if (middle := quantity.of_run(row)) is not None}
    if not middles:
        return None
    with new_figure(0.7 + 0.36 * len(middles)) as (figure, axes):
        for place, (row, middle) in enumerate(middles.items()):
            style = styles[row.label]
            dots = [quantity.of_step(step) for step in row.record.steps if not step.warmup]
            # Fanned out in the order of the steps, so that no dot hides another.
            heights = [place + 0.5 * ((dot + 0.5) / len(dots) - 0.5) for dot in range(len(dots))]
            axes.plot(dots, heights, ls="", marker=style.marker, mfc="none", color=style.color)
            axes.plot([middle, middle], [place - 0.34, place + 0.34], color=INK, lw=2, solid_capstyle="butt")
            axes.annotate(number(middle), (1.01, place), xycoords=("axes fraction", "data"), va="center")
        name_lines(axes, [_ended(row.name, row) for row in middles])
        axes.set_xlabel(quantity.axis)
        axes.set_xlim(left=0)
        named = {_ended(row.name, row): middle for row, middle in middles.items()}
        text = f"{quantity.title}. {_extremes(named, number, quantity.unit)}"
        return finish(figure, quantity.name, quantity.title, text)


# ---- curves --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Curve:
    """What is drawn over the steps, warm-up included."""

    name: str
    title: str
    axis: str
    words: str
    value: Callable[[Step], float]
    logarithmic: bool

    def has_place(self, value: float) -> bool:
        """Whether a value can be drawn on the scale."""
        return math.isfinite(value) and (value > 0 or not self.logarithmic)


LOSS = _Curve("loss", "Loss", "mean loss per loss token (nats)", "Loss of each step", step_loss, False)
GRADIENT_NORM = _Curve(
    "gradient-norm",
    "Gradient norm",
    "gradient norm (log scale)",
    "Gradient norm of each step, before clipping",
    lambda step: step.gradient_norm,
    True,
)


def _curves(rows: Sequence[Row], styles: Styles, curve: _Curve) -> Plot | None:
    """A line for each run; what has no place on the scale is a marker on the edge."""
    series = {
        row: {step.index: curve.value(step) for step in row.record.steps if step.losses} for row in rows
    }
    series = {row: values for row, values in series.items() if values}
    if not series:
        return None
    with new_figure(3.7) as (figure, axes):
        axes.set_yscale("log" if curve.logarithmic else "linear")
        # Repeats share a style, so the first line of each label stands for all in the legend.
        legend: dict[str, Line2D] = {}
        crossed = 0
        for row, values in series.items():
            style = styles[row.label]
            drawn = [value if curve.has_place(value) else math.nan for value in values.values()]
            (line,) = axes.plot(list(values), drawn, color=style.color, marker=style.marker, ls=style.line)
            legend.setdefault(_ended(row.label, row), line)
            broken = [index for index, value in values.items() if not math.isfinite(value)]
            zero = [index for index, value in values.items() if value == 0 and curve.logarithmic]
            # Each run a little higher than the one before: crosses of two runs must not cover each other.
            _edge(axes, broken, 1.0 + 0.055 * crossed, "x", style)
            _edge(axes, zero, 0.0, "v", style)
            crossed += bool(broken)
        _frame_steps(axes, rows)
        placed = [v for values in series.values() for v in values.values() if curve.has_place(v)]
        _frame_values(axes, placed, logarithmic=curve.logarithmic)
        axes.set_ylabel(curve.axis)
        legend_below(figure, legend)
        return finish(figure, curve.name, curve.title, f"{curve.words}. {_ends(series)}")


def _edge(axes: Axes, steps: Sequence[int], height: float, marker: str, style: Style) -> None:
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


def _frame_values(axes: Axes, placed: Sequence[float], *, logarithmic: bool) -> None:
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


# ---- words ---------------------------------------------------------------------------------------


def _ended(name: str, row: Row) -> str:
    """A name, with the outcome where the run did not complete."""
    return name if row.completed else f"{name} ({words(row.record.status)})"


def _extremes(values: Mapping[str, float], form: Callable[[float | None], str], unit: str) -> str:
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    if not finite:
        return "No value was measured."
    low, high = min(finite, key=finite.__getitem__), max(finite, key=finite.__getitem__)
    if finite[low] == finite[high]:
        return f"{', '.join(finite)}: {form(finite[low])} {unit}."
    return f"Lowest: {low}, {form(finite[low])} {unit}; highest: {high}, {form(finite[high])}."


def _ends(series: Mapping[Row, Mapping[int, float]]) -> str:
    parts = []
    for row, found in series.items():
        values = list(found.values())
        bad = sum(not math.isfinite(value) for value in values)
        text = f"{_ended(row.name, row)} from {number(values[0])} to {number(values[-1])}"
        parts.append(f"{text}, {bad} of {len(values)} steps not finite" if bad else text)
    return "; ".join(parts) + "."
