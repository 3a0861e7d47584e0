"""What a worker has told, and the record that its parent makes of it, whatever became of the worker."""

from __future__ import annotations

import signal
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError

from bench.record.depths import DepthTimes, times_key
from bench.record.schema import Memory, Record
from bench.run.order import Order


@dataclass
class Told:
    """What a worker has told so far."""

    stage: str = "launch"
    status: str | None = None
    message: str | None = None
    sections: dict[str, Any] = field(default_factory=dict)
    steps: list[Any] = field(default_factory=list)
    depth_steps: list[Mapping[str, Any]] = field(default_factory=list)
    """Events of ``bench.run.depths``: depth, round and step."""
    memory: dict[str, Any] = field(default_factory=lambda: {"readings": [], "bytes_by_kind": []})

    def take(self, event: Mapping[str, Any]) -> None:
        """Keep one event."""
        match event["event"]:
            case "stage":
                self.stage = event["name"]
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
            case "outcome":
                self.status, self.message = event["status"], event["message"]


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
    sections = {name: value for name, value in told.sections.items() if name in Record.model_fields}
    if "load" in sections and prepare_seconds is not None:
        sections["load"]["prepare_seconds"] = prepare_seconds
    if status == "completed":
        sections |= _cut_short(order, told, ending, sections)
    known = {
        "key": order.request.key,
        "command": order.request.command,
        "request": order.request,
        "status": status,
        "stage": None if status == "completed" else told.stage,
        "message": message,
        "stderr_tail": None if status == "completed" else ending.stderr_tail,
        "exit_code": ending.exit_code,
        "started_at": started_at,
        "wall_seconds": wall_seconds,
    }
    try:
        return Record.model_validate({**known, "memory": told.memory, "steps": told.steps, **sections})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        why = f"the worker told something that is no record: {where}: {first['msg']}"
        return Record.model_validate(
            {**known, "status": "crashed", "stage": told.stage, "message": why, "memory": Memory()}
        )


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
    if told.status is not None:
        return told.status, told.message
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
