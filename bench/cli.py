"""The front door: arguments in, calls out, and the only place that prints errors.

Every command imports what it needs when it runs, so that help and listings answer at once; nothing on
this side of the worker process imports torch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import click

from bench.errors import UserError, unknown

if TYPE_CHECKING:
    from bench.record.schema import Record
    from bench.run.sweep import Sweep

EXIT_FAILED_RUNS = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


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


@cli.command()
@click.option("--preset", default="auto", show_default=True, metavar="NAME|FILE", help="What to run on.")
@click.option("--backend", "backends", multiple=True, metavar="ID", help="A backend (repeatable), or 'all'.")
@click.option("--dtype", metavar="DTYPE", help="Compute dtype: bfloat16, float16 or float32.")
@click.option("--device", metavar="DEVICE", help="auto, cpu or cuda.")
@click.option("--model", metavar="SRC", help="A Hub id or a folder, instead of the preset's model.")
@click.option("--weights", metavar="KIND", help="auto (real where on this disk), real or synthetic.")
@click.option("--layers", type=int, metavar="N", help="Keep only the first N decoder layers.")
@click.option("--steps", type=int, metavar="N", help="Optimizer steps of each run.")
@click.option("--repeats", type=int, metavar="N", help="Runs of each backend, with paired seeds.")
@click.option("--seed", type=int, metavar="N", help="Seed of the first repeat.")
@click.option("--data", type=click.Path(dir_okay=False), metavar="FILE", help="JSONL training text.")
@click.option(
    "--calibration",
    default="auto",
    show_default=True,
    metavar="HOW",
    help="How GPTQ and AWQ checkpoints are made: auto, rtn or calibrated.",
)
@click.option("--timeout-seconds", type=float, metavar="N", help="Limit of each run.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other setting, such as lora.rank=16 or hqq.group_size=128 (repeatable).",
)
@click.option(
    "--out",
    type=click.Path(file_okay=False, path_type=Path),
    metavar="DIR",
    help="Folder of records and report.  [default: results/local/PRESET]",
)
@click.option("--download", is_flag=True, help="Agree to fetch the model from the Hub if it is not here.")
@click.option("--force", is_flag=True, help="Repeat runs that are recorded already.")
@click.option("--dry-run", is_flag=True, help="Print the plan and run nothing.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors and the report's path.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON instead of the table.")
def run(dry_run: bool, quiet: bool, as_json: bool, **flags: Any) -> None:
    """Benchmark backends: load, prove, train a few identical steps, record, report."""
    from rich.console import Console

    from bench.record.store import read_record
    from bench.run.arrange import Asked, arrange
    from bench.run.sweep import run_sweep
    from bench.show.progress import Display

    console = Console(stderr=as_json, quiet=quiet or as_json)
    arranged = arrange(Asked(**flags))
    sweep = arranged.sweep
    console.print(arranged.headline, markup=False, highlight=False, soft_wrap=True)
    if dry_run:
        _print_plan(sweep, as_json=as_json)
        return
    sweep.store.open_for_writing()
    try:
        with Display(console) as display:
            for _ in run_sweep(sweep, display):
                pass
    except KeyboardInterrupt:
        click.echo("interrupted: finished records are kept, the same command goes on from here", err=True)
        sys.exit(EXIT_INTERRUPTED)
    paths = [sweep.store.path(request.key) for request in sweep.requests]
    records = [read_record(path) for path in paths]
    _show(records, sweep.store.folder, as_json=as_json, quiet=quiet)
    if any(record.status != "completed" for record in records):
        sys.exit(EXIT_FAILED_RUNS)


@cli.command()
@click.option("--json", "as_json", is_flag=True, help="Print as JSON.")
def backends(as_json: bool) -> None:
    """List the backends, what they are, and whether their libraries are installed."""
    from bench.load.registry import find_backends

    entries = find_backends().values()
    if as_json:
        click.echo(
            json.dumps(
                [
                    {
                        "id": e.id,
                        "description": e.description,
                        "requires": e.backend.requires,
                        "missing": e.missing,
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
        if entry.missing:
            click.echo(f"{'':<{width}}  needs {', '.join(entry.missing)}: {entry.install_line}")


@cli.command()
@click.argument("name")
@click.option("--json", "as_json", is_flag=True, help="Print the record as JSON.")
def check(name: str, as_json: bool) -> None:
    """Check that backend NAME keeps the contract, on a small model that is drawn at random."""
    import tempfile

    from bench.load.registry import get_backend
    from bench.run.arrange import arrange
    from bench.run.conformance import asked_for, findings
    from bench.run.sweep import run_sweep
    from bench.show.progress import Silent

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
            click.echo(f"  {'ok  ' if finding.passed else 'FAIL'}  {finding.name}: {finding.detail}")
    if not all(finding.passed for finding in found):
        sys.exit(EXIT_FAILED_RUNS)


@cli.command()
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
    _show(records, folder, as_json=False, quiet=True, paths_as_json=as_json)


@cli.command()
@click.argument("folder", type=click.Path(path_type=Path))
@click.option("--json", "as_json", is_flag=True, help="Print all records as one JSON array.")
def runs(folder: Path, as_json: bool) -> None:
    """List the records in FOLDER."""
    from bench.record.store import Store
    from bench.show.progress import describe_end

    records = list(Store(folder).records())
    if as_json:
        _print_records(records)
        return
    for record in records:
        click.echo(f"{record.key}  {describe_end(record)}")


def main() -> NoReturn:
    """Entry point of the command. Prints a person's errors as one line and exits with 2."""
    try:
        cli.main(standalone_mode=False)
    except UserError as error:
        click.echo(f"qlora-bench: {error}", err=True)
        sys.exit(EXIT_BAD_INPUT)
    except click.ClickException as error:
        click.echo(f"qlora-bench: {' '.join(error.format_message().split())}", err=True)
        sys.exit(EXIT_BAD_INPUT)
    except (click.Abort, KeyboardInterrupt):
        click.echo("interrupted", err=True)
        sys.exit(EXIT_INTERRUPTED)
    except BrokenPipeError:
        # The reader of our output went away (`| head`): nothing to say, and nobody to say it to.
        sys.stderr.close()
        sys.exit(EXIT_FAILED_RUNS)
    sys.exit(0)


def _print_plan(sweep: Sweep, *, as_json: bool) -> None:
    waiting = {request.key for request in sweep.waiting()}
    if as_json:
        click.echo(json.dumps([request.model_dump(mode="json") for request in sweep.requests], indent=1))
        return
    for request in sweep.requests:
        entry = sweep.entries[request.backend]
        state = (
            "recorded already"
            if request.key not in waiting
            else f"unavailable: {entry.install_line}"
            if entry.missing
            else "to run"
        )
        click.echo(f"{request.key}  seed {request.seed}  {state}")
        click.echo(f"  {request.command}")


def _show(
    records: Sequence[Record], folder: Path, *, as_json: bool, quiet: bool, paths_as_json: bool = False
) -> None:
    from rich.console import Console

    from bench.judge.comparison import compare
    from bench.show.report import write_report
    from bench.show.tables import terminal_table

    comparison = compare(records)
    files = write_report(comparison, folder)
    if as_json:
        _print_records(records)
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
            Console().print(terminal_table(comparison))
        click.echo(f"report: {files.html}")


def _print_records(records: Sequence[Record]) -> None:
    click.echo(json.dumps([json.loads(record.model_dump_json()) for record in records], indent=1))
