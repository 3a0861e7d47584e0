"""A slice of a plan for one machine of several, without anything that has to coordinate them.

``Slice.parse("2/4").of(requests)`` are the runs of the second machine of four. Every machine plans the whole
and takes its own part: the parts are disjoint, and together they are the plan. ``bench.record.slices`` keeps
what the plan was, so that whoever joins the records can see what is missing.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from bench.ask.plan import RunRequest
from bench.errors import BadValue

MOST_SLICES = 10_000
"""More machines than anyone has: beyond, it is a slip of the hand."""


@dataclass(frozen=True)
class Slice:
    """The ``place``-th of ``count`` slices, counted from 1."""

    place: int
    count: int

    @classmethod
    def parse(cls, text: str) -> Slice:
        """From ``I/N``. Raises BadValue."""
        found = re.fullmatch(r"\s*([0-9]{1,6})\s*/\s*([0-9]{1,6})\s*", text)
        if found is None:
            raise BadValue(f"--shard '{text}' is not of the form I/N", "for example --shard 1/4")
        place, count = int(found[1]), int(found[2])
        if not 1 <= count <= MOST_SLICES:
            raise BadValue(f"--shard {place}/{count}: N must be from 1 to {MOST_SLICES}")
        if not 1 <= place <= count:
            raise BadValue(f"--shard {place}/{count}: I must be from 1 to {count}")
        return cls(place, count)

    def __str__(self) -> str:
        return f"shard {self.place} of {self.count}"

    @property
    def folder_name(self) -> str:
        """Of its records: a folder of its own, so that no two machines write to one."""
        return f"shard-{self.place}-of-{self.count}"

    def of(self, requests: Sequence[RunRequest]) -> list[RunRequest]:
        """Its runs, in the order of the plan."""
        return deal(requests, self.count)[self.place - 1]


def deal(requests: Sequence[RunRequest], count: int) -> list[list[RunRequest]]:
    """All slices of a plan.

    Where there is a round for each machine, rounds are dealt whole: repeat k of every backend then runs on
    one machine, and no difference between machines comes between backends that are compared. Otherwise runs
    are dealt one by one, each round from one machine further on, so that none has always the same backend.
    """
    rounds: dict[int, list[RunRequest]] = {}
    for request in requests:
        rounds.setdefault(request.repeat, []).append(request)
    slices: list[list[RunRequest]] = [[] for _ in range(count)]
    for turn, members in enumerate(rounds.values()):
        for place, request in enumerate(members):
            slices[(turn if len(rounds) >= count else turn + place) % count].append(request)
    return slices
