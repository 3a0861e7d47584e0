"""The report as files: a page, Markdown, tables (of runs, and of figures with their ratios), and each
figure by itself.

``write_report(comparison, folder, formats)`` writes them, each whole or not at all. A triage and a forecast
that stand beside the records are part of the report.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from bench.judge.comparison import Comparison
from bench.record.forecast import read_forecast
from bench.record.triage import read_triage
from bench.record.writing import write_atomically
from bench.show.drawing import Plot
from bench.show.figures_csv import figures_csv
from bench.show.files import parquet, png
from bench.show.page import page
from bench.show.plots import plots
from bench.show.tables import csv, markdown

FORMATS = ("html", "markdown", "csv", "parquet", "svg", "png")
DEFAULT_FORMATS = ("html", "markdown", "csv", "svg")
"""PNG takes a while to draw, and Parquet says what CSV says."""
FIGURE_FILES: Mapping[str, Callable[[Plot], str | bytes]] = {"svg": lambda plot: plot.standalone, "png": png}


@dataclass(frozen=True)
class ReportFiles:
    """Where the report was written; None: not asked for."""

    html: Path | None
    markdown: Path | None
    csv: Path | None
    """One run a line."""
    figures_csv: Path | None
    """One figure of one backend a line, with its ratio, interval and rank."""
    parquet: Path | None
    plots: tuple[Path, ...]

    @property
    def written(self) -> tuple[Path, ...]:
        """Every file that was written."""
        named = (self.html, self.markdown, self.csv, self.figures_csv, self.parquet)
        return (*(path for path in named if path is not None), *self.plots)


def write_report(
    comparison: Comparison,
    folder: Path,
    formats: Collection[str] = DEFAULT_FORMATS,
    refresh_seconds: float | None = None,
    sources: Sequence[Path] = (),
) -> ReportFiles:
    """Write report.html, .md, .csv and .parquet, figures.csv, and plots/*.svg and *.png into ``folder``; of
    these what ``formats`` names.

    ``refresh_seconds``: how often the page loads itself again, while runs go on. ``sources``: folders whose
    triage and forecast are shown, the first that has one; none: ``folder``. Raises BrokenFile where one holds
    a triage.json or a forecast.json that is none.
    """
    sources = sources or (folder,)
    triage = next(filter(None, map(read_triage, sources)), None)
    forecast = next(filter(None, map(read_forecast, sources)), None)
    drawn = plots(comparison, forecast) if {"html", "svg", "png"} & set(formats) else ()

    def wrote(name: str, kind: str, content: Callable[[], str | bytes]) -> Path | None:
        return write_atomically(folder / name, content()) if kind in formats else None

    figures = [
        wrote(f"plots/{plot.name}.{kind}", kind, partial(draw, plot))
        for kind, draw in FIGURE_FILES.items()
        for plot in drawn
    ]
    return ReportFiles(
        html=wrote(
            "report.html", "html", lambda: page(comparison, drawn, triage, forecast, refresh_seconds)
        ),
        markdown=wrote("report.md", "markdown", lambda: markdown(comparison, triage, forecast)),
        csv=wrote("report.csv", "csv", lambda: csv(comparison)),
        figures_csv=wrote("figures.csv", "csv", lambda: figures_csv(comparison)),
        parquet=wrote("report.parquet", "parquet", lambda: parquet(comparison)),
        plots=tuple(path for path in figures if path is not None),
    )
