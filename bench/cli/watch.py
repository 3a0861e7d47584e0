"""``qlora-bench watch``: a page that is kept current while a long sweep runs."""

from __future__ import annotations

import math
import signal
import time
from collections.abc import Mapping
from pathlib import Path

import click

from bench.cli.allow import allow_option
from bench.cli.paths import GivenPath
from bench.errors import BadValue, UserError


def _finite(context: click.Context, parameter: click.Parameter, seconds: float) -> float:
    """Refuse NaN, which is neither below nor above any limit."""
    if math.isnan(seconds):
        raise BadValue("--every nan: expected a number of seconds")
    return seconds


@click.command()
@click.argument("folder", type=GivenPath())
@allow_option
@click.option(
    "--every",
    "every_seconds",
    type=click.FloatRange(min=0.1, max=86_400),
    callback=_finite,
    default=5.0,
    show_default=True,
    metavar="SECONDS",
    help="How often to look for new records; the page loads itself again as often.",
)
@click.option("--open", "open_page", is_flag=True, help="Open the page in the browser.")
def watch(folder: Path, allow: frozenset[str], every_seconds: float, open_page: bool) -> None:
    """Keep the report of FOLDER current while runs are recorded there, until Ctrl-C.

    The page loads itself again from disk; nothing is served. At the end it is written once more, still.
    """
    from bench.show.terminal import say

    _refuse_what_is_no_folder(folder)
    # Started by a script in the background, it would ignore the signal that ends it.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    say(f"watching {folder}; Ctrl-C ends it")
    seen: Mapping[Path, int] | None = None
    try:
        while True:
            now = _stamps(folder)
            if now and now != seen:
                first, seen = seen is None, now
                page = _written(folder, allow, refresh_seconds=every_seconds)
                if page and first and open_page:
                    click.launch(page.resolve().as_uri())
            _pause(every_seconds)
    except KeyboardInterrupt:
        page = _written(folder, allow, refresh_seconds=None) if seen else None
        say(f"report: {page}" if page else "no records yet")


def _refuse_what_is_no_folder(folder: Path) -> None:
    try:
        is_file = folder.exists() and not folder.is_dir()
    except OSError as error:  # too long for a path, or one that may not be looked at
        problem = (error.strerror or str(error)).lower()
        hint = "name the folder that a sweep writes to"
        raise UserError(f"'{folder}' cannot be watched: {problem}", hint) from None
    if is_file:
        raise UserError(f"'{folder}' is a file", "name the folder that a sweep writes to")


def _pause(seconds: float) -> None:
    time.sleep(seconds)


def _stamps(folder: Path) -> dict[Path, int]:
    """Every record with the time of its last change."""
    from bench.record.store import SUFFIX

    found = {}
    for path in sorted(folder.rglob(f"*{SUFFIX}")) if folder.is_dir() else ():
        try:
            found[path] = path.stat().st_mtime_ns
        except OSError:  # replaced in this moment: the next look sees it
            continue
    return found


def _written(folder: Path, allow: frozenset[str], refresh_seconds: float | None) -> Path | None:
    """Write the page and tell how it stands; a record that cannot be read is said and does not end it."""
    from bench.cli.reports import written_report
    from bench.record.joining import join
    from bench.show.terminal import say

    try:
        joined = join([folder])
        comparison, files = written_report(
            joined.records, folder, allow, refresh_seconds=refresh_seconds, notes=joined.notes
        )
    except UserError as error:
        click.echo(f"{time.strftime('%H:%M:%S')}  {error}", err=True)
        return None
    done = sum(row.completed for row in comparison.rows)
    say(f"{time.strftime('%H:%M:%S')}  {done} of {len(comparison.rows)} runs completed  {files.html}")
    return files.html
