"""``qlora-bench overhead``: what the harness's loop costs beside one written by hand (``make overhead``)."""

from __future__ import annotations

import json
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import TYPE_CHECKING

import click

from bench.cli.endings import EXIT_FAILED_RUNS, EXIT_INTERRUPTED
from bench.cli.paths import GivenPath

if TYPE_CHECKING:
    from bench.record.overhead import ProcessTimes


@click.command()
@click.option("--preset", default="proxy", show_default=True, metavar="NAME|FILE", help="What to train.")
@click.option("--backend", default="bnb-nf4", show_default=True, metavar="ID", help="With which layers.")
@click.option("--layers", type=int, metavar="N", help="Keep only the first N decoder layers.")
@click.option("--steps", type=int, metavar="N", help="Optimizer steps of each process.")
@click.option(
    "--rounds", type=click.IntRange(min=1), default=6, show_default=True, metavar="N",
    help="Processes of each of the three ways; six put each way in every place of the order twice.",
)  # fmt: skip
@click.option("--set", "settings", multiple=True, metavar="KEY=VALUE", help="As in qlora-bench run.")
@click.option(
    "--json", "file", type=GivenPath(dir_okay=False), metavar="FILE",
    help="Write every process and every figure there.",
)  # fmt: skip
def overhead(
    preset: str,
    backend: str,
    layers: int | None,
    steps: int | None,
    rounds: int,
    settings: tuple[str, ...],
    file: Path | None,
) -> None:
    """Compare the loop of a run with the same loop written by hand, in fresh processes that take turns.

    The exit code is 1 where the harness costs more than 1 % with certainty, or the loops did not train the
    same.
    """
    from bench.judge.overhead import judge_overhead
    from bench.record.overhead import WAYS, OverheadTimes
    from bench.record.writing import prove_writable, write_atomically
    from bench.run.asked import Asked
    from bench.run.overhead import ProcessFailed, arrange_overhead, processes
    from bench.show.overhead import overhead_lines, overhead_values
    from bench.show.terminal import say

    asked = Asked(preset=preset, backends=(backend,), layers=layers, steps=steps, settings=settings)
    order, headline = arrange_overhead(asked)
    if file is not None:
        prove_writable(file.parent, "the figures", "choose another file with --json")
    say(f"{headline}; {rounds} rounds of three processes")
    began, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    done: list[ProcessTimes] = []
    environment, ending = None, 0
    try:
        for times, seen in processes(order, rounds):
            done.append(times)
            environment = environment or seen
            left = (time.monotonic() - began) / len(done) * (len(WAYS) * rounds - len(done))
            click.echo(
                f"round {times.round + 1} of {rounds}, {times.way.replace('_', ' ')}: "
                f"{median(times.step_seconds):.4g} s a step; about {left / 60:.1f} min left"
            )
    except ProcessFailed as error:
        click.echo(f"failed: {error}", err=True)
        ending = EXIT_FAILED_RUNS
    except KeyboardInterrupt:
        click.echo("interrupted: what follows is of the finished rounds", err=True)
        ending = EXIT_INTERRUPTED
    measured = OverheadTimes(
        request=order.request, environment=environment, processes=tuple(done), started_at=started_at,
        wall_seconds=time.monotonic() - began,
    )  # fmt: skip
    if not measured.rounds():
        sys.exit(ending or EXIT_FAILED_RUNS)
    found = judge_overhead(measured)
    say("\n".join(overhead_lines(found)))
    if file is not None:
        write_atomically(file, json.dumps(overhead_values(measured, found), indent=1) + "\n")
        say(f"written: {file}")
    if not found.same_work or any(cost.verdict == "exceeded" for cost in found.costs):
        ending = ending or EXIT_FAILED_RUNS
    sys.exit(ending)
