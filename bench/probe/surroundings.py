"""Looks at the machine while a run trains, from the run's parent: how busy it is with other things, and
whether its cards are held back.

    witness = Witness(request)
    listener = witness.beside(listener)     # hears the worker's events, then hands them on
    witness.found                           # after the run; None where no measured step ended

The parent waits while its worker trains, so looking costs no step anything but what the looks themselves take
from the machine: two small reads of /proc, and on CUDA a few NVML calls after each step.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import psutil

from bench.ask.plan import RunRequest
from bench.probe.cards import Nvml
from bench.probe.machine import visible_cards
from bench.record.preflight import CardState
from bench.record.surroundings import CardDuringSteps, Surroundings

SHORTEST_SECONDS = 0.5
"""Busy time is counted in hundredths of a second: over less than this the count says little."""
IDLE = ("idle", "iowait")
COUNTED_TWICE = ("guest", "guest_nice")
"""Parts of psutil.cpu_times() that are contained in user and nice already."""

Listener = Callable[[Mapping[str, Any]], None]


@dataclass(frozen=True)
class Look:
    """What clocks showed at one time, in seconds. None: the system does not tell."""

    at: float
    machine_busy: float | None
    own_busy: float | None


@dataclass
class SeenCard:
    """What was seen of one card so far."""

    uuid: str
    device: str
    looks: int = 0
    reasons: Counter[str] | None = None
    temperatures: list[int] = field(default_factory=list)
    clocks: list[int] = field(default_factory=list)
    processes: list[int] = field(default_factory=list)

    def add(self, state: CardState, processes: int | None) -> None:
        """One more look."""
        self.looks += 1
        if processes is not None:
            self.processes.append(processes)
        if state.throttle_reasons is not None:
            self.reasons = (self.reasons or Counter()) + Counter(state.throttle_reasons)
        if state.temperature_celsius is not None:
            self.temperatures.append(state.temperature_celsius)
        if state.sm_clock_mhz is not None:
            self.clocks.append(state.sm_clock_mhz)

    @property
    def recorded(self) -> CardDuringSteps:
        """For the record."""
        return CardDuringSteps(
            device=self.device,
            looks=self.looks,
            throttle_reasons=None if self.reasons is None else dict(self.reasons),
            highest_temperature_celsius=max(self.temperatures, default=None),
            lowest_sm_clock_mhz=min(self.clocks, default=None),
            most_compute_processes=max(self.processes, default=None),
        )


class Witness:
    """Looks at the machine when the worker tells that a step has ended."""

    def __init__(self, request: RunRequest) -> None:
        self._warmup_steps = request.workload.warmup_steps
        self._wanted_cards = request.device_count if request.device == "cuda" else 0
        self._own: list[psutil.Process] = []
        self._first: Look | None = None
        self._last: Look | None = None
        self._nvml: Nvml | None = None
        self._cards: list[SeenCard] = []

    def beside(self, listener: Listener) -> Listener:
        """A listener that looks when it is time to, and hands every event on."""

        def both(event: Mapping[str, Any]) -> None:
            # An event of a shape we do not know, or a process that is gone, is nobody's trouble here.
            with contextlib.suppress(KeyError, TypeError, ValueError, psutil.Error, OSError):
                self._hear(event)
            listener(event)

        return both

    def close(self) -> None:
        """End the session with NVML, if there was one."""
        if self._nvml is not None:
            self._nvml.__exit__()
            self._nvml = None

    @property
    def found(self) -> Surroundings | None:
        """What was seen between the end of the last warm-up step and that of the last step."""
        first, last = self._first, self._last
        if first is None or last is None or last.at <= first.at:
            return None
        seconds = last.at - first.at
        own, other = _busy_cores(first, last)
        return Surroundings(
            seconds=seconds,
            machine_cores=psutil.cpu_count() or 0,
            own_busy_cores=own,
            other_busy_cores=other,
            cards=tuple(card.recorded for card in self._cards),
        )

    def _hear(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "stage" and event["name"] == "train":
            self._prepare()
        elif event["event"] == "step":
            index = int(event["step"]["index"])
            if self._first is not None:
                self._last = self._look()
            elif index == self._warmup_steps - 1:
                self._first = self._look()
            self._look_at_cards(index)

    def _prepare(self) -> None:
        """Find out which processes are ours, for that takes a while, and which cards are used."""
        parent = psutil.Process()
        self._own = [parent, *parent.children(recursive=True)]
        if self._wanted_cards and self._nvml is None:
            self._nvml = Nvml().__enter__()
            names = visible_cards(os.environ.get("CUDA_VISIBLE_DEVICES"), self._nvml.uuids)
            used = enumerate(names[: self._wanted_cards])
            self._cards = [SeenCard(uuid, f"cuda:{place}") for place, uuid in used]
        if self._warmup_steps == 0:
            self._first = self._look()

    def _look(self) -> Look:
        return Look(time.monotonic(), machine_busy_seconds(), _busy_seconds_of(self._own))

    def _look_at_cards(self, index: int) -> None:
        for card in self._cards if self._nvml and index >= self._warmup_steps - 1 else ():
            state = self._nvml.state(card.uuid) if self._nvml else None
            if state is not None:
                card.add(state, self._nvml.compute_processes(card.uuid) if self._nvml else None)


def machine_busy_seconds() -> float | None:
    """Core-seconds that the machine was busy since it started; None where the system does not tell.

    A hypervisor's ``steal`` counts: from in here, it is another's work.
    """
    try:
        times = psutil.cpu_times()._asdict()
    except (OSError, psutil.Error):
        return None
    return float(sum(value for name, value in times.items() if name not in (*IDLE, *COUNTED_TWICE)))


def _busy_seconds_of(processes: list[psutil.Process]) -> float | None:
    """Core-seconds of these processes, and of children that they have outlived."""
    if not processes:
        return None
    total = 0.0
    for process in processes:
        # One that ended has handed its time to the parent that waited for it.
        with contextlib.suppress(psutil.NoSuchProcess):
            total += sum(process.cpu_times()[:4])
    return total


def _busy_cores(first: Look, last: Look) -> tuple[float | None, float | None]:
    """Mean number of cores that were busy with the run, and with everything else."""
    seconds = last.at - first.at
    if seconds < SHORTEST_SECONDS or first.own_busy is None or last.own_busy is None:
        return None, None
    own = max(0.0, last.own_busy - first.own_busy)
    if first.machine_busy is None or last.machine_busy is None:
        return own / seconds, None
    machine = last.machine_busy - first.machine_busy
    # Some sandboxes count nothing for the machine: less than what we used ourselves is no count.
    if machine < 0.5 * own:
        return own / seconds, None
    return own / seconds, max(0.0, machine - own) / seconds
