"""``qlora-bench run``, and the options that every command which runs something shares with it."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bench.cli.allow import allow_option, other_commits
from bench.cli.endings import EXIT_FAILED_RUNS, end_interrupted
from bench.cli.executors import executor_of, executor_options
from bench.cli.paths import GivenPath
from bench.cli.reports import show
from bench.errors import BadValue, UserError, one_line, unknown

if TYPE_CHECKING:
    from bench.record.schema import Record
    from bench.run.sweep import Sweep

RETRIED = ("failed",)
"""What ``--retry`` takes."""
Function = TypeVar("Function", bound=Callable[..., Any])

OPTIONS: tuple[Callable[[Any], Any], ...] = (
    click.option("--preset", default="auto", show_default=True, metavar="NAME|FILE", help="What to run on."),
    click.option(
        "--backend",
        "backends",
        multiple=True,
        metavar="ID",
        help="A backend (repeatable), or 'all' of the environment.",
    ),
    click.option("--dtype", metavar="DTYPE", help="Compute dtype: bfloat16, float16 or float32."),
    click.option("--device", metavar="DEVICE", help="auto, cpu or cuda."),
    click.option("--placement", metavar="KIND", help="Devices of a run: single, split, ddp or fsdp."),
    click.option("--device-count", type=int, metavar="N", help="How many devices, where it is not single."),
    click.option("--environment", metavar="NAME", help="The set of packages that all runs take place in."),
    click.option("--model", metavar="SRC", help="A Hub id or a folder, instead of the preset's model."),
    click.option("--weights", metavar="KIND", help="auto (real where on this disk), real or synthetic."),
    click.option("--layers", type=int, metavar="N", help="Keep only the first N decoder layers."),
    click.option("--steps", type=int, metavar="N", help="Optimizer steps of each run."),
    click.option("--repeats", type=int, metavar="N", help="Runs of each backend, with paired seeds."),
    click.option("--first-repeat", type=int, metavar="K", help="Begin with repeat K instead of 0."),
    click.option("--seed", type=int, metavar="N", help="Seed of repeat 0; repeat K has N + K."),
    click.option("--data", type=click.Path(dir_okay=False), metavar="FILE", help="JSONL training text."),
    click.option(
        "--calibration",
        default="auto",
        show_default=True,
        metavar="HOW",
        help="How GPTQ and AWQ checkpoints are made: auto, rtn, calibrated or random.",
    ),
    click.option("--timeout-seconds", type=float, metavar="N", help="Limit of each run."),
    click.option(
        "--stress",
        multiple=True,
        metavar="MODULE=FACTOR",
        help="Rescale a layer against its partner; the function stays the same (repeatable, globs).",
    ),
    click.option("--trace", is_flag=True, help="Watch every linear, norm and attention of every step."),
    click.option(
        "--set",
        "settings",
        multiple=True,
        metavar="KEY=VALUE",
        help="Any other setting, such as lora.rank=16 or hqq.group_size=128 (repeatable).",
    ),
    click.option(
        "--out",
        type=GivenPath(file_okay=False),
        metavar="DIR",
        help="Folder of records and report.  [default: results/local/PRESET]",
    ),
    click.option("--cache", is_flag=True, help="Keep quantized models on disk and load them again."),
    click.option("--download", is_flag=True, help="Agree to fetch the model from the Hub if it is not here."),
    click.option("--force", is_flag=True, help="Repeat runs that are recorded already."),
)
"""What says which runs are meant."""


def run_options(function: Function) -> Function:
    """Give a command the options that say which runs are meant, in the order in which they stand above."""
    for option in reversed(OPTIONS):
        function = option(function)
    return function


@click.command()
@run_options
@allow_option
@click.option("--shard", metavar="I/N", help="Only the I-th of N parts of the plan, for one machine of N.")
@executor_options
@click.option("--retry", metavar="failed", help="Repeat only recorded runs that did not complete.")
@click.option("--no-skip", is_flag=True, help="Run also what cannot fit because a smaller run did not.")
@click.option("--no-preflight", is_flag=True, help="Do not look at the cards before the first run.")
@click.option("--dry-run", is_flag=True, help="Print the plan and run nothing.")
@click.option("--quiet", is_flag=True, help="Print nothing but errors and the report's path.")
@click.option("--json", "as_json", is_flag=True, help="Print the records as JSON instead of the table.")
def run(
    allow: frozenset[str],
    shard: str | None,
    retry: str | None,
    no_skip: bool,
    no_preflight: bool,
    dry_run: bool,
    quiet: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Benchmark backends: load, prove, train a few identical steps, record, report."""
    from bench.record.slices import save_slice
    from bench.run.arrange import arrange
    from bench.run.asked import Asked
    from bench.run.preflight import Examiner
    from bench.run.sweep import run_sweep
    from bench.show.progress import Display
    from bench.show.terminal import Terminal

    console = Terminal(stderr=as_json, quiet=quiet or as_json)
    _check_retry(retry, force=flags["force"])
    where = executor_of(flags, preflight=not no_preflight)
    arranged = arrange(Asked(**flags, shard=shard))
    examiner = Examiner(skip=True) if no_preflight else arranged.sweep.examiner
    sweep = replace(
        arranged.sweep, examiner=examiner, retry_failed=retry is not None, skip_larger=not no_skip
    )
    if sweep.retry_failed and not any(sweep.store.path(request.key).exists() for request in sweep.requests):
        raise UserError(
            f"none of these runs is recorded in '{sweep.store.folder}'", "leave --retry out to run them"
        )
    if not dry_run:
        context = click.get_current_context()
        context.with_resource(where)
        where.refuse(sweep.requests)
        # Last, for it makes the folder: what is refused leaves nothing behind.
        context.with_resource(sweep.store.open_for_writing())
        if arranged.own is not None:
            save_slice(sweep.store.folder, arranged.own, arranged.plan)
    for line in filter(None, (arranged.headline, other_commits(sweep, allow))):
        console.print(line, markup=False, highlight=False, soft_wrap=True)
    if dry_run:
        _print_plan(sweep, as_json=as_json)
        return
    try:
        with Display(console) as display:
            failed = [one for one in run_sweep(sweep, display, where) if one.status != "completed"]
    except KeyboardInterrupt:
        end_interrupted(force=sweep.force)
    _conclude(sweep, failed, allow, as_json=as_json, quiet=quiet)


def _check_retry(retry: str | None, *, force: bool) -> None:
    if retry not in (None, *RETRIED):
        raise unknown("kind of runs in --retry", retry, RETRIED)
    if retry and force:
        raise BadValue(
            "--retry and --force exclude each other",
            "--retry failed repeats what did not complete, --force everything",
        )


def _conclude(
    sweep: Sweep, failed: Sequence[Record], allow: frozenset[str], *, as_json: bool, quiet: bool
) -> None:
    """Report on what is recorded. Ends the program with 1 where a run did not complete or its record is
    gone. ``failed``: the records of the runs that were tried now and did not."""
    from bench.record.store import read_record

    if not sweep.requests:
        click.echo("[]" if as_json else "this part of the plan has no runs")
        return
    paths = [sweep.store.path(request.key) for request in sweep.requests]
    records = [read_record(path) for path in paths if path.exists()]
    show(records, sweep.store.folder, allow, as_json=as_json, quiet=quiet)
    status = {record.key: record.status for record in records}
    kept = [one for one in failed if status.get(one.key, one.status) != one.status]
    for one in kept:
        reason = f"{one.key} was not repeated ({one.status}: {one.message}); its earlier record is kept"
        click.echo(one_line(f"qlora-bench: {reason}"), err=True)
    gone = 0 if sweep.retry_failed else len(paths) - len(records)
    if gone:
        click.echo(
            f"qlora-bench: {gone} of {len(paths)} records were removed from '{sweep.store.folder}' "
            "meanwhile; the same command makes them again",
            err=True,
        )
    if gone or kept or any(record.status != "completed" for record in records):
        sys.exit(EXIT_FAILED_RUNS)


def _print_plan(sweep: Sweep, *, as_json: bool) -> None:
    from bench.show.terminal import say

    waiting = {request.key for request in sweep.waiting()}
    if as_json:
        click.echo(json.dumps([request.model_dump(mode="json") for request in sweep.requests], indent=1))
        return
    rule = sweep.skip_rule()
    for request in sweep.requests:
        state = "to run"
        if request.key not in waiting:
            recorded = sweep.store.path(request.key).exists()
            state = "recorded already" if recorded else "not recorded, so not repeated"
        elif reason := sweep.obstacle(request):
            state = f"unavailable: {reason}"
        elif sweep.skip_larger and (reason := rule.reason(request)):
            state = f"skipped: {reason}"
        say(f"{request.key}  seed {request.seed}  {state}")
        say(f"  {request.command}")
