"""Everything of the page's section "Will it fit, how fast", put together for its template.

``fit_section(comparison, forecast, figures)`` gives it; None where there is nothing to show.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.judge.comparison import Comparison
from bench.record.forecast import Forecast
from bench.show.card_plots import FORECAST_CARDS, MEASURED_CARDS
from bench.show.drawing import Plot
from bench.show.fit_beside import BesideTable, beside_published
from bench.show.fit_forecast import (
    BackendFigures,
    CardSet,
    card_sets,
    check_rows,
    figures_of,
    line_heads,
    line_rows,
    setting_in_words,
    what_it_shows,
)
from bench.show.fit_plots import STEPS_BY_DEPTH
from bench.show.fit_view import RunUse, notes_on, uses_of
from bench.show.forecast import heading


@dataclass(frozen=True)
class LineTable:
    """Every line of one backend."""

    backend: str
    heads: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class ForecastPart:
    """The forecast of the section."""

    heading: str
    setting: str
    what_it_shows: str
    rows: tuple[BackendFigures, ...]
    steps: tuple[Plot, ...]
    sets: tuple[tuple[CardSet, tuple[Plot, ...]], ...]
    checks: tuple[tuple[str, ...], ...]
    lines: tuple[LineTable, ...]
    assumptions: tuple[str, ...]
    command: str


@dataclass(frozen=True)
class FitSection:
    """The section. A part that there is nothing of is empty or None."""

    uses: tuple[RunUse, ...]
    notes: tuple[str, ...]
    measured: tuple[Plot, ...]
    forecast: ForecastPart | None
    beside: BesideTable | None

    @property
    def several(self) -> bool:
        """Whether a run had several devices."""
        return any(len(use.cards) > 1 for use in self.uses)


def fit_section(
    comparison: Comparison, forecast: Forecast | None, figures: Mapping[str, Plot]
) -> FitSection | None:
    """``figures``: those of the page by name."""
    uses = uses_of(comparison)
    beside = beside_published(comparison, forecast)
    if not uses and forecast is None and beside is None:
        return None
    return FitSection(
        uses=uses,
        notes=notes_on(uses),
        measured=_named(figures, MEASURED_CARDS),
        forecast=None if forecast is None else _forecast(forecast, figures),
        beside=beside,
    )


def _forecast(forecast: Forecast, figures: Mapping[str, Plot]) -> ForecastPart:
    return ForecastPart(
        heading=heading(forecast),
        setting=setting_in_words(forecast.asked),
        what_it_shows=what_it_shows(forecast),
        rows=figures_of(forecast),
        steps=_named(figures, STEPS_BY_DEPTH),
        sets=tuple(
            (one, _named(figures, f"{FORECAST_CARDS}{place}"))
            for place, one in enumerate(card_sets(forecast), start=1)
        ),
        checks=check_rows(forecast),
        lines=_line_tables(forecast),
        assumptions=forecast.assumptions,
        command=forecast.command,
    )


def _line_tables(forecast: Forecast) -> tuple[LineTable, ...]:
    return tuple(
        LineTable(backend.backend, line_heads(backend), line_rows(backend))
        for backend in forecast.backends
        if backend.lines
    )


def _named(figures: Mapping[str, Plot], *names: str) -> tuple[Plot, ...]:
    return tuple(figures[name] for name in names if name in figures)
