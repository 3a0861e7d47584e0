"""The parent's side of a run: a fresh worker process, its events, and one record whatever happens.

The parent waits without using the processor, keeps every event as it arrives, and writes the record
itself: from the worker's own outcome, or from exit status, signal, timeout and the tail of stderr.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path

from bench.probe.surroundings import Witness
from bench.record.depths import DepthTimes
from bench.record.schema import Record
from bench.run.environments import command_in
from bench.run.interruption import held_back
from bench.run.listening import Listener, listen
from bench.run.order import Order
from bench.run.ranks import processes_of
from bench.run.told import Ending, Told, outcome_of, record_of, times_of

STDERR_TAIL_BYTES = 4000
GRACE_SECONDS = 5.0
"""Between asking a worker to end and killing it."""
KILL_SECONDS = 120.0
"""For the system to end a worker that was killed: it gives back as much memory as the machine has."""
STILL_WELL = Ending(exit_code=0, timed_out=False, stderr_tail=None)
"""Before any worker."""
NO_WORKER = Ending(exit_code=None, timed_out=False, stderr_tail=None)


def run_one(order: Order, listener: Listener = lambda event: None) -> Record:
    """Run one order in a fresh worker and return its record.

    A packed checkpoint that is missing is made first, in a process of its own. Raises KeyboardInterrupt
    only after the worker has been stopped; the record of the run is the exception's argument.
    """
    began, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    told = Told()
    prepare_seconds = None
    interrupted = False
    ending = STILL_WELL
    try:
        if _must_prepare(order):
            ending = _work(_prepared(order), told, listener, began, "--prepare")
            prepare_seconds = time.monotonic() - began
            if told.status == "completed":
                told = Told()
        if told.status is None and not ending.timed_out and ending.exit_code == 0:
            order = _with_reference(order, listener)
            ending = _witnessed(order, told, listener)
    except KeyboardInterrupt:
        interrupted = True
    with held_back() as hold:
        record = record_of(
            order, told, ending, interrupted, prepare_seconds, started_at, time.monotonic() - began
        )
        hold.carried = (record,)
    if interrupted:
        raise KeyboardInterrupt(record)
    return record


def time_depths(order: Order, listener: Listener = lambda event: None) -> DepthTimes:
    """Time the turns of ``order`` in a fresh worker. A packed checkpoint that is missing is made first.

    Raises KeyboardInterrupt after the worker has been stopped.
    """
    began, started_at = time.monotonic(), datetime.now(UTC).isoformat(timespec="seconds")
    told, ending = Told(), STILL_WELL
    if _must_prepare(order):
        ending = _work(_prepared(order), told, listener, began, "--prepare")
        if told.status == "completed":
            told = Told()
    if told.status is None and not ending.timed_out and ending.exit_code == 0:
        ending = _work(order, told, listener, time.monotonic(), "--depths")
    return times_of(order, told, ending, started_at, time.monotonic() - began)


def work_alone(
    order: Order, work: str, listener: Listener = lambda event: None
) -> tuple[Told, Ending]:
    """One worker process for ``work``, the worker's flag: what it told and how it ended.

    Raises KeyboardInterrupt after the worker has been stopped.
    """
    told = Told()
    return told, _work(order, told, listener, time.monotonic(), work)


def _witnessed(order: Order, told: Told, listener: Listener) -> Ending:
    """The run itself, and what else went on on the machine meanwhile."""
    witness = Witness(order.request)
    try:
        return _train(order, told, witness.beside(listener))
    finally:
        witness.close()
        told.surroundings = witness.found


def _train(order: Order, told: Told, listener: Listener) -> Ending:
    """The run itself, in one process or in as many as its placement says."""
    from bench.run.torchrun import work_together  # which imports this module

    if processes_of(order.request) > 1:
        return _guarded(told, lambda: work_together(order, told, listener, time.monotonic()))
    return _work(order, told, listener, time.monotonic())


def _prepared(order: Order) -> Order:
    """The order that makes the packed checkpoint of ``order``."""
    return order.model_copy(update={"request": order.packing_request or order.request})


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
    if processes_of(order.request) > 1:
        return order  # which is compared with nothing
    making = Order(
        request=order.reference_request,
        model_folder=order.model_folder,
        reference_file=order.reference_file,
    )
    told = Told()
    ending = _work(making, told, listener, time.monotonic(), "--reference")
    status, message = outcome_of(making, told, ending, interrupted=False)
    if status == "completed":
        return order
    why = f"the unquantized reference could not be made: {status}: {message}"
    return order.model_copy(update={"reference_note": why})


def _work(order: Order, told: Told, listener: Listener, began: float, work: str | None = None) -> Ending:
    """One worker process from start to end. ``work``: the worker's flag; None: measure."""
    return _guarded(told, lambda: _attended(order, told, listener, began, work))


def _guarded(told: Told, work: Callable[[], Ending]) -> Ending:
    """Do the work of a run. What fails on this side of it is told as its outcome, so that the other runs go
    on."""
    try:
        return work()
    except BrokenPipeError:
        raise  # of the display: whoever read it has gone
    except OSError as error:
        told.fail(f"the worker could not be started or heard: {error}")
    except MemoryError:
        told.forget()
        told.fail("the command itself, not the worker, ran out of memory while it listened")
    return NO_WORKER


def _attended(order: Order, told: Told, listener: Listener, began: float, work: str | None) -> Ending:
    with tempfile.TemporaryDirectory(prefix="qlora-bench-", ignore_cleanup_errors=True) as scratch:
        order_file = Path(scratch) / "order.json"
        order_file.write_text(order.model_dump_json(), encoding="utf-8")
        log = Path(scratch) / "output.log"
        interpreter, variables = command_in(order.request.environment, Path(scratch))
        read_end, write_end = os.pipe()
        command = [
            interpreter,
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
                    env={**variables, **order.variables},
                )
            finally:
                os.close(write_end)
            try:
                deadline = began + order.request.timeout_seconds
                timed_out = not listen(events, process, told, listener, deadline)
                if not timed_out:
                    timed_out = not _wait(process, max(0.0, deadline - time.monotonic()))
            finally:
                end(process)
        return Ending(process.returncode, timed_out, tail(log))


def _wait(process: subprocess.Popen[bytes], seconds: float) -> bool:
    try:
        process.wait(seconds)
    except subprocess.TimeoutExpired:
        return False
    return True


def end(process: subprocess.Popen[bytes]) -> None:
    """Make sure that no process of the worker's group is left, and reap it. One that the system cannot end
    (it waits for a card or a disk that is gone) is left behind after a while: its run must have a record too.
    """
    for sent, patience in ((signal.SIGTERM, GRACE_SECONDS), (signal.SIGKILL, KILL_SECONDS)):
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


def tail(log: Path) -> str | None:
    """The last of what was written to a log; None: nothing was."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - STDERR_TAIL_BYTES))
        text = stream.read().decode("utf-8", errors="replace").strip()
    return text or None
