"""Where the runs of a sweep are done: one after another here, or as tasks of a Ray cluster.

    with choose_executor("ray", address=None, gpus=1) as executor:
        for record in run_sweep(sweep, watcher, executor): ...

An executor takes jobs lazily, as there is room, so that what earlier runs taught can still decide over later
ones. It saves nothing: only whoever iterates does, so no run is recorded twice.
"""

from __future__ import annotations

import importlib.util
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from types import TracebackType
from typing import Protocol, Self

from bench.ask.plan import RunRequest
from bench.errors import BadValue, MissingLibrary, unknown
from bench.record.schema import Record
from bench.run.launch import run_one
from bench.run.listening import Listener
from bench.run.order import Order

EXECUTORS = ("local", "ray")
RAY_INSTALL_LINE = "pip install 'qlora-bench[ray]'"
ADDRESS = re.compile(r"auto|[^\s:/]+:\d{1,5}|\[[0-9a-fA-F:]+\]:\d{1,5}")
MEMORY = re.compile(r"(?P<size>\d{1,6}(?:\.\d{1,3})?)\s*(?P<unit>GB|GiB)", re.I)
UNIT_BYTES = {"gb": 10**9, "gib": 2**30}


@dataclass(frozen=True)
class Job:
    """A run that is to be started."""

    request: RunRequest
    order: Callable[[], Order]
    """Made when the run is started."""
    listener: Callable[[], Listener]
    """Takes the run's events; called when the run is started."""


class Executor(AbstractContextManager["Executor"], Protocol):
    """Does the runs of a sweep."""

    examines_cards: bool
    """Whether it looks at the cards where each run is, instead of the sweep before its first."""

    def refuse(self, requests: Iterable[RunRequest]) -> None:
        """Raise UserError where one of these could never be run. It has been entered."""

    def run(self, jobs: Iterator[Job | Record]) -> Iterator[Record]:
        """Take jobs as there is room and yield each record as its run ends. A record among the jobs, of a run
        that is not even started, is passed on.

        Raises KeyboardInterrupt, with the records of all interrupted runs as its arguments, after their
        workers have been stopped.
        """


class LocalExecutor:
    """One run after another on this machine."""

    examines_cards = False

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Nothing is left to be ended."""

    def refuse(self, requests: Iterable[RunRequest]) -> None:
        """Nothing: what cannot be run here is a record."""

    def run(self, jobs: Iterator[Job | Record]) -> Iterator[Record]:
        """See `Executor.run`."""
        for job in jobs:
            yield job if isinstance(job, Record) else run_one(job.order(), job.listener())


@dataclass(frozen=True)
class Needs:
    """What one run takes of a node. None: it follows from the run."""

    gpus: int | None = None
    cpus: int | None = None
    memory_bytes: int | None = None

    @classmethod
    def parse(cls, gpus: int | None, cpus: int | None, memory: str | None) -> Needs:
        """From the flags. Raises BadValue."""
        for name, value in (("--gpus-per-run", gpus), ("--cpus-per-run", cpus)):
            if value is not None and not 1 <= value <= 10_000:
                raise BadValue(f"{name} {value}: expected a whole number from 1 on")
        return cls(gpus, cpus, None if memory is None else _memory_bytes(memory))


def choose_executor(
    name: str = "local",
    *,
    address: str | None = None,
    gpus: int | None = None,
    cpus: int | None = None,
    memory: str | None = None,
    preflight: bool = True,
) -> Executor:
    """The executor of this name. It reaches for no cluster before it is entered.

    ``preflight``: whether an executor that examines cards does. Raises BadValue for what cannot be, and
    MissingLibrary where Ray is not installed.
    """
    if name not in EXECUTORS:
        raise unknown("executor", name, EXECUTORS)
    flags = {"--ray-address": address, "--gpus-per-run": gpus, "--cpus-per-run": cpus}
    given = [flag for flag, value in (flags | {"--memory-per-run": memory}).items() if value is not None]
    if name == "local":
        if given:
            raise BadValue(f"{given[0]} says something about a Ray cluster", "add --executor ray")
        return LocalExecutor()
    needs = Needs.parse(gpus, cpus, memory)
    if address is not None and not ADDRESS.fullmatch(address):
        raise BadValue(
            f"--ray-address '{address}' is not of the form HOST:PORT",
            "for example 10.0.0.1:6379, or 'auto' for the cluster that this machine belongs to",
        )
    if importlib.util.find_spec("ray") is None:
        raise MissingLibrary("--executor ray needs ray", f"install with: {RAY_INSTALL_LINE}")
    from bench.run.ray_executor import RayExecutor

    return RayExecutor(address, needs, preflight=preflight)


def _memory_bytes(text: str) -> int:
    found = MEMORY.fullmatch(text.strip())
    size = int(float(found["size"]) * UNIT_BYTES[found["unit"].lower()]) if found else 0
    if size < 1:
        raise BadValue(f"--memory-per-run '{text}' is not a size", "for example --memory-per-run 64GB")
    return size
