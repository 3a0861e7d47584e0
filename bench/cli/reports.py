"""``qlora-bench report`` and ``runs``: what a folder of records says."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bench.errors import UserError, one_line

if TYPE_CHECKING:
    from bench.judge.comparison import Comparison
    from bench.record.schema import Record
    from bench.show.report import ReportFiles


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print the report's paths as JSON.")
def report(folder: Path, as_json: bool) -> None:
    """Write the report (HTML, Markdown, CSV, plots) of the records in FOLDER."""
    from bench.record.store import Store

    records = list(Store(folder).records())
    if not records:
        raise UserError(
            f"'{folder}' holds no records", "make some with: qlora-bench run --out " + str(folder)
        )
    show(records, folder, as_json=False, quiet=True, paths_as_json=as_json)


@click.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print all records as one JSON array.")
def runs(folder: Path, as_json: bool) -> None:
    """List the records in FOLDER."""
    from bench.record.store import Store
    from bench.show.progress import describe_end
    from bench.show.terminal import say

    records = list(Store(folder).records())
    if as_json:
        print_records(records)
        return
    for record in records:
        say(one_line(f"{record.key}  {describe_end(record)}"))


def show(
    records: Sequence[Record], folder: Path, *, as_json: bool, quiet: bool, paths_as_json: bool = False
) -> None:
    """Write the report of ``records`` into ``folder``, and print what was asked for."""
    from bench.show.tables import terminal_table
    from bench.show.terminal import Terminal

    comparison, files = written_report(records, folder)
    if as_json:
        print_records(records)
    elif paths_as_json:
        click.echo(
            json.dumps(
                {
                    "page": str(files.html),
                    "markdown": str(files.markdown),
                    "csv": str(files.csv),
                    "plots": [str(path) for path in files.plots],
                }
            )
        )
    else:
        if not quiet:
            Terminal().print(terminal_table(comparison))
        click.echo(f"report: {files.html}")


def written_report(records: Sequence[Record], folder: Path) -> tuple[Comparison, ReportFiles]:
    """Write the report of ``records``, and of the triage in ``folder`` where there is one."""
    from bench.judge.comparison import compare
    from bench.record.forecast import forecasts_below
    from bench.record.triage import triages_below
    from bench.show.report import write_report

    # One by one, a ladder's runs would hide what they were run for; they stand in the ladder.
    aside = {key for triage in triages_below(folder) for key in triage.rung_keys}
    # A slice is no run of the model; it stands in the forecast.
    aside |= {key for forecast in forecasts_below(folder) for key in forecast.slice_keys}
    comparison = compare([record for record in records if record.key not in aside] or records)
    return comparison, write_report(comparison, folder)


def print_records(records: Sequence[Record]) -> None:
    """Print records as one JSON array."""
    click.echo(json.dumps([json.loads(record.model_dump_json()) for record in records], indent=1))
