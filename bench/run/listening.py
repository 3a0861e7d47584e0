"""The parent's ear: events out of a worker's pipe, until it closes or the worker's time is over.

    in_time = listen(events, process, told, listener, deadline)

Whatever comes out of the pipe, only events of a known shape are kept. ``bench.run.launch`` uses it.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import subprocess
import time
from collections.abc import Callable, Mapping
from typing import Any, BinaryIO

from bench.run.events import Lines, parse_event
from bench.run.told import Told

Listener = Callable[[Mapping[str, Any]], None]
LOOK_SECONDS = 1.0
"""Between two looks at whether a silent worker is still there: a process that it left behind can hold its
pipe open."""


def listen(
    events: BinaryIO, process: subprocess.Popen[bytes], told: Told, listener: Listener, deadline: float
) -> bool:
    """Take events until the pipe closes, or the worker has ended and nothing more comes. False: the deadline
    came first."""
    os.set_blocking(events.fileno(), False)
    lines = Lines()
    with selectors.DefaultSelector() as selector:
        selector.register(events, selectors.EVENT_READ)
        while (left := deadline - time.monotonic()) > 0:
            if not selector.select(min(LOOK_SECONDS, left)):
                if process.poll() is not None:
                    return True
                continue
            chunk: bytes | None = events.read(65536)
            if chunk == b"":
                return True
            for line in lines.take(chunk or b""):
                _hear(line, told, listener)
    return False


def _hear(line: bytes, told: Told, listener: Listener) -> None:
    """Keep the event in a line, if it is one. A library that has found the pipe can write anything: what has
    another shape than ours ends neither the run nor its display."""
    event = parse_event(line.decode("utf-8", errors="replace"))
    if event is not None:
        with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
            told.take(event)
            listener(event)
