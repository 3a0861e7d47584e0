"""A run of several processes: torchrun starts them, and each tells its events on a pipe of its own.

    ending = work_together(order, told, listener, began)

The parent's side, as ``bench.run.launch`` is for one process. torchrun gives its processes none of the
parent's descriptors, so each rank opens a named pipe; their standard input they do inherit, and when it ends
each ends itself. Everything goes over the loopback interface.
"""

from __future__ import annotations

import contextlib
import os
import re
import selectors
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import psutil

from bench.run.environments import command_in
from bench.run.events import Lines, parse_event
from bench.run.launch import end, tail
from bench.run.order import Order
from bench.run.ranks import Ranks, processes_of
from bench.run.told import Ending, Told, ended_in_words

Listener = Callable[[Mapping[str, Any]], None]
LOOPBACK = "127.0.0.1"
LOGS = "logs"
PATIENCE_SECONDS = 15.0
"""For the other ranks, once one has failed: they may be waiting for it."""
LOOK_SECONDS = 0.2
"""Between two looks at whether the launcher is still there."""
REPORTED = re.compile(r"rank\s*:\s*(\d+) \(local_rank: \d+\)\s*\n\s*exitcode\s*:\s*(-?\d+)")
"""A failed process in torchrun's own report."""


def work_together(order: Order, told: Told, listener: Listener, began: float) -> Ending:
    """All processes of one run from start to end; ``told`` is filled even where this is interrupted."""
    count = processes_of(order.request)
    ranks = Ranks(count)
    with tempfile.TemporaryDirectory(prefix="qlora-bench-") as scratch, contextlib.ExitStack() as pipes:
        folder = Path(scratch)
        (folder / "order.json").write_text(order.model_dump_json(), encoding="utf-8")
        streams = {rank: pipes.enter_context(_open_pipe(pipe_of(folder, rank))) for rank in range(count)}
        log = folder / "output.log"
        interpreter, variables = command_in(order.request.environment, folder)
        worker = ["-m", "bench.run.worker", str(folder / "order.json"), str(folder)]
        with log.open("wb") as output:
            process = subprocess.Popen(
                launcher_command(interpreter, folder, count, worker),
                stdin=subprocess.PIPE,
                stdout=output,
                stderr=output,
                start_new_session=True,
                env={**network(), **variables, **_threads(order, count)},
            )
        family = Family(process)
        try:
            timed_out = not _listen(streams, process, ranks, family, listener, began, order)
        finally:
            family.end()
            ranks.settle(told)
        codes = {int(rank): int(code) for rank, code in REPORTED.findall(_text(log))}
        failing = ranks.failing
        _explain(told, ranks, codes, timed_out=timed_out, seconds=order.request.timeout_seconds)
        code = process.returncode if failing is None else codes.get(failing, process.returncode)
        return Ending(code, timed_out, _said(folder, failing) or tail(log))


def pipe_of(folder: Path, rank: int) -> Path:
    """Where a rank tells its events."""
    return folder / f"rank-{rank}.events"


class Family:
    """torchrun and the processes that it started, each of which has a session of its own."""

    def __init__(self, process: subprocess.Popen[bytes]) -> None:
        self._process = process
        self._ranks: list[psutil.Process] = []

    def add(self, pid: int) -> None:
        """A rank that has told its number."""
        with contextlib.suppress(psutil.NoSuchProcess):
            self._ranks.append(psutil.Process(pid))

    def end(self) -> None:
        """Make sure that none is left, and reap the launcher."""
        known = {child.pid: child for child in self._ranks}
        with contextlib.suppress(psutil.NoSuchProcess):
            launcher = psutil.Process(self._process.pid)
            known |= {child.pid: child for child in launcher.children(recursive=True)}
        end(self._process)
        for child in known.values():
            # psutil compares the time of creation: a number that was given away again is left alone.
            with contextlib.suppress(psutil.NoSuchProcess):
                child.kill()
        psutil.wait_procs(known.values(), timeout=PATIENCE_SECONDS)


def launcher_command(interpreter: str, folder: Path, count: int, program: list[str]) -> list[str]:
    """torchrun of an interpreter, with ``program`` in ``count`` processes of this machine. Their output goes
    into ``folder``."""
    launcher = {
        "nnodes": "1",
        "nproc-per-node": str(count),
        "max-restarts": "0",
        "rdzv-backend": "c10d",
        "rdzv-endpoint": f"{LOOPBACK}:0",  # 0: a free port
        "rdzv-id": folder.name,
        "local-addr": LOOPBACK,
        "log-dir": str(folder / LOGS),
        "redirects": "3",  # both streams of each rank, to files of its own
    }
    flags = [f"--{name}={value}" for name, value in launcher.items()]
    return [interpreter, "-m", "torch.distributed.run", *flags, *program]


def network() -> dict[str, str]:
    """Variables that name the interface of the loopback address: gloo and NCCL would otherwise ask for the
    host's name, which a container may not resolve."""
    names = [
        name
        for name, addresses in psutil.net_if_addrs().items()
        if any(a.family == socket.AF_INET and a.address == LOOPBACK for a in addresses)
    ]
    return {f"{user}_SOCKET_IFNAME": names[0] for user in ("GLOO", "NCCL")} if names else {}


def _threads(order: Order, count: int) -> dict[str, str]:
    return {"OMP_NUM_THREADS": str(threads_of(order.request.cpu_threads, count))}


def threads_of(cpu_threads: int, count: int) -> int:
    """Threads of each of ``count`` processes: they share the cores."""
    return max(1, cpu_threads // count)


def _open_pipe(path: Path) -> BinaryIO:
    """The reading end of a new named pipe, which does not wait for a writer."""
    os.mkfifo(path, 0o600)
    return os.fdopen(os.open(path, os.O_RDONLY | os.O_NONBLOCK), "rb", buffering=0)


def _listen(
    streams: Mapping[int, BinaryIO],
    process: subprocess.Popen[bytes],
    ranks: Ranks,
    family: Family,
    listener: Listener,
    began: float,
    order: Order,
) -> bool:
    """Take events until every rank has ended, or until one has failed and the others had their time.
    False: the run's time was over first."""
    deadline, patience = began + order.request.timeout_seconds, float("inf")
    lines = {rank: Lines() for rank in streams}
    with selectors.DefaultSelector() as selector:
        for rank, stream in streams.items():
            selector.register(stream, selectors.EVENT_READ, rank)
        while selector.get_map():
            now = time.monotonic()
            if now >= deadline:
                return False
            if ranks.failing is not None:
                patience = min(patience, now + PATIENCE_SECONDS)
            ready = selector.select(max(0.0, min(LOOK_SECONDS, deadline - now)))
            if not ready and (now >= patience or process.poll() is not None):
                return True
            for key, _ in ready:
                rank, stream = key.data, streams[key.data]
                chunk = stream.read(65536)
                if chunk == b"":
                    ranks.closed(rank, time.monotonic())
                    selector.unregister(stream)
                    continue
                for line in lines[rank].take(chunk or b""):
                    _take(line, rank, ranks, family, listener)
    with contextlib.suppress(subprocess.TimeoutExpired):
        process.wait(max(0.0, min(PATIENCE_SECONDS, deadline - time.monotonic())))
    return True


def _take(line: bytes, rank: int, ranks: Ranks, family: Family, listener: Listener) -> None:
    event = parse_event(line.decode("utf-8", errors="replace"))
    if event is None:
        return
    # an event of a shape we do not know
    with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
        for heard in ranks.take(rank, event):
            listener(heard)
        if event["event"] == "rank":
            family.add(int(event["pid"]))


def _explain(told: Told, ranks: Ranks, codes: Mapping[int, int], *, timed_out: bool, seconds: float) -> None:
    """Say which rank it was, where none of them said why."""
    if told.status is not None:
        return
    failing = ranks.failing
    if failing is not None:
        told.status = "crashed"
        told.message = f"rank {failing} {ended_in_words(codes.get(failing))}"
    elif timed_out:
        told.status = "timeout"
        told.message = f"no result within {seconds:g} s: {ranks.whereabouts}"


def _said(folder: Path, rank: int | None) -> str | None:
    """The end of what a rank wrote: its traceback, where it has one."""
    found = (folder / LOGS).glob(f"*/attempt_0/{rank or 0}/stderr.log")
    return next((text for path in found if (text := tail(path))), None)


def _text(log: Path) -> str:
    """The end of the log, where torchrun reports."""
    with log.open("rb") as stream:
        stream.seek(max(0, log.stat().st_size - 65536))
        return stream.read().decode("utf-8", errors="replace")
