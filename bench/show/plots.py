"""The comparison as figures: SVG text that goes into the page or stands alone as a file.

``plots(comparison, forecast)`` draws every figure that there is data for, runs that failed underway included.
Each figure has a sentence that says what it shows, and notes where the runs in it are not alike.
"""

from __future__ import annotations

from bench.judge.comparison import Comparison
from bench.record.forecast import Forecast
from bench.show.differences import noted, notes_on
from bench.show.drawing import Plot, assign_styles
from bench.show.fit_plots import OF_FORECAST, fit_plots
from bench.show.heat_map import headroom_maps
from bench.show.memory_plots import bytes_by_kind, memory_by_phase
from bench.show.runs_shown import margins_of, runs_shown
from bench.show.stability_plots import fidelity_by_layer, margin_bars
from bench.show.step_plots import GRADIENT_NORM, LOSS, STEP_TIME, THROUGHPUT, curves, strip


def plots(comparison: Comparison, forecast: Forecast | None = None) -> tuple[Plot, ...]:
    """Every figure that there is data for."""
    labels = [row.label for row in comparison.rows]
    # A failed request must not take the backend's own style from one that completed.
    styles = assign_styles([row.label for row in sorted(comparison.rows, key=lambda row: not row.completed)])
    # The repeats of one backend lie together.
    rows = sorted(runs_shown(comparison), key=lambda row: labels.index(row.label))
    drawn = (
        *fit_plots(comparison, forecast),
        memory_by_phase(rows, styles),
        bytes_by_kind(rows),
        *(strip(rows, styles, quantity) for quantity in (STEP_TIME, THROUGHPUT)),
        *(curves(rows, styles, curve) for curve in (LOSS, GRADIENT_NORM)),
        *headroom_maps(rows),
        fidelity_by_layer(rows, styles),
        margin_bars(margins_of(comparison)),
    )
    notes = notes_on(comparison)
    return tuple(
        plot if plot.name.startswith(OF_FORECAST) else noted(plot, notes)
        for plot in drawn
        if plot is not None
    )
