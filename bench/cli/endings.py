"""How a command ends: exit codes, the same for every subcommand, and after Ctrl-C."""

from __future__ import annotations

import sys
from typing import NoReturn

import click

EXIT_FAILED_RUNS = 1
EXIT_REGRESSION = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def end_interrupted(*, force: bool) -> NoReturn:
    """Say what Ctrl-C left, and end the program. ``force``: the same command would begin from the start."""
    on = "leave --force out to make only what is missing" if force else "the same command goes on from here"
    click.echo(f"interrupted: finished records are kept, {on}", err=True)
    sys.exit(EXIT_INTERRUPTED)
