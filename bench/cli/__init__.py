"""The front door: arguments in, calls out, and the only place that prints errors.

One module a group of commands; every command imports what it needs when it runs, so that help and listings
answer at once; nothing on this side of the worker process imports torch.
"""

from __future__ import annotations

import sys
from typing import NoReturn

import click

from bench.cli.backends import backends, check
from bench.cli.compare import compare
from bench.cli.diagnose import diagnose
from bench.cli.endings import EXIT_BAD_INPUT, EXIT_FAILED_RUNS, EXIT_INTERRUPTED
from bench.cli.forecast import forecast
from bench.cli.margin import margin
from bench.cli.overhead import overhead
from bench.cli.plan import plan
from bench.cli.reports import report, runs
from bench.cli.run import run
from bench.cli.schema import schema
from bench.cli.surroundings import prepare
from bench.cli.triage import triage
from bench.cli.watch import watch
from bench.errors import UserError, one_line, unknown


class _Group(click.Group):
    """A command group that names the nearest command when one does not exist."""

    def resolve_command(
        self, ctx: click.Context, args: list[str]
    ) -> tuple[str | None, click.Command | None, list[str]]:
        """As click, with a suggestion."""
        if args and not args[0].startswith("-") and self.get_command(ctx, args[0]) is None:
            raise unknown("command", args[0], self.commands)
        return super().resolve_command(ctx, args)


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="qlora-bench", prog_name="qlora-bench")
def cli() -> None:
    """Which quantization backend should I fine-tune this model on, and will the gradients survive?

    Runs identical short QLoRA trainings on every backend and shows memory, throughput and gradients.
    """


for command in (
    run, plan, forecast, triage, margin, diagnose, report, watch, compare, runs, backends, check, schema,
    overhead,
):  # fmt: skip
    cli.add_command(command)


def main() -> NoReturn:
    """Entry point of the command. Prints a person's errors as one line and exits with 2."""
    prepare()
    try:
        cli.main(standalone_mode=False)
    except UserError as error:
        click.echo(f"qlora-bench: {error}", err=True)
        sys.exit(EXIT_BAD_INPUT)
    except click.exceptions.NoArgsIsHelpError as error:
        click.echo(error.format_message(), err=True)
        sys.exit(EXIT_BAD_INPUT)
    except click.ClickException as error:
        click.echo(f"qlora-bench: {one_line(error.format_message())}", err=True)
        sys.exit(EXIT_BAD_INPUT)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except MemoryError:
        click.echo("qlora-bench: out of memory; finished records are kept", err=True)
        sys.exit(EXIT_FAILED_RUNS)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing to say, and nobody to say it to.
        sys.stderr.close()
        sys.exit(EXIT_FAILED_RUNS)
    sys.exit(0)
