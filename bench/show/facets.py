"""By what a person can narrow down the runs on the page: outcome, backend, dtype, placement, model, settings.

``facets_of(rows)`` gives those in which the runs differ; a row of a table carries ``Facets.of(row)``, the
places of its values in the facets' lists, which is all that the page's script reads.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.judge.labels import swept_settings
from bench.judge.rows import Row
from bench.show.columns import words

SETTINGS = 6
"""Swept settings that can be chosen by, the first in the order of a request."""
VALUES = 60
"""Values of a facet at most: a list of more is no selection."""

FIXED: Mapping[str, Callable[[Row], str]] = {
    "Outcome": lambda row: words(row.record.status),
    "Stability": lambda row: words(row.verdict.verdict),
    "Backend": lambda row: row.record.request.backend,
    "Dtype": lambda row: row.effective_dtype or row.requested_dtype,
    "Placement": lambda row: row.record.request.placement,
    "Model": lambda row: row.record.request.model.name,
    "Weights": lambda row: row.record.request.model.weights,
}
COVERED = ("dtype", "placement", "model.name", "model.weights")
"""Settings that a fixed facet is about."""


@dataclass(frozen=True)
class Facet:
    """One thing in which the runs differ."""

    title: str
    values: tuple[str, ...]


@dataclass(frozen=True)
class Facets:
    """All of them, and where each run stands."""

    facets: tuple[Facet, ...]
    places: Mapping[Row, str]

    def of(self, row: Row) -> str:
        """The place of the run's value in each facet's list, with blanks between them."""
        return self.places[row]


def facets_of(rows: Sequence[Row]) -> Facets:
    """The facets of ``rows`` that have several values."""
    found = {title: [read(row) for row in rows] for title, read in FIXED.items()}
    swept = swept_settings([row.record for row in rows])
    own = [path for path in swept if path not in COVERED][:SETTINGS]
    found |= {words(path.rpartition(".")[2]).capitalize(): swept[path] for path in own}
    several = {
        title: tuple(dict.fromkeys(values))
        for title, values in found.items()
        if 1 < len(set(values)) <= VALUES
    }
    facets = tuple(Facet(title, _ordered(values)) for title, values in several.items())
    places = {
        row: " ".join(str(facet.values.index(found[facet.title][number])) for facet in facets)
        for number, row in enumerate(rows)
    }
    return Facets(facets, places)


def _ordered(values: Sequence[str]) -> tuple[str, ...]:
    """Numbers by their size; anything else as it came."""
    try:
        return tuple(sorted(values, key=float))
    except ValueError:
        return tuple(values)
