"""Figures of "Will it fit, how fast": cards against their size, and step time over depth with its forecast.

``fit_plots(comparison, forecast, labels)`` gives those that there is data for; ``bench.show.plots`` takes
them in.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from typing import TYPE_CHECKING, Any

from bench.judge.comparison import Comparison
from bench.record.forecast import BackendForecast, Forecast, Line
from bench.show.card_plots import forecast_cards, measured_cards
from bench.show.columns import number
from bench.show.drawing import INK, Plot, finish, has_place, height_with_legend, legend_below, new_figure
from bench.show.fit_forecast import outlooks_by_cards
from bench.show.fit_view import uses_of
from bench.show.owners import owner_id
from bench.show.styles import Style, assign_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

STEPS_BY_DEPTH = "forecast-step-time"
OF_FORECAST = "forecast-"
"""How the names of figures begin that show no run of the comparison."""


def fit_plots(
    comparison: Comparison, forecast: Forecast | None, labels: Collection[str] | None = None
) -> tuple[Plot, ...]:
    """Every figure of the section that there is data for; ``labels``: the kinds of run that are
    drawn; None: all.
    """
    uses = [use for use in uses_of(comparison) if labels is None or use.row.label in labels]
    drawn: list[Plot | None] = [measured_cards(uses)] if uses else []
    if forecast is not None:
        drawn.append(_step_by_depth(forecast))
        sets = outlooks_by_cards(forecast).items()
        drawn += [forecast_cards(place, *one) for place, one in enumerate(sets, start=1)]
    return tuple(plot for plot in drawn if plot is not None)


# ---- step time over depth ------------------------------------------------------------------------


def _step_by_depth(forecast: Forecast) -> Plot | None:
    from matplotlib.ticker import MaxNLocator

    shown = [
        (backend, line)
        for backend in forecast.backends
        if (line := backend.line("step", "step")) is not None and any(map(has_place, line.at_slices))
    ]
    if not shown:
        return None
    full = forecast.full_layers
    styles = assign_styles([backend.backend for backend, _ in shown])
    names = [backend.backend for backend, _ in shown]
    with new_figure(height_with_legend(names) + 1.2) as (figure, axes):
        legend: dict[str, Any] = {}
        for place, (backend, line) in enumerate(shown):
            # Side by side, so that no interval hides another.
            shift = full * 0.014 * (place - (len(shown) - 1) / 2)
            legend[backend.backend] = _draw_line(
                axes, backend, line, (full, full + shift), styles[backend.backend]
            )
        legend |= _signs(shown)
        axes.set_xlabel("decoder layers")
        axes.xaxis.set_major_locator(MaxNLocator(integer=True, nbins=10))
        axes.set_ylabel("seconds per optimizer step")
        axes.set_xlim(0, full * (1.04 + 0.008 * len(shown)))
        axes.set_ylim(bottom=0)
        legend_below(figure, legend)
        said = "; ".join(_in_words(*one, full) for one in shown)
        text = f"Seconds of an optimizer step by decoder layers. {said}."
        return finish(figure, STEPS_BY_DEPTH, "Step time by depth, measured and forecast", text)


def _draw_line(
    axes: Axes, backend: BackendForecast, line: Line, ends: tuple[int, float], style: Style
) -> Line2D:
    """The slices as dots, the line through them, and at its end the interval and what was measured there."""
    (full, place), whose = ends, owner_id(backend.backend)
    look: Any = {"color": style.color, "marker": style.marker, "ms": 5, "gid": whose}
    points = [(x, y) for x, y in zip(backend.slices, line.at_slices, strict=False) if has_place(y)]
    axes.plot([x for x, _ in points], [y for _, y in points], ls="", **look)
    if (
        line.fixed is not None
        and line.per_layer is not None
        and has_place(line.fixed + full * line.per_layer)
    ):
        ends_at = [line.fixed, line.fixed + full * line.per_layer]
        axes.plot([0, full], ends_at, color=style.color, ls=style.line, lw=1.1, gid=whose)
    if has_place(line.predicted):
        axes.plot([place], [line.predicted], ls="", **look)
    if has_place(line.low) and has_place(line.high):
        axes.plot([place] * 2, [line.low, line.high], color=style.color, lw=1.6, marker="_", ms=7, gid=whose)
    if has_place(line.measured):
        circle: Any = {"ls": "", "mfc": "none", "marker": "o", "ms": 10, "mew": 1.3, "gid": whose}
        axes.plot([place], [line.measured], color=INK, **circle)
    return _handle(color=style.color, marker=style.marker, ls=style.line, gid=whose)


def _signs(shown: Sequence[tuple[BackendForecast, Line]]) -> dict[str, Line2D]:
    found = {}
    if any(has_place(line.low) for _, line in shown):
        found["95 % interval"] = _handle(color=INK, marker="_", ls="-", lw=1.6)
    if any(has_place(line.measured) for _, line in shown):
        found["measured, all layers"] = _handle(color=INK, marker="o", mfc="none", ms=9, ls="")
    return found


def _handle(**look: Any) -> Line2D:
    from matplotlib.lines import Line2D

    return Line2D([], [], **look)


def _in_words(backend: BackendForecast, line: Line, full: int) -> str:
    at = ", ".join(f"{number(y)} at {x}" for x, y in zip(backend.slices, line.at_slices, strict=False))
    interval = f" ({number(line.low)} to {number(line.high)})" if line.low is not None else ""
    forecast = (
        "no forecast" if line.predicted is None else f"forecast {number(line.predicted)}{interval} at {full}"
    )
    measured = "" if line.measured is None else f", measured {number(line.measured)}"
    return f"{backend.backend} {at}, {forecast}{measured}"

