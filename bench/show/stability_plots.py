"""Figures of stability beside the heat map: fidelity by layer, and the margins.

``bench.show.plots`` draws them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from bench.judge.margin import Margin
from bench.judge.rows import Row
from bench.show.bands import Band, band_of, draw_band
from bench.show.columns import number
from bench.show.drawing import Plot, finish, height_with_legend, legend_below, name_lines, new_figure
from bench.show.margin import bits_in_words, dtype_in_words
from bench.show.owners import owner_id
from bench.show.step_plots import SPREAD, frame_values, kinds_of
from bench.show.styles import Style, assign_styles

if TYPE_CHECKING:
    from matplotlib.lines import Line2D


def fidelity_by_layer(rows: Sequence[Row], styles: Mapping[str, Style]) -> Plot | None:
    """Relative error of the LoRA gradient of each decoder layer, a line for each kind of run."""
    from matplotlib.ticker import MaxNLocator

    kinds = kinds_of([row for row in rows if row.record.fidelity and row.record.fidelity.layers])
    if not kinds:
        return None
    bands = {
        name: band_of([_errors(row) for row in members], logarithmic=True) for name, members in kinds.items()
    }
    with new_figure(height_with_legend(kinds)) as (figure, axes):
        axes.set_yscale("log")
        legend: dict[str, Line2D] = {}
        crossed = 0
        for name, band in bands.items():
            label = kinds[name][0].label
            legend[name] = draw_band(axes, band, styles[label], label, crossed, size=4.0)
            crossed += bool(band.broken)
        axes.set_xlabel("decoder layer")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        axes.set_ylabel("relative error of the gradient\n(log scale)")
        frame_values(axes, [value for band in bands.values() for value in band.drawn], logarithmic=True)
        legend_below(figure, legend)
        title = "Gradient beside the reference's, by layer"
        return finish(figure, "gradient-fidelity", title, _fidelity_words(bands, kinds))


def _errors(row: Row) -> dict[int, float | None]:
    layers = row.record.fidelity.layers if row.record.fidelity else ()
    return {place: layer.relative_error for place, layer in enumerate(layers)}


def _fidelity_words(bands: Mapping[str, Band], kinds: Mapping[str, Sequence[Row]]) -> str:
    parts = []
    for name, band in bands.items():
        errors = [value for row in kinds[name] for value in _errors(row).values()]
        known = [value for value in errors if value is not None and math.isfinite(value)]
        runs = f" ({band.runs} runs)" if band.runs > 1 else ""
        text = f"{number(min(known))} to {number(max(known))}" if known else "no finite value"
        broken = f", {len(band.broken)} of {len(band.places)} layers not finite" if band.broken else ""
        parts.append(f"{name}{runs} {text}{broken}")
    spread = SPREAD if any(band.runs > 1 for band in bands.values()) else ""
    return f"Relative error of the LoRA gradient by decoder layer. {'; '.join(parts)}.{spread}"


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
            whose = owner_id(margin.label)
            axes.barh(place, bits, height=0.55, color=styles[margin.label].color, gid=whose)
            axes.annotate(
                bits_in_words(margin),
                (bits, place),
                (5, 0),
                textcoords="offset points",
                va="center",
                gid=whose,
            )
        name_lines(axes, names, [margin.label for margin in shown])
        axes.set_xlabel("margin in bits (log2 of the largest finite factor)")
        axes.set_xlim(0, 1.12 * max(1.0, *(margin.bits or 0.0 for margin in shown)))
        words = [f"{name}: {bits_in_words(margin)} bits" for name, margin in zip(names, shown, strict=True)]
        return finish(figure, "margin", "Stability margin", f"Stability margin. {'; '.join(words)}.")
