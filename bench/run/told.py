"""What a worker has told, and the record that its parent makes of it, whatever became of the worker."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, get_args

from pydantic import ValidationError

from bench.record.depths import DepthTimes, times_key
from bench.record.schema import Record, Stage, Status
from bench.record.surroundings import Surroundings
from bench.run.order import Order

SECTIONS = frozenset({
    "environment", "placement", "quantization", "load", "lora", "workload", "proof", "first_failure",
    "trainable_weights_finite", "replay", "fidelity", "stress",
})  # fmt: skip
"""Parts of a record that a worker tells. What was asked, how it ended and when is for its parent to say."""
OF_A_COMPLETE_RUN = ("environment", "quantization", "load", "lora", "workload", "trainable_weights_finite")
"""Without these nobody has trained to the end, whatever was told."""


def _no_memory() -> dict[str, Any]:
    return {"readings": [], "bytes_by_kind": []}


@dataclass
class Told:
    """What a worker has told so far."""

    stage: str = "launch"
    status: str | None = None
    message: str | None = None
    sections: dict[str, Any] = field(default_factory=dict)
    surroundings: Surroundings | None = None
    """What the parent itself saw of the machine."""
    steps: list[Any] = field(default_factory=list)
    depth_steps: list[Mapping[str, Any]] = field(default_factory=list)
    """Events of ``bench.run.depths``: depth, round and step."""
    memory: dict[str, Any] = field(default_factory=_no_memory)

    def take(self, event: Mapping[str, Any]) -> None:
        """Keep one event."""
        match event["event"]:
            case "stage":
                self.stage = str(event["name"])
            case "section":
                self.sections[event["name"]] = event["value"]
            case "step":
                self.steps.append(event["step"])
            case "depth_step":
                self.depth_steps.append(event)
            case "readings":
                self.memory["readings"] += event["readings"]
                self.memory["phase_step"] = event.get("phase_step", self.memory.get("phase_step"))
            case "bytes_by_kind":
                self.memory["bytes_by_kind"] = event["value"]
            case "process_peak":
                self.memory["process_peak_resident_bytes"] = event["bytes"]
            case "allocator":
                self.memory |= event["counts"]
            # Whatever becomes of what follows a training that is complete, it is complete.
            case "outcome" if self.status != "completed":
                self.status, self.message = str(event["status"]), _text(event["message"])

    def forget(self) -> None:
        """Let go of everything but the stage."""
        self.status = self.message = None
        self.sections.clear()
        self.steps.clear()
        self.depth_steps.clear()
        self.memory = _no_memory()

    def fail(self, message: str) -> None:
        """An error on the parent's side, which counts unless the worker had told its outcome."""
        if self.status is None:
            self.status, self.message = "error", message


@dataclass(frozen=True)
class Ending:
    """How a worker process ended, as the operating system saw it."""

    exit_code: int | None
    timed_out: bool
    stderr_tail: str | None


def record_of(
    order: Order,
    told: Told,
    ending: Ending,
    interrupted: bool,
    prepare_seconds: float | None,
    started_at: str,
    wall_seconds: float,
) -> Record:
    """The record of a run from everything known about it."""
    status, message = outcome_of(order, told, ending, interrupted)
    parts = {name: value for name, value in told.sections.items() if name in SECTIONS}
    if prepare_seconds is not None and isinstance(parts.get("load"), dict):
        parts["load"]["prepare_seconds"] = prepare_seconds
    if status == "completed":
        parts |= _cut_short(order, told, ending, parts)
        if (why := _unfinished(order, told)) is not None:
            status, message = "crashed", why
    known = {
        "key": order.request.key,
        "command": order.request.command,
        "request": order.request,
        "exit_code": ending.exit_code,
        "started_at": started_at,
        "wall_seconds": wall_seconds,
        "surroundings": told.surroundings,
    }
    parts |= {"memory": told.memory, "steps": told.steps}
    while True:
        ended = {
            "status": status,
            "stage": None if status == "completed" else _stage(told),
            "message": message,
            "stderr_tail": None if status == "completed" else ending.stderr_tail,
        }
        try:
            return Record.model_validate({**parts, **known, **ended})
        except ValidationError as error:
            spoilt = {str(one["loc"][0]) for one in error.errors(include_url=False)} & set(parts)
            if not spoilt:
                raise
            # What else was told is worth keeping.
            parts = {name: value for name, value in parts.items() if name not in spoilt}
            if status == "completed":
                status, message = "crashed", f"the worker told something that is no record: {_first(error)}"


def _first(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"


def _unfinished(order: Order, told: Told) -> str | None:
    """Why a run that was told to be complete is not; None: it is."""
    said = "the worker said that the run was complete"
    steps, wanted = len(told.steps), order.request.workload.steps
    if steps != wanted:
        return f"{said} after {steps} of {wanted} steps"
    absent = [name for name in OF_A_COMPLETE_RUN if name not in told.sections]
    return f"{said} and told nothing of: {', '.join(absent)}" if absent else None


def _stage(told: Told) -> str:
    return told.stage if told.stage in get_args(Stage) else "launch"


def _text(value: object) -> str | None:
    """A message on one line, of characters that can be written."""
    if value is None:
        return None
    return " ".join(str(value).encode("utf-8", "backslashreplace").decode().split())


def times_of(order: Order, told: Told, ending: Ending, started_at: str, wall_seconds: float) -> DepthTimes:
    """What a worker that timed depths told, whatever became of it."""
    turns = order.turns
    assert turns is not None
    status, message = outcome_of(order, told, ending, interrupted=False)
    places = range(max((event["round"] + 1 for event in told.depth_steps), default=0))
    steps = {(event["depth"], event["round"]): event["step"] for event in told.depth_steps}
    seconds: dict[int, list[float | None]] = {depth: [None] * len(places) for depth in turns.depths}
    losses: dict[int, list[float | None]] = {depth: [None] * len(places) for depth in turns.depths}
    for (depth, place), step in steps.items():
        seconds[depth][place] = step["seconds"]
        losses[depth][place] = sum(map(float, step["losses"])) / len(step["losses"])
    return DepthTimes.model_validate(
        {
            "key": times_key(order.request, turns),
            "request": order.request,
            "turns": turns,
            "status": status,
            "message": message,
            "seconds": seconds,
            "losses": losses,
            "tokens_per_step": told.depth_steps[-1]["step"]["tokens"] if told.depth_steps else None,
            "started_at": started_at,
            "wall_seconds": wall_seconds,
        }
    )


def _cut_short(order: Order, told: Told, ending: Ending, sections: dict[str, Any]) -> dict[str, Any]:
    """What the worker was looking into after its last step when it ended, with the reason why it is not
    finished. The run itself is complete."""
    if ending.exit_code == 0 and not ending.timed_out:
        return {}
    unfinished = Told(stage=told.stage)
    _, why = outcome_of(order, unfinished, ending, interrupted=False)
    match told.stage:
        case "compare" if "fidelity" not in sections:
            return {"fidelity": {"note": why}}
        case "replay":
            return {"replay": {"reproduced": False, **sections.get("replay", {}), "error": why}}
    return {}


def outcome_of(order: Order, told: Told, ending: Ending, interrupted: bool) -> tuple[str, str | None]:
    """Status and message: the worker's own, else what the operating system saw."""
    if interrupted:
        return "interrupted", "stopped by the user"
    if told.status in get_args(Status):
        return str(told.status), told.message
    if told.status is not None:
        return "crashed", f"the worker told an outcome that is none: '{told.status:.60}'"
    if ending.timed_out:
        return "timeout", f"no result within {order.request.timeout_seconds:g} s"
    return "crashed", f"the worker {ended_in_words(ending.exit_code)}"


def ended_in_words(exit_code: int | None) -> str:
    """How a process ended that told no outcome. None: its exit code is not known."""
    if exit_code is not None and exit_code < 0:
        number = -exit_code
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        hint = " (the system may have run out of memory)" if number == signal.SIGKILL else ""
        return f"was ended by {name}{hint}"
    return f"ended{'' if exit_code is None else f' with code {exit_code}'} and told no outcome"
