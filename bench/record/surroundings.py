"""What else went on on the machine while the measured steps of a run went on: other programs, and the cards'
reasons not to run faster.

Seen by the parent of the run (``bench.probe.surroundings``), judged by ``bench.judge.session_doubts``. What
the system or NVML would not tell is null.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated

from pydantic import Field

from bench.record.recorded import Recorded, Seconds

SLOWING_REASONS = ("hardware slowdown", "temperature", "power brake", "held back")
"""Beginnings of the throttle reasons that are no ordinary state of a busy card; its power limit is one."""

Cores = Annotated[float, Field(ge=0)]
"""A mean number of logical cores: 0.5 is one core half of the time."""
Count = Annotated[int, Field(ge=0)]


class CardDuringSteps(Recorded):
    """One card, looked at after each step from the last warm-up step on."""

    device: str
    """As torch names it: cuda:0."""
    looks: Count
    throttle_reasons: Mapping[str, Count] | None = None
    """Why the clocks were not higher, in words -> at how many of the looks."""
    highest_temperature_celsius: int | None = None
    lowest_sm_clock_mhz: int | None = None
    most_compute_processes: Count | None = None
    """The run's own among them, which is one. In a container, a driver may tell of none."""


class Surroundings(Recorded):
    """The machine from the end of the last warm-up step to the end of the last step."""

    seconds: Seconds
    machine_cores: Count
    """Logical cores of the whole machine, which busy time is counted on."""
    own_busy_cores: Cores | None = None
    """By the run's processes, their parent included."""
    other_busy_cores: Cores | None = None
    """By everything else, time that a hypervisor gave to other machines included. Null where the system does
    not tell, and where the time was too short to count in hundredths of a second."""
    cards: tuple[CardDuringSteps, ...] = ()
