"""``qlora-bench compare``: what got slower, bigger or less stable from one set of records to another."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from bench.cli.allow import allow_option
from bench.cli.endings import EXIT_REGRESSION
from bench.cli.paths import GivenPath
from bench.errors import BadValue, BrokenFile, UserError

if TYPE_CHECKING:
    from bench.judge.regression import Regression
    from bench.judge.regression_runs import Run
    from bench.record.schema import Record

STANDARD_OUTPUT = Path("-")


@click.command()
@click.argument("base", type=GivenPath())
@click.argument("new", type=GivenPath())
@click.option(
    "--thresholds",
    type=GivenPath(),
    metavar="FILE",
    help="TOML file with other limits than the packaged ones; --show-thresholds prints those.",
)
@allow_option
@click.option(
    "--markdown",
    type=GivenPath(allow_dash=True),
    metavar="FILE",
    help="Write a comment for a pull request into FILE; - prints it instead of the table.",
)
@click.option("--all", "everything", is_flag=True, help="Show unchanged figures too.")
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON document.")
@click.option(
    "--show-thresholds",
    is_flag=True,
    is_eager=True,
    expose_value=False,
    callback=lambda context, _, asked: _print_thresholds(context) if asked else None,
    help="Print the packaged limits with the reason for each.",
)
def compare(
    base: Path,
    new: Path,
    thresholds: Path | None,
    allow: frozenset[str],
    markdown: Path | None,
    everything: bool,
    as_json: bool,
) -> None:
    """Say what got slower, bigger or less stable from BASE to NEW.

    BASE and NEW are folders of records, or single records. Runs are compared that were asked the same and did
    the same work; commit and library versions may differ, and are named.

    The exit code is 0 where nothing got worse, 1 where something did or where a run of BASE has no
    counterpart in NEW, and 2 for bad input, which includes that nothing can be compared.
    """
    from bench.judge.regression import find_regressions
    from bench.judge.regression_limits import load_limits
    from bench.record.collector import collector_paused

    if as_json and markdown == STANDARD_OUTPUT:
        raise BadValue("--json and --markdown - both print to standard output", "give --markdown a file")
    limits = load_limits(thresholds)
    # To its end: the first search afterwards would go through everything that is held.
    with collector_paused():
        regression = find_regressions(_runs(base), _runs(new), limits, allow)
        _tell(regression, markdown, as_json=as_json, everything=everything)
    if regression.failed:
        sys.exit(EXIT_REGRESSION)


def _runs(path: Path) -> tuple[Run, ...]:
    """The runs of a folder, or that of a single record. Raises UserError where there is none."""
    from bench.judge.regression_runs import condense

    runs = condense(_records(path))
    if not runs:
        raise UserError(f"'{path}' holds no records", "make some with: qlora-bench run --out " + str(path))
    return runs


def _records(path: Path) -> Iterator[Record]:
    """One at a time: all of them at once may be more than memory holds."""
    from bench.record.forecast import forecasts_below
    from bench.record.store import Store, read_record
    from bench.record.triage import triages_below

    try:
        one = path.is_file()
    except OSError as error:  # too long for a path
        raise BrokenFile(f"'{path}' cannot be read: {error.strerror}") from None
    if one:
        yield read_record(path)
        return
    # Which rungs and slices there are follows from what was found on the way, not from what was asked.
    aside = {key for triage in triages_below(path) for key in triage.rung_keys}
    aside |= {key for forecast in forecasts_below(path) for key in forecast.slice_keys}
    for record in Store(path).one_by_one():
        if record.key not in aside:
            yield record


def _tell(regression: Regression, markdown: Path | None, *, as_json: bool, everything: bool) -> None:
    from bench.record.writing import write_atomically
    from bench.show.regression import regression_table, regression_values
    from bench.show.regression_markdown import regression_markdown
    from bench.show.terminal import Terminal, say

    if markdown is not None and markdown != STANDARD_OUTPUT:
        write_atomically(markdown, regression_markdown(regression))
    if as_json:
        click.echo(json.dumps(regression_values(regression), indent=1, allow_nan=False))
    elif markdown == STANDARD_OUTPUT:
        say(regression_markdown(regression), newline=False)
    else:
        Terminal().print(regression_table(regression, everything=everything))


def _print_thresholds(context: click.Context) -> None:
    from bench.judge.regression_limits import packaged_limits

    click.echo(packaged_limits(), nl=False)
    context.exit()
