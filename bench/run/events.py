"""What a worker tells its parent, one JSON object a line on a pipe of its own.

The parent builds the record from these lines, so whatever was told before a worker died is kept.
Events: ``stage`` (name), ``section`` (a part of the record, by name), ``step`` (one training step),
``readings`` (memory readings), ``bytes_by_kind`` (tensors counted), ``process_peak``, ``depth_step`` (one
step of one depth, where several take turns), ``rank`` (which process, under torchrun), ``progress`` (for the
display only), ``outcome`` (how it ended).
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import Any

from pydantic import BaseModel


class Channel:
    """The worker's end of the pipe."""

    def __init__(self, descriptor: int) -> None:
        self._stream = os.fdopen(descriptor, "w", encoding="utf-8", buffering=1)

    def send(self, event: str, **content: Any) -> None:
        """Write one event; values may be records, which serialize themselves."""
        body = {name: _plain(value) for name, value in content.items()}
        self._stream.write(json.dumps({"event": event, **body}, allow_nan=False) + "\n")

    def stage(self, name: str) -> None:
        """Say which stage begins."""
        self.send("stage", name=name)

    def section(self, name: str, value: BaseModel | Sequence[BaseModel] | bool) -> None:
        """Deliver a finished part of the record."""
        self.send("section", name=name, value=value)


def _plain(value: Any) -> Any:
    if isinstance(value, BaseModel):
        # model_dump_json writes non-finite numbers as strings; model_dump would leave them as floats.
        return json.loads(value.model_dump_json())
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value


MOST_LINE_BYTES = 64 * 2**20
"""Hundreds of times what the longest event takes. A line that goes on is no event, and its reader must not be
filled with it."""


class Lines:
    """Cuts what comes out of a pipe into lines. One that is longer than any event is passed over."""

    def __init__(self) -> None:
        self._pieces: list[bytes] = []
        self._bytes = 0

    def take(self, chunk: bytes) -> list[bytes]:
        """The lines that end in ``chunk``, without their ends."""
        *ended, rest = chunk.split(b"\n")
        lines = []
        for piece in ended:
            self._add(piece)
            if self._bytes <= MOST_LINE_BYTES:
                lines.append(b"".join(self._pieces))
            self._pieces, self._bytes = [], 0
        self._add(rest)
        return lines

    def _add(self, piece: bytes) -> None:
        self._bytes += len(piece)
        if self._bytes > MOST_LINE_BYTES:
            self._pieces = []
        elif piece:
            self._pieces.append(piece)


def parse_event(line: str) -> dict[str, Any] | None:
    """One event, or None for a line that is none (a library that found the pipe and wrote to it)."""
    try:
        body = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return body if isinstance(body, dict) and isinstance(body.get("event"), str) else None
