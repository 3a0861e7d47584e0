"""Figures of stability beside the heat map: fidelity by layer, and the margins.

``bench.show.plots`` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.judge.margin import Margin
from bench.judge.rows import Row
from bench.show.columns import number
from bench.show.drawing import (
    SMALLEST_DRAWN,
    Plot,
    Style,
    assign_styles,
    finish,
    has_place,
    height_with_legend,
    legend_below,
    name_lines,
    new_figure,
)
from bench.show.margin import bits_in_words, dtype_in_words
from bench.show.step_plots import edge_markers, frame_values
from bench.show.wording import ended

if TYPE_CHECKING:
    from matplotlib.lines import Line2D


def fidelity_by_layer(rows: Sequence[Row], styles: Mapping[str, Style]) -> Plot | None:
    """Relative error of the LoRA gradient of each decoder layer, a line for each run."""
    from matplotlib.ticker import MaxNLocator

    compared = {row: errors for row in rows if (errors := _errors(row))}
    if not compared:
        return None
    names = {ended(row.label, row) for row in compared}
    with new_figure(height_with_legend(names)) as (figure, axes):
        axes.set_yscale("log")
        legend: dict[str, Line2D] = {}
        crossed = 0
        for row, errors in compared.items():
            style = styles[row.label]
            drawn = [_placed(value) for value in errors]
            look: Any = {"color": style.color, "marker": style.marker, "ls": style.line, "ms": 4}
            (line,) = axes.plot(range(len(drawn)), drawn, **look)
            legend.setdefault(ended(row.label, row), line)
            below = [layer for layer, value in enumerate(errors) if _is_below(value)]
            edge_markers(axes, _broken(errors), 1.0 + 0.055 * crossed, "x", style)
            edge_markers(axes, below, 0.0, "v", style)
            crossed += bool(_broken(errors))
        axes.set_xlabel("decoder layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        axes.set_ylabel("relative error of the gradient\n(log scale)")
        values = [place for errors in compared.values() for value in errors
                  if not math.isnan(place := _placed(value))]  # fmt: skip
        frame_values(axes, values, logarithmic=True)
        legend_below(figure, legend)
        title = "Gradient beside the reference's, by layer"
        return finish(figure, "gradient-fidelity", title, _fidelity_words(compared))


def _errors(row: Row) -> tuple[float | None, ...]:
    fidelity = row.record.fidelity
    return tuple(layer.relative_error for layer in fidelity.layers) if fidelity else ()


def _placed(value: float | None) -> float:
    """The value where it has a place on a logarithmic scale, else NaN, which matplotlib leaves out."""
    return value if has_place(value, logarithmic=True) else math.nan


def _broken(errors: Sequence[float | None]) -> list[int]:
    return [
        layer
        for layer, value in enumerate(errors)
        if value is not None and not _is_below(value) and not has_place(value, logarithmic=True)
    ]


def _is_below(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value < SMALLEST_DRAWN


def _fidelity_words(compared: Mapping[Row, Sequence[float | None]]) -> str:
    parts = []
    for row, errors in compared.items():
        known = [value for value in errors if value is not None and math.isfinite(value)]
        text = f"{number(min(known))} to {number(max(known))}" if known else "no finite value"
        broken = f", {len(_broken(errors))} of {len(errors)} layers not finite" if _broken(errors) else ""
        parts.append(f"{row.name} {text}{broken}")
    return f"Relative error of the LoRA gradient by decoder layer. {'; '.join(parts)}."


def margin_bars(margins: Sequence[Margin]) -> Plot | None:
    """The margin of each backend in bits, as a bar; with a sign where it is a lower bound only."""
    shown = [margin for margin in margins if margin.bits is not None]
    if not shown:
        return None
    styles = assign_styles([margin.label for margin in shown])
    several = len({margin.module for margin in shown}) > 1
    names = [f"{m.label}, {dtype_in_words(m)}" + (f", {m.module}" if several else "") for m in shown]
    with new_figure(0.9 + 0.36 * len(shown)) as (figure, axes):
        for place, margin in enumerate(shown):
            bits = margin.bits or 0.0
            axes.barh(place, bits, height=0.55, color=styles[margin.label].color)
            axes.annotate(
                bits_in_words(margin),
                (bits, place),
                (5, 0),
                textcoords="offset points",
                va="center",
            )
        name_lines(axes, names)
        axes.set_xlabel("margin in bits (log2 of the largest finite factor)")
        axes.set_xlim(0, 1.12 * max(1.0, *(margin.bits or 0.0 for margin in shown)))
        words = [f"{name}: {bits_in_words(margin)} bits" for name, margin in zip(names, shown, strict=True)]
        return finish(figure, "margin", "Stability margin", f"Stability margin. {'; '.join(words)}.")
