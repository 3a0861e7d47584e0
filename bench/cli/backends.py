"""``qlora-bench backends`` and ``check``: what backends there are, and whether one keeps the contract."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import click

from bench.ask.versions import CURRENT
from bench.cli.endings import EXIT_FAILED_RUNS
from bench.errors import printable


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def backends(as_json: bool) -> None:
    """List the backends, what they are, and whether their libraries are installed."""
    from bench.load.registry import find_backends
    from bench.run import environments

    entries = find_backends().values()
    if as_json:
        click.echo(
            json.dumps(
                [
                    {
                        "id": e.id,
                        "description": e.description,
                        "requires": e.backend.requires,
                        "environments": e.backend.environments,
                        "obstacle": environments.obstacle(e.backend.environments[0], e),
                        "missing": e.missing if CURRENT in e.backend.environments else (),
                        "options": e.defaults.model_dump(mode="json"),
                    }
                    for e in entries
                ],
                indent=1,
            )
        )
        return
    width = max(len(entry.id) for entry in entries)
    for entry in entries:
        click.echo(f"{entry.id:<{width}}  {entry.description}")
        ordinary = entry.backend.environments[0]
        if ordinary == CURRENT and entry.missing:
            click.echo(f"{'':<{width}}  needs {', '.join(entry.missing)}: {entry.install_line}")
        if ordinary != CURRENT:
            state = environments.obstacle(ordinary, entry) or f"runs in environment '{ordinary}'"
            click.echo(f"{'':<{width}}  {printable(state)}")


@click.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print what was checked as JSON.")
def check(name: str, as_json: bool) -> None:
    """Check that backend NAME keeps the contract, on a small model that is drawn at random."""
    import tempfile

    from bench.load.registry import get_backend
    from bench.run.arrange import arrange
    from bench.run.conformance import asked_for, findings
    from bench.run.sweep import run_sweep
    from bench.show.progress import Silent
    from bench.show.terminal import say

    entry = get_backend(name)
    with tempfile.TemporaryDirectory(prefix="qlora-bench-check-") as scratch:
        sweep = arrange(asked_for(name, Path(scratch))).sweep
        records = {record.request.backend: record for record in run_sweep(sweep, Silent())}
    found = findings(records[entry.id], next(iter(records.values())))
    if as_json:
        click.echo(
            json.dumps([{"check": f.name, "passed": f.passed, "detail": f.detail} for f in found], indent=1)
        )
    else:
        click.echo(f"{entry.id}: {entry.description}")
        for finding in found:
            say(f"  {'ok  ' if finding.passed else 'FAIL'}  {finding.name}: {finding.detail}")
    if not all(finding.passed for finding in found):
        sys.exit(EXIT_FAILED_RUNS)
