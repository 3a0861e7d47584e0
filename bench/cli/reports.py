"""``qlora-bench report`` and ``runs``: what a folder of records says."""

from __future__ import annotations

import json
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bench.cli.allow import allow_option
from bench.cli.paths import GivenPath
from bench.errors import UserError, one_line, unknown

if TYPE_CHECKING:
    from bench.judge.comparison import Comparison
    from bench.record.schema import Record
    from bench.show.report import ReportFiles


def _formats(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> tuple[str, ...]:
    """Kinds of files, in the order in which they were asked for. Raises BadValue for one that is none."""
    from bench.show.report import DEFAULT_FORMATS, FORMATS

    names = [name.strip().lower() for text in texts for name in text.split(",")]
    for name in names:
        if name not in (*FORMATS, "all"):
            raise unknown("format", name, [*FORMATS, "all"])
    if "all" in names:
        return FORMATS
    return tuple(dict.fromkeys(names)) or DEFAULT_FORMATS


def _paths(files: ReportFiles) -> dict[str, object]:
    """Of what was written."""
    named = {
        "page": files.html,
        "markdown": files.markdown,
        "csv": files.csv,
        "figures_csv": files.figures_csv,
        "parquet": files.parquet,
    }
    written = {name: str(path) for name, path in named.items() if path is not None}
    return {**written, "plots": [str(path) for path in files.plots]}


@click.command()
@click.argument("folders", nargs=-1, required=True, metavar="DIR...", type=GivenPath())
@allow_option
@click.option(
    "--out",
    type=GivenPath(file_okay=False),
    metavar="DIR",
    help="Folder of the report.  [default: the first DIR]",
)
@click.option(
    "--baseline",
    metavar="LABEL",
    help="What ratios are to, where runs were repeated.  [default: bf16, else the first]",
)
@click.option(
    "--format",
    "formats",
    multiple=True,
    callback=_formats,
    metavar="KIND",
    help="What to write: html, markdown, csv, parquet, svg, png or all (repeatable, or with commas).  "
    "[default: html, markdown, csv, svg]",
)
@click.option("--open", "open_page", is_flag=True, help="Open the page in the browser.")
@click.option("--json", "as_json", is_flag=True, help="Print the report's paths as JSON.")
def report(
    folders: tuple[Path, ...],
    allow: frozenset[str],
    out: Path | None,
    baseline: str | None,
    formats: tuple[str, ...],
    open_page: bool,
    as_json: bool,
) -> None:
    """Write the report of the records in every DIR: a page, Markdown, tables and figures.

    Runs that are not alike stand in groups apart, the largest first; the report names what differs. Records
    that several machines made (run --shard) are joined: what is there twice or missing is named.
    """
    from bench.record.joining import join
    from bench.show.terminal import say

    joined = join(folders)
    if not joined.records:
        raise UserError(
            f"{_quoted(folders)} {'holds' if len(folders) == 1 else 'hold'} no records",
            f"make some with: qlora-bench run --out {folders[0]}",
        )
    if open_page and "html" not in formats:
        raise UserError("--open needs the page", "add --format html")
    for note in joined.notes:
        click.echo(one_line(note), err=True)
    _, files = written_report(
        joined.records, out or folders[0], allow, baseline, formats, notes=joined.notes, sources=folders
    )
    if as_json:
        click.echo(json.dumps(_paths(files)))
    else:
        for path in [files.html] if files.html else files.written:
            say(f"report: {path}")
    if open_page and files.html:
        click.launch(files.html.resolve().as_uri())


def _quoted(folders: Sequence[Path]) -> str:
    return ", ".join(f"'{folder}'" for folder in folders)


@click.command()
@click.argument("folder", type=GivenPath())
@click.option("--json", "as_json", is_flag=True, help="Print all records as one JSON array.")
def runs(folder: Path, as_json: bool) -> None:
    """List the records in FOLDER."""
    from bench.record.store import Store
    from bench.show.progress import describe_end
    from bench.show.terminal import say

    store = Store(folder)
    if as_json:
        print_records(list(store.records()))
        return
    # Of each record only its line is kept: thousands of whole ones are much to hold for that.
    lines = [
        (record.started_at, record.key, one_line(f"{record.key}  {describe_end(record)}"))
        for record in store.one_by_one()
    ]
    for _, _, line in sorted(lines, key=lambda line: line[:2]):
        say(line)


def show(
    records: Sequence[Record],
    folder: Path,
    allow: Collection[str],
    *,
    as_json: bool,
    quiet: bool,
) -> None:
    """Write the report of ``records`` into ``folder``, and print what was asked for.

    ``allow``: differences with which runs are compared all the same (``--allow``).
    """
    from bench.show.tables import terminal_table
    from bench.show.terminal import Terminal, say

    comparison, files = written_report(records, folder, allow)
    if as_json:
        print_records(records)
    else:
        if not quiet:
            Terminal().print(terminal_table(comparison))
        say(f"report: {files.html}")


def written_report(
    records: Sequence[Record],
    folder: Path,
    allow: Collection[str] = (),
    baseline: str | None = None,
    formats: Collection[str] | None = None,
    refresh_seconds: float | None = None,
    notes: Sequence[str] = (),
    sources: Sequence[Path] = (),
) -> tuple[Comparison, ReportFiles]:
    """Write the report of ``records``, and of a triage and a forecast beside them, into ``folder``.

    ``baseline``: the label that ratios are to. ``formats``: see ``bench.show.report``; None: the usual ones.
    ``refresh_seconds``: how often the page loads itself again. ``notes``: of the set itself.
    ``sources``: where the records are from; none: ``folder``. Raises UserError where no completed run has the
    baseline.
    """
    from bench.judge.comparison import compare
    from bench.record.forecast import forecasts_below
    from bench.record.triage import triages_below
    from bench.show.report import DEFAULT_FORMATS, write_report

    sources = sources or (folder,)
    # One by one, a ladder's runs would hide what they were run for; they stand in the ladder.
    aside = {key for one in sources for triage in triages_below(one) for key in triage.rung_keys}
    # A slice is no run of the model; it stands in the forecast.
    aside |= {key for one in sources for forecast in forecasts_below(one) for key in forecast.slice_keys}
    shown = [record for record in records if record.key not in aside] or records
    comparison = compare(shown, allow, baseline, notes)
    files = write_report(comparison, folder, formats or DEFAULT_FORMATS, refresh_seconds, sources)
    return comparison, files


def print_records(records: Sequence[Record]) -> None:
    """Print records as one JSON array."""
    click.echo(json.dumps([json.loads(record.model_dump_json()) for record in records], indent=1))
