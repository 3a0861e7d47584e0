"""``qlora-bench margin``: by how many bits a pair of layers can be rescaled while training stays finite."""

from __future__ import annotations

import json
import sys
from typing import Any

import click

from bench.cli.allow import allow_option
from bench.cli.endings import EXIT_FAILED_RUNS, end_interrupted
from bench.cli.narrowed import Narrowed
from bench.cli.reports import written_report
from bench.cli.run import run_options


@click.command(cls=Narrowed, without=("dtype", "stress", "repeats", "first_repeat"))
@run_options
@allow_option
@click.option(
    "--dtype",
    "dtypes",
    multiple=True,
    metavar="DTYPE",
    help="A compute dtype (repeatable).  [default: float16 and bfloat16]",
)
@click.option(
    "--module",
    metavar="GLOB",
    help="The layer that is scaled; its partner is divided.  [default: the up_proj a third of the way up]",
)
@click.option(
    "--max-bits", type=int, default=24, show_default=True, metavar="N", help="Largest factor tried: 2^N."
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors and the table.")
@click.option("--json", "as_json", is_flag=True, help="Print the margins as JSON instead of the table.")
def margin(
    allow: frozenset[str],
    dtypes: tuple[str, ...],
    module: str | None,
    max_bits: int,
    quiet: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Measure the stability margin: the largest factor between two layers that training survives.

    A bisection over powers of two, each probe an ordinary run of two steps (--steps) with its record. The
    exit code is 1 where a run did not complete.
    """
    from bench.judge.finiteness import STATUSES
    from bench.judge.ladder import evidence
    from bench.judge.margin import find_margins, next_exponent
    from bench.run.asked import Asked
    from bench.run.margin import arrange_margin, measure_margins
    from bench.run.one_by_one import OneByOne
    from bench.show.margin import margin_table, margin_values
    from bench.show.progress import Display
    from bench.show.terminal import Terminal, say

    console = Terminal(stderr=as_json, quiet=quiet or as_json)
    plan = arrange_margin(Asked(**flags), dtypes=dtypes, module=module, max_bits=max_bits)

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    click.get_current_context().with_resource(plan.sweep.store.open_for_writing())
    tell(plan.headline)
    try:
        with Display(console) as display:
            runner = OneByOne(plan.sweep, display, evidence, tell)
            measure_margins(plan, runner, next_exponent)
    except KeyboardInterrupt:
        end_interrupted(force=plan.sweep.force)
    store = plan.sweep.store
    _, files = written_report(list(store.records()), store.folder, allow)
    margins = find_margins(runner.records, plan.module)
    if as_json:
        click.echo(json.dumps(margin_values(margins), indent=1))
    else:
        Terminal().print(margin_table(margins))
        say(f"records: {store.folder}\nreport: {files.html}")
    if any(found.ended_by in STATUSES for found in margins):
        sys.exit(EXIT_FAILED_RUNS)
