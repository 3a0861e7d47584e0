"""The parent's side of a run: a fresh worker process, its events, and one record whatever happens.

The parent waits without using the processor, keeps every event as it arrives, and writes the record
itself: from the worker's own outcome, or from exit status, signal, timeout and the tail of stderr.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from bench.probe.machine import REPOSITORY
from bench.record.schema import Memory, Record
from bench.run.events import parse_event
from bench.run.order import Order

STDERR_TAIL_BYTES = 4000
GRACE_SECONDS = 5.0
"""Between asking a worker to end and killing it."""
Listener = Callable[[Mapping[str, Any]], None]


@dataclass
class Told:
    """What a worker has told so far."""

    stage: str = "launch"
    status: str | None = None
    message: str | None = None
    sections: dict[str, Any] = field(default_factory=dict)
    steps: list[Any] = field(default_factory=list)
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
            case "readings":
                self.memory["readings"] += event["readings"]
                self.memory["phase_step"] = event.get("phase_step", self.memory.get("phase_step"))
            case "bytes_by_kind":
                self.memory["bytes_by_kind"] = event["value"]
            case "process_peak":
                self.memory["process_peak_resident_bytes"] = event["bytes"]
            case "outcome":
                self.status, self.message = event["status"], event["message"]


@dataclass(frozen=True)
class Ending:
    """How a worker process ended, as the operating system saw it."""

    exit_code: int | None
    timed_out: bool
    stderr_tail: str | None


def run_one(order: Order, listener: Listener = lambda event: None) -> Record:
    """Run one order in a fresh worker and return its record.

    A packed checkpoint that is missing is made first, in a process of its own. Raises KeyboardInterrupt
    only after the worker has been stopped; the record of the interrupted run is the exception's argument.
    """
    began, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    told = Told()
    prepare_seconds = None
    interrupted = False
    ending = Ending(exit_code=0, timed_out=False, stderr_tail=None)
    try:
        if _must_prepare(order):
            ending = _work(order, told, listener, began, "--prepare")
            prepare_seconds = time.monotonic() - began
            if told.status == "completed":
                told = Told()
        if told.status is None and not ending.timed_out and ending.exit_code == 0:
            order = _with_reference(order, listener)
            ending = _work(order, told, listener, time.monotonic())
    except KeyboardInterrupt:
        interrupted = True
    record = _record(order, told, ending, interrupted, prepare_seconds, started_at, time.monotonic() - began)
    if interrupted:
        raise KeyboardInterrupt(record)
    return record


def _must_prepare(order: Order) -> bool:
    from bench.ask.packing import read_manifest

    return (
        order.request.calibration in ("rtn", "calibrated")
        and order.packed_folder is not None
        and read_manifest(order.packed_folder) is None
    )


def _with_reference(order: Order, listener: Listener) -> Order:
    """The order, once the unquantized reference that it is compared with is there; else with the reason why
    it is not. A reference that cannot be made costs the run nothing but the comparison."""
    if order.reference_request is None or order.reference_file is None or order.reference_file.is_file():
        return order
    making = Order(
        request=order.reference_request,
        model_folder=order.model_folder,
        reference_file=order.reference_file,
    )
    told = Told()
    ending = _work(making, told, listener, time.monotonic(), "--reference")
    status, message = _outcome(making, told, ending, interrupted=False)
    if status == "completed":
        return order
    why = f"the unquantized reference could not be made: {status}: {message}"
    return order.model_copy(update={"reference_note": why})


def _work(order: Order, told: Told, listener: Listener, began: float, work: str | None = None) -> Ending:
    """One worker process from start to end. ``work``: the worker's flag; None: measure."""
    with tempfile.TemporaryDirectory(prefix="qlora-bench-") as scratch:
        order_file = Path(scratch) / "order.json"
        order_file.write_text(order.model_dump_json(), encoding="utf-8")
        log = Path(scratch) / "output.log"
        read_end, write_end = os.pipe()
        command = [
            sys.executable,
            "-m",
            "bench.run.worker",
            str(order_file),
            str(write_end),
            *([work] if work else []),
        ]
        with log.open("wb") as output, os.fdopen(read_end, "rb") as events:
            try:
                # A session of its own: Ctrl-C reaches the parent alone, which then ends the whole group.
                process = subprocess.Popen(
                    command,
                    stdin=subprocess.PIPE,
                    stdout=output,
                    stderr=output,
                    pass_fds=[write_end],
                    start_new_session=True,
                    env={**os.environ, "PYTHONPATH": _python_path()},
                )
            finally:
                os.close(write_end)
            try:
                deadline = began + order.request.timeout_seconds
                timed_out = not _listen(events, told, listener, deadline)
                if not timed_out:
                    timed_out = not _wait(process, max(0.0, deadline - time.monotonic()))
            finally:
                _end(process)
        return Ending(process.returncode, timed_out, _tail(log))


def _listen(events: Any, told: Told, listener: Listener, deadline: float) -> bool:
    """Take events until the pipe closes. False: the deadline came first."""
    os.set_blocking(events.fileno(), False)
    rest = b""
    with selectors.DefaultSelector() as selector:
        selector.register(events, selectors.EVENT_READ)
        while True:
            if not selector.select(max(0.0, deadline - time.monotonic())):
                if time.monotonic() >= deadline:
                    return False
                continue
            chunk = events.read(65536)
            if chunk == b"":
                return True
            if chunk is None:
                continue
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                event = parse_event(line.decode("utf-8", errors="replace"))
                if event is not None:
                    with contextlib.suppress(KeyError, TypeError):  # an event of a shape we do not know
                        told.take(event)
                    listener(event)


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def _end(process: subprocess.Popen[bytes]) -> None:
    """Make sure that no process of the worker's group is left, and reap it."""
    for sent, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, None)):
        if process.poll() is not None:
            break
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sent)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(patience)
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    if process.stdin:
        process.stdin.close()


def _record(
    order: Order,
    told: Told,
    ending: Ending,
    interrupted: bool,
    prepare_seconds: float | None,
    started_at: str,
    wall_seconds: float,
) -> Record:
    """The record of a run from everything known about it."""
    status, message = _outcome(order, told, ending, interrupted)
    sections = {name: value for name, value in told.sections.items() if name in Record.model_fields}
    if "load" in sections and prepare_seconds is not None:
        sections["load"]["prepare_seconds"] = prepare_seconds
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


def _outcome(order: Order, told: Told, ending: Ending, interrupted: bool) -> tuple[str, str | None]:
    if interrupted:
        return "interrupted", "stopped by the user"
    if told.status is not None:
        return told.status, told.message
    if ending.timed_out:
        return "timeout", f"no result within {order.request.timeout_seconds:g} s"
    if ending.exit_code is not None and ending.exit_code < 0:
        number = -ending.exit_code
        name = signal.Signals(number).name if number in set(signal.Signals) else f"signal {number}"
        hint = " (the system may have run out of memory)" if number == signal.SIGKILL else ""
        return "crashed", f"the worker was ended by {name}{hint}"
    return "crashed", f"the worker ended with code {ending.exit_code} and told no outcome"


def _tail(log: Path) -> str | None:
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - STDERR_TAIL_BYTES))
        text = stream.read().decode("utf-8", errors="replace").strip()
    return text or None


def _python_path() -> str:
    """The worker finds the same harness as the parent, installed or not."""
    present = os.environ.get("PYTHONPATH")
    return f"{REPOSITORY}{os.pathsep}{present}" if present else str(REPOSITORY)
