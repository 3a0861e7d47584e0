"""``qlora-bench triage``: find the one change that heals a failing configuration."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

import click

from bench.cli.allow import allow_option
from bench.cli.endings import EXIT_FAILED_RUNS, end_interrupted
from bench.cli.narrowed import Narrowed
from bench.cli.reports import written_report
from bench.cli.run import run_options

if TYPE_CHECKING:
    from bench.record.triage import Triage
    from bench.run.one_by_one import OneByOne
    from bench.run.triage import TriagePlan


@click.command(cls=Narrowed, without=("repeats", "first_repeat"))
@run_options
@allow_option
@click.option(
    "--only",
    multiple=True,
    metavar="GROUP",
    help="Try only these changes, such as attention or compute-dtype (repeatable).",
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors and the result.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON instead of text.")
def triage(
    allow: frozenset[str], only: tuple[str, ...], quiet: bool, as_json: bool, **flags: Any
) -> None:
    """Find the smallest change that heals a failing configuration, one change at a time.

    Takes the flags of run with exactly one --backend. Reproduces the failure in few steps, tries one change
    after another, confirms the smallest that heals on three seeds, and prints it as settings of transformers,
    LLaMA-Factory and axolotl. The exit code is 0 where a change heals or nothing fails, 1 where none does.
    """
    from bench.judge.ladder import evidence
    from bench.record.triage import save_triage
    from bench.run.asked import Asked
    from bench.run.one_by_one import OneByOne
    from bench.run.triage import arrange_triage
    from bench.show.ladder import ladder_text
    from bench.show.progress import Display
    from bench.show.terminal import Terminal, say

    console = Terminal(stderr=as_json, quiet=quiet or as_json)

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    plan = arrange_triage(Asked(**flags), only)
    click.get_current_context().with_resource(plan.sweep.store.open_for_writing())
    tell(plan.headline)
    try:
        with Display(console) as display:
            found = climbed_triage(plan, OneByOne(plan.sweep, display, evidence, tell))
    except KeyboardInterrupt:
        end_interrupted(force=plan.sweep.force)
    store = plan.sweep.store
    path = save_triage(store.folder, found)
    _, files = written_report(list(store.records()), store.folder, allow)
    if as_json:
        click.echo(json.dumps(json.loads(found.model_dump_json()), indent=1))
    else:
        Terminal().print(ladder_text(found))
        for configuration in found.configurations:
            # Not through rich: these lines are copied, and must not be wrapped.
            say(f"\n---- {configuration.title} ----\n\n{configuration.text}", newline=False)
        say(f"\ntriage: {path}\nreport: {files.html}")
    if found.base.finite is not True and found.chosen is None:
        sys.exit(EXIT_FAILED_RUNS)


def climbed_triage(plan: TriagePlan, runner: OneByOne) -> Triage:
    """Climb the ladder, and put together what was found."""
    from datetime import UTC, datetime

    from bench.judge.ladder import cause, conclude, smallest_first
    from bench.record.triage import Triage
    from bench.run.triage import climb
    from bench.show.configurations import configurations

    climbed = climb(plan, runner, smallest_first)
    healed = climbed.healed
    return Triage(
        command=plan.base.command,
        backend=plan.base.backend,
        model=plan.base.model.name,
        weights=plan.base.model.weights,
        requested_dtype=plan.base.dtype,
        base=climbed.evidence,
        cause=cause(climbed.base),
        rungs=climbed.rungs,
        chosen=climbed.chosen.name if climbed.chosen else None,
        confirmations=climbed.confirmations,
        configurations=configurations(healed) if healed else (),
        conclusion=conclude(climbed.evidence, climbed.rungs, climbed.chosen, climbed.confirmations),
        ended_at=datetime.now(UTC).isoformat(timespec="seconds"),
    )
