"""The report as files: a page, Markdown, CSV (of runs, and of figures with their ratios), and each figure by
itself.

``write_report(comparison, folder)`` writes them all, each whole or not at all. A triage and a forecast that
stand in the folder are part of the report.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from bench.judge.comparison import Comparison
from bench.record.forecast import read_forecast
from bench.record.store import write_atomically
from bench.record.triage import read_triage
from bench.show.figures_csv import figures_csv
from bench.show.page import page
from bench.show.plots import plots
from bench.show.tables import csv, markdown


@dataclass(frozen=True)
class ReportFiles:
    """Where the report was written."""

    html: Path
    markdown: Path
    csv: Path
    """One run a line."""
    figures_csv: Path
    """One figure of one backend a line, with its ratio, interval and rank."""
    plots: tuple[Path, ...]


def write_report(comparison: Comparison, folder: Path) -> ReportFiles:
    """Write report.html, report.md, report.csv, figures.csv and plots/*.svg into ``folder``, created if need
    be.

    Raises BrokenFile where ``folder`` holds a triage.json or a forecast.json that is none.
    """
    triage, forecast = read_triage(folder), read_forecast(folder)
    drawn = plots(comparison, forecast)
    return ReportFiles(
        html=write_atomically(folder / "report.html", page(comparison, drawn, triage, forecast)),
        markdown=write_atomically(folder / "report.md", markdown(comparison, triage, forecast)),
        csv=write_atomically(folder / "report.csv", csv(comparison)),
        figures_csv=write_atomically(folder / "figures.csv", figures_csv(comparison)),
        plots=tuple(
            write_atomically(folder / "plots" / f"{plot.name}.svg", plot.standalone) for plot in drawn
        ),
    )
