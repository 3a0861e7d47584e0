"""One run as a Ray task, on the node that carries it out (``bench.run.ray_executor`` is the other side).

The task finds the model and the caches of its machine, looks at its cards, and starts the same fresh worker
process as ever; the worker never knows of Ray. The record goes back as JSON, events through a queue.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Protocol

from pydantic import BaseModel

from bench.ask.plan import RunRequest
from bench.errors import UserError
from bench.load.registry import find_backends
from bench.probe.machine import cuda_devices
from bench.record.preflight import Preflight
from bench.record.schema import Record
from bench.run.here import moved_here
from bench.run.launch import STILL_WELL, run_one
from bench.run.order import Order
from bench.run.preflight import Examiner
from bench.run.sweep import not_started, obstacle, with_preflight
from bench.run.told import Told, record_of

SHOWN = ("stage", "progress", "step")
"""Events that a display takes. The others, with all their figures, are in the record."""
SHOWN_OF_A_STEP = ("index", "losses", "tokens", "seconds", "gradient_norm")


class Home(BaseModel):
    """What a run takes over from the command that asked for it."""

    folder: Path
    """Paths are relative to it."""
    omp_num_threads: str | None
    """OMP_NUM_THREADS there. Ray sets its own, which is no part of the run."""
    preflight: bool
    """Whether the cards are looked at."""


class Outcome(BaseModel):
    """What the task returns."""

    record: Record
    cards: str
    """Names the node and its cards that the run had: what the preflight found is true of these."""


class Queue(Protocol):
    """Where messages go: ``ray.util.queue.Queue``."""

    def put(self, item: Any, block: bool = True) -> None:
        """Add one."""


class Teller:
    """Sends messages about one run. None is worth a run: what cannot be sent is lost."""

    def __init__(self, queue: Queue, key: str) -> None:
        self._queue, self._key = queue, key

    def tell(self, kind: str, content: Any) -> None:
        """Send one message."""
        with contextlib.suppress(Exception):  # of Ray, whose queue has died with its command
            self._queue.put((self._key, kind, content))

    def listen(self, event: Mapping[str, Any]) -> None:
        """Pass on what a display shows of an event."""
        if event["event"] in SHOWN:
            self.tell("event", shown_part(event))


def shown_part(event: Mapping[str, Any]) -> dict[str, Any]:
    """An event without what nobody looks at while the run goes."""
    if event["event"] != "step":
        return dict(event)
    return {"event": "step", "step": {name: event["step"][name] for name in SHOWN_OF_A_STEP}}


def run_there(order: str, home: str, queue: Queue, seen: Mapping[str, str]) -> str:
    """The task. ``order``, ``home``: as JSON. ``seen``: preflights as JSON, by `Outcome.cards`.

    Returns an `Outcome` as JSON, that of an interrupted run included.
    """
    import ray

    asked, own = Order.model_validate_json(order), Home.model_validate_json(home)
    teller = Teller(queue, asked.request.key)
    take_over(own)
    cards = f"{ray.get_runtime_context().get_node_id()} {os.environ.get('CUDA_VISIBLE_DEVICES', 'all')}"
    teller.tell("began", machine_name())
    known = Preflight.model_validate_json(seen[cards]) if cards in seen else None
    try:
        record = carried_out(asked, own, teller, known)
    except KeyboardInterrupt as interruption:
        record = interruption.args[0] if interruption.args else interrupted(asked)
        # Of a task that was cancelled Ray may not hand over what it returned.
        teller.tell("interrupted", record.model_dump_json())
    return Outcome(record=record, cards=cards).model_dump_json()


def carried_out(asked: Order, own: Home, teller: Teller, known: Preflight | None) -> Record:
    """The record of a run on this machine. ``known``: what was found about these cards before.

    Raises KeyboardInterrupt as ``bench.run.launch.run_one`` does.
    """
    request = asked.request
    try:
        order = moved_here(asked)
    except UserError as error:
        return not_started(request, "unavailable", str(error))
    if (reason := _obstacle(request)) is not None:
        return not_started(request, "unavailable", f"{reason} (on {socket.gethostname()})")
    found = known or _examined(request, own, teller)
    if found is not None and found.stopped:
        return with_preflight(not_started(request, "error", found.stopped), found)
    try:
        return with_preflight(run_one(order, teller.listen), found)
    except KeyboardInterrupt as interruption:
        if interruption.args:
            raise KeyboardInterrupt(with_preflight(interruption.args[0], found)) from None
        raise


def _examined(request: RunRequest, own: Home, teller: Teller) -> Preflight | None:
    """What is found about the cards of this run."""
    return Examiner(skip=not own.preflight).find([request], _Onlooker(teller))


def _obstacle(request: RunRequest) -> str | None:
    entry = find_backends().get(request.backend)
    return f"backend '{request.backend}' is not installed" if entry is None else obstacle(request, entry)


class _Onlooker:
    """Tells that the cards are looked at; what is found is in the record."""

    def __init__(self, teller: Teller) -> None:
        self._teller = teller

    def examining(self, cards: int) -> None:
        """It begins."""
        what = f"looking at {cards} {'card' if cards == 1 else 'cards'}"
        self._teller.tell("event", {"event": "stage", "name": what})

    def examined(self, preflight: Preflight) -> None:
        """It has ended."""
        self._teller.tell("event", {"event": "stage", "name": "launch"})


def take_over(home: Home) -> None:
    """Make this process as the command's own would be: a Ray worker is used for one run after another, each
    with other cards."""
    with contextlib.suppress(OSError):  # what is missed then, a file of the person's, is said by name
        os.chdir(home.folder)
    if home.omp_num_threads is None:
        os.environ.pop("OMP_NUM_THREADS", None)
    else:
        os.environ["OMP_NUM_THREADS"] = home.omp_num_threads
    cuda_devices.cache_clear()


def interrupted(order: Order) -> Record:
    """The record of a run that was interrupted before anything is known of it."""
    now = datetime.now(UTC).isoformat(timespec="seconds")
    return record_of(order, Told(), STILL_WELL, True, None, now, 0.0)


def machine_name() -> str:
    """The same for everything that shares this machine's processors: several nodes of a cluster can."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return socket.gethostname()
