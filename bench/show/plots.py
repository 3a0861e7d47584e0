"""The comparison as figures: SVG text that goes into the page or stands alone as a file.

``plots(comparison, forecast)`` draws every figure that there is data for, runs that failed underway included.
Each figure has a sentence that says what it shows, and notes where the runs in it are not alike.
"""

from __future__ import annotations

from bench.judge.comparison import Comparison
from bench.record.forecast import Forecast
from bench.show.differences import noted, notes_on
from bench.show.drawing import Plot
from bench.show.fit_plots import OF_FORECAST, fit_plots
from bench.show.heat_map import headroom_maps
from bench.show.memory_plots import bytes_by_kind, memory_by_phase
from bench.show.pareto_plot import pareto
from bench.show.ratio_plots import ratio_plots
from bench.show.runs_shown import margins_of, runs_shown
from bench.show.selection import select
from bench.show.stability_plots import fidelity_by_layer, margin_bars
from bench.show.step_plots import GRADIENT_NORM, LOSS, STEP_TIME, THROUGHPUT, curves, strip
from bench.show.styles import assign_styles
from bench.show.sweep_plots import sweep_plots


def plots(comparison: Comparison, forecast: Forecast | None = None) -> tuple[Plot, ...]:
    """Every figure that there is data for."""
    chosen = select(comparison)
    order = {label: place for place, label in enumerate(dict.fromkeys(row.label for row in comparison.rows))}
    # A failed request must not take the backend's own style from one that completed.
    by_end = sorted(comparison.rows, key=lambda row: not row.completed)
    styles = assign_styles([row.label for row in by_end if row.label in chosen.drawn])
    # The repeats of one backend lie together.
    shown = [row for row in runs_shown(comparison) if row.label in chosen.drawn]
    rows = sorted(shown, key=lambda row: order[row.label])
    drawn = (
        pareto(comparison, styles),
        *ratio_plots(comparison, styles),
        *fit_plots(comparison, forecast, chosen.drawn),
        memory_by_phase(rows, styles),
        bytes_by_kind(rows),
        *(strip(rows, styles, quantity) for quantity in (STEP_TIME, THROUGHPUT)),
        *(curves(rows, styles, curve) for curve in (LOSS, GRADIENT_NORM)),
        *headroom_maps(rows),
        fidelity_by_layer(rows, styles),
        margin_bars(margins_of(comparison)),
    )
    notes = notes_on(comparison)
    told = (*notes, *filter(None, [chosen.drawn_note]))
    of_backends = assign_styles([row.record.request.backend for row in by_end])
    return (
        *(
            plot if plot.name.startswith(OF_FORECAST) else noted(plot, told)
            for plot in drawn
            if plot is not None
        ),
        *(noted(plot, notes) for plot in sweep_plots(runs_shown(comparison), of_backends)),
    )
