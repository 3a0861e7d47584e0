"""``qlora-bench forecast``: the whole model from a few of its layers, measured on whatever is at hand."""

from __future__ import annotations

import json
import shlex
import sys
from typing import TYPE_CHECKING, Any

import click

from bench.cli.allow import allow_option
from bench.cli.endings import EXIT_FAILED_RUNS, end_interrupted
from bench.cli.narrowed import Narrowed
from bench.cli.paths import GivenPath
from bench.cli.reports import written_report
from bench.cli.run import run_options
from bench.errors import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from rich.console import Console

    from bench.ask.cards import Cards
    from bench.record.depths import Repeat
    from bench.record.forecast import BackendForecast, Forecast
    from bench.run.forecast_plan import ForecastPlan

SHARED = {"preset", "dtype", "attention", "checkpointing", "workload", "lora", "optimizer"}
"""Fields of a request that all slices share."""


REPLACED = ("layers", "stress", "trace", "cache", "placement", "device_count", "out")
"""Options of ``run`` that a forecast sets itself, or has its own of."""


@click.command(cls=Narrowed, without=REPLACED)
@run_options
@allow_option
@click.option(
    "--out",
    "folder",
    type=GivenPath(file_okay=False),
    metavar="DIR",
    help="Folder of forecast, records and report.  [default: results/local/forecast-PRESET]",
)
@click.option(
    "--slices", default="2,4", show_default=True, metavar="N,N[,N]", help="Layer counts that are measured."
)
@click.option(
    "--cards",
    multiple=True,
    metavar="NxSIZE",
    help="Cards to answer for, such as 7x24GB (repeatable).  [default: those of this machine]",
)
@click.option(
    "--rounds", type=int, default=8, show_default=True, metavar="N", help="Steps timed at each slice."
)
@click.option(
    "--warmup-rounds", type=int, default=2, show_default=True, metavar="N", help="Steps before them."
)
@click.option(
    "--verify", is_flag=True, help="Run the full depth here too, and show how far off every line is."
)
@click.option(
    "--pairs",
    multiple=True,
    metavar="N,N",
    help="With --verify: check the forecast from these slices (repeatable).  [default: all, and every pair]",
)
@click.option("--quiet", is_flag=True, help="Print nothing but errors and the table.")
@click.option("--json", "as_json", is_flag=True, help="Print the forecast as JSON instead of the table.")
def forecast(
    slices: str,
    cards: tuple[str, ...],
    rounds: int,
    warmup_rounds: int,
    verify: bool,
    pairs: tuple[str, ...],
    quiet: bool,
    as_json: bool,
    **flags: Any,
) -> None:
    """Forecast the whole model from a few of its layers: memory, load time, step time, and whether it fits.

    Each slice is an ordinary run of three steps (--steps) with the first N layers; step times come from one
    process in which the depths take turns. The exit code is 1 where a run did not complete.
    """
    from datetime import UTC, datetime
    from time import monotonic

    from bench.record.forecast import save_forecast
    from bench.run.asked import Asked
    from bench.run.forecast_plan import arrange_forecast, parse_subsets
    from bench.show.forecast import forecast_table
    from bench.show.terminal import Terminal, say

    allow, flags["out"] = flags.pop("allow"), flags.pop("folder")
    console = Terminal(stderr=as_json, quiet=quiet or as_json)

    def tell(line: str) -> None:
        console.print(line, markup=False, highlight=False, soft_wrap=True)

    began = monotonic()
    wanted = named_cards(cards)
    plan = arrange_forecast(
        Asked(**flags), slices=slices, verify=verify, rounds=rounds, warmup_rounds=warmup_rounds
    )
    subsets = parse_subsets(pairs, plan.slices, verify=verify)
    # Before anything is measured: cards for a model whose shapes are not known are a bad request.
    without_measuring(plan, wanted)
    for store in {sweep.store.folder: sweep.store for sweep in (plan.full, plan.sweep)}.values():
        click.get_current_context().with_resource(store.open_for_writing())
    tell(plan.headline)
    measured = _measured(plan, console, tell)
    given = {"slices": slices, "cards": cards, "rounds": rounds, "warmup_rounds": warmup_rounds,
             "verify": verify, "pairs": pairs, **flags}  # fmt: skip
    found = concluded(
        plan,
        measured,
        wanted,
        subsets,
        command_line(given),
        ended_at=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_seconds=monotonic() - began,
    )
    path = save_forecast(plan.folder, found)
    _, files = written_report(list(plan.full.store.records()), plan.folder, allow)
    if as_json:
        click.echo(json.dumps(json.loads(found.model_dump_json()), indent=1))
    else:
        Terminal().print(forecast_table(found))
        say(f"forecast: {path}\nreport: {files.html}")
    if any(backend.message or backend.failures for backend in found.backends):
        sys.exit(EXIT_FAILED_RUNS)


def _measured(plan: ForecastPlan, console: Console, tell: Callable[[str], None]) -> dict[str, list[Repeat]]:
    """Every repeat of every backend. Ends the program where it is interrupted."""
    from bench.run.forecast import Measuring
    from bench.show.progress import Display

    try:
        with Display(console) as display:
            return Measuring(plan, display, tell).all()
    except KeyboardInterrupt:
        end_interrupted(force=plan.sweep.force)


def concluded(
    plan: ForecastPlan,
    measured: Mapping[str, Sequence[Repeat]],
    cards: Sequence[Cards],
    subsets: Sequence[tuple[int, ...]],
    command: str,
    *,
    ended_at: str,
    wall_seconds: float,
) -> Forecast:
    """Put together what was measured and what it comes to."""
    from bench.judge.forecast import peak_memory
    from bench.judge.forecast_notes import assumptions
    from bench.record.forecast import Forecast

    first = plan.full.requests[0]
    records = [r for repeats in measured.values() for repeat in repeats for r in repeat.records.values()]
    devices = [record.environment.devices[0].name for record in records if record.environment]
    backends = tuple(_backend(plan, name, measured[name], cards, subsets) for name in plan.backends)
    return Forecast(
        command=command,
        model=first.model.name,
        weights=first.model.weights,
        full_layers=plan.full_layers,
        asked=first.model_dump(mode="json", include=SHARED),
        device=devices[0] if devices else first.device,
        repeats=len(plan.repeats),
        backends=backends,
        assumptions=assumptions(backends, first.model.weights, first.device),
        peak_memory=peak_memory(records),
        ended_at=ended_at,
        wall_seconds=wall_seconds,
    )


def _backend(
    plan: ForecastPlan,
    name: str,
    repeats: Sequence[Repeat],
    cards: Sequence[Cards],
    subsets: Sequence[tuple[int, ...]],
) -> BackendForecast:
    from bench.judge.forecast import backend_forecast, excess
    from bench.judge.forecast_lines import Question
    from bench.run.outlooks import card_outlooks, planned_peaks

    question = Question(name, plan.slices, plan.full_layers, tuple(subsets))
    request = next(r for r in plan.full.requests if r.backend == name)
    planned = planned_peaks(request, (*plan.slices, plan.full_layers))
    lines: dict[str, Callable[[int], float]] = {}
    if request.device == "cuda":
        lines = {
            phase: lambda depth, line=line: float(line.at(depth))  # type: ignore[misc]
            for phase, line in excess(question, repeats, planned).items()
        }
    return backend_forecast(question, repeats, planned, card_outlooks(request, cards, lines) if cards else ())


def named_cards(named: Sequence[str]) -> list[Cards]:
    """The cards that were named, or those of this machine; none where there are none."""
    from bench.ask.cards import cards_here, parse_cards
    from bench.probe.machine import cuda_devices

    if named:
        return list(dict.fromkeys(parse_cards(text) for text in named))
    return cards_here(device.total_memory_bytes for device in cuda_devices())


def without_measuring(plan: ForecastPlan, cards: Sequence[Cards]) -> None:
    """Raise UserError where the arithmetic cannot answer for ``cards``."""
    from bench.run.outlooks import card_outlooks

    if cards:
        card_outlooks(plan.full.requests[0], cards[:1], {})


def command_line(given: Mapping[str, Any]) -> str:
    """The command that asks for the same again, without what only says how it was to be shown."""
    names = {"backends": "backend", "settings": "set"}
    parts = ["forecast"]
    for name, value in given.items():
        flag = f"--{names.get(name, name).replace('_', '-')}"
        if name == "force" or value is None or value is False or value == ():
            continue
        if value is True:
            parts.append(flag)
        for one in value if isinstance(value, tuple) else () if value is True else (value,):
            parts += [flag, str(one)]
    # A path may hold bytes that are no text, and the forecast is a text file.
    return printable("qlora-bench " + shlex.join(parts))
