"""What a person does things with on the page: backends to highlight, columns to hide, settings to copy.

The template writes them, hidden; the page's script shows them and makes them work.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.judge.comparison import Comparison
from bench.record.forecast import Forecast
from bench.record.triage import Configuration
from bench.show.columns import COLUMNS
from bench.show.configurations import configurations, has_configurations
from bench.show.owners import owner
from bench.show.selection import Selection
from bench.show.styles import assign_styles

CHIPS = 32
"""Backends that can be highlighted, at most."""
SETTINGS_SHOWN = 16
"""Kinds of run whose settings can be copied, at most: each is three texts."""
SHAPES: Mapping[str, str] = {
    "o": "M6 1.5a4.5 4.5 0 1 0 .01 0z",
    "s": "M2 2h8v8h-8z",
    "D": "M6 .5l5.5 5.5-5.5 5.5-5.5-5.5z",
    "d": "M6 0l3.6 6-3.6 6-3.6-6z",
    "^": "M6 1l5 9.5h-10z",
    "v": "M6 11l5-9.5h-10z",
    "P": "M4 1h4v3h3v4h-3v3h-4v-3h-3v-4h3z",
    "X": "M3 .8l3 3 3-3 2.2 2.2-3 3 3 3-2.2 2.2-3-3-3 3-2.2-2.2 3-3-3-3z",
}
"""Marker of a style -> its outline in a box of 12 by 12."""
COLUMN_GROUPS: Mapping[str, tuple[str, ...]] = {
    "Outcome and dtype": ("Outcome", "Dtype"),
    "Bits and load": ("Bits/weight", "Load (s)"),
    "Speed": ("Step (s)", "Tokens/s"),
    "Memory": ("Peak memory (GiB)",),
    "Loss and gradients": ("Loss, first → last", "Gradient norm, median / max"),
    "Stability": ("Stability",),
}
"""Columns of the main table that are hidden together, by their titles; the backend always stands there."""


@dataclass(frozen=True)
class Chip:
    """A backend in the bar of all figures' legends."""

    name: str
    owner: str
    color: str
    shape: str
    """Path of its marker."""


@dataclass(frozen=True)
class ColumnGroup:
    """Columns that are hidden together, by their places from 1."""

    title: str
    columns: str


def make_chips(comparison: Comparison, forecast: Forecast | None) -> tuple[Chip, ...]:
    """One for each backend that a figure or a table of the page has."""
    by_end = sorted(comparison.rows, key=lambda row: not row.completed)
    styles = assign_styles([row.record.request.backend for row in by_end])
    names = [row.record.request.backend for row in comparison.rows]
    if forecast is not None:
        names += [backend.backend for backend in forecast.backends]
        styles = assign_styles([backend.backend for backend in forecast.backends]) | styles
    return tuple(
        Chip(name, owner(name), styles[name].color, SHAPES[styles[name].marker])
        for name in list(dict.fromkeys(names))[:CHIPS]
    )


def column_groups() -> tuple[ColumnGroup, ...]:
    """In the order of the table."""
    places = {column.title: place for place, column in enumerate(COLUMNS, start=1)}
    return tuple(
        ColumnGroup(title, " ".join(str(places[name]) for name in names))
        for title, names in COLUMN_GROUPS.items()
    )


def settings_of(chosen: Selection) -> dict[str, tuple[Configuration, ...]]:
    """Label -> a run of that kind as settings of other tools."""
    firsts = {row.label: row for row in reversed(chosen.listed)}
    requests = {label: firsts[label].record.request for label in chosen.drawn if label in firsts}
    told = {label: request for label, request in requests.items() if has_configurations(request)}
    return {label: configurations(told[label]) for label in list(told)[:SETTINGS_SHOWN]}
