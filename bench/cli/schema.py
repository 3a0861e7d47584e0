"""``qlora-bench schema``: the JSON Schema of a record."""

from __future__ import annotations

import click


@click.command()
def schema() -> None:
    """Print the JSON Schema (draft 2020-12) of the record of a run.

    Every *.record.json that this version writes keeps to it.
    """
    from bench.record.json_schema import published_schema

    click.echo(published_schema(), nl=False)
