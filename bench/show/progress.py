"""What is seen while a sweep runs: a live line for each run in a terminal, plain lines elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from bench.ask.plan import RunRequest
from bench.record.preflight import Preflight
from bench.record.schema import Record
from bench.show.preflight import describe_preflight

Listener = Callable[[Mapping[str, Any]], None]
"""Takes the events of one run (``bench.run.events``)."""

STAGES = {
    "launch": "starting",
    "prepare": "packing the checkpoint",
    "load": "loading",
    "attach": "attaching LoRA",
    "train": "training",
    "save": "saving",
}


class Display:
    """Watches a sweep. Use as a context manager around it."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live = console.is_terminal
        self._progress = Progress(
            TextColumn("{task.fields[run]}"),
            BarColumn(bar_width=24),
            TextColumn("{task.description}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            transient=True,
        )
        self._tasks: dict[str, TaskID] = {}
        """By the run's key."""

    def __enter__(self) -> Display:
        if self._live:
            self._progress.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._live:
            self._progress.stop()

    def examining(self, cards: int) -> None:
        """The cards are looked at."""
        self._say(f"looking at {cards} {'card' if cards == 1 else 'cards'} before the first run")

    def examined(self, preflight: Preflight) -> None:
        """What was found about them, and one line for every warning."""
        if preflight.status == "completed":  # else the first warning says why not
            self._say(describe_preflight(preflight))
        for warning in preflight.warnings:
            self._say(f"warning: {warning}")

    def skipped(self, request: RunRequest) -> None:
        """A run that has a record already."""
        self._say(f"{request.backend}: recorded already, skipped")

    def listener(self, place: int, total: int, request: RunRequest) -> Listener:
        """Follow one run's events."""
        name = f"[{place + 1}/{total}] {request.backend}" + (
            f" repeat {request.repeat}" if request.repeat else ""
        )
        if not self._live:
            self._say(f"{name}: started")
            return lambda event: None
        self._remove(request.key)
        task = self._tasks[request.key] = self._progress.add_task("starting", run=name, total=None)

        def take(event: Mapping[str, Any]) -> None:
            match event["event"]:
                case "stage":
                    self._progress.reset(
                        task, total=None, description=STAGES.get(event["name"], event["name"])
                    )
                case "progress":
                    self._progress.update(task, completed=event["done"], total=event["total"])
                case "step":
                    self._progress.update(
                        task,
                        total=request.workload.steps,
                        completed=event["step"]["index"] + 1,
                        description=describe_step(event["step"], request.workload.steps),
                    )

        return take

    def ended(self, record: Record) -> None:
        """Leave one lasting line for a finished run."""
        self._remove(record.key)
        self._say(describe_end(record))

    def _remove(self, key: str) -> None:
        if (task := self._tasks.pop(key, None)) is not None:
            self._progress.remove_task(task)

    def _say(self, line: str) -> None:
        # Where whoever read this has gone (``| head -1``), rich ends the program. The records are what it is
        # run for, so that it goes on, and rich has turned the console off by then.
        with suppress(SystemExit, BrokenPipeError):
            self._print(line)

    def _print(self, line: str) -> None:
        self._console.print(line, markup=False, highlight=False, soft_wrap=True)


class Silent:
    """Watches a sweep and says nothing."""

    def examining(self, cards: int) -> None:
        """Nothing."""

    def examined(self, preflight: Preflight) -> None:
        """Nothing."""

    def skipped(self, request: RunRequest) -> None:
        """Nothing."""

    def listener(self, place: int, total: int, request: RunRequest) -> Listener:
        """A listener that hears nothing."""
        return lambda event: None

    def ended(self, record: Record) -> None:
        """Nothing."""


def describe_step(step: Mapping[str, Any], steps: int) -> str:
    """One training step in a few words."""
    losses = [float(loss) for loss in step["losses"]]
    speed = step["tokens"] / step["seconds"] if step["seconds"] else float("inf")
    return (
        f"step {step['index'] + 1}/{steps}  {speed:,.0f} tokens/s  loss {sum(losses) / len(losses):.4f}  "
        f"gradient norm {float(step['gradient_norm']):.3g}"
    )


def describe_end(record: Record) -> str:
    """How a run ended, in one line."""
    name = record.request.backend + (f" repeat {record.request.repeat}" if record.request.repeat else "")
    if record.status == "completed":
        measured = [step for step in record.steps if not step.warmup]
        seconds = sum(step.seconds for step in measured)
        speed = f"{sum(step.tokens for step in measured) / seconds:,.0f} tokens/s, " if seconds else ""
        cached = ", loaded from cache" if record.load and record.load.from_cache else ""
        return f"{name}: completed in {record.wall_seconds:.0f} s, {speed}{len(record.steps)} steps{cached}"
    if record.status == "skipped":
        return f"{name}: skipped: {record.message}"
    return f"{name}: {record.status.replace('_', ' ')} in stage {record.stage}: {record.message}"
