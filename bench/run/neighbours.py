"""Who runs beside whom: runs of one command that were on the same machine at the same time.

    neighbours.began(key, machine)      # again on another machine: it starts anew
    neighbours.ended(key)               # -> keys of the runs that it shared its machine with
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass
class Neighbours:
    """What is known about the runs that are under way. Of two runs that overlap, each has the other."""

    _machines: dict[str, str] = field(default_factory=dict)
    _seen: dict[str, set[str]] = field(default_factory=dict)

    def began(self, key: str, machine: str) -> None:
        """A run has begun on a machine; one that began before has lost that start, and who was beside it."""
        self._machines.pop(key, None)
        beside = {other for other, where in self._machines.items() if where == machine}
        for other in beside:
            self._seen[other].add(key)
        self._machines[key], self._seen[key] = machine, beside

    def ended(self, key: str) -> tuple[str, ...]:
        """The run is over: keys of those that ran beside it, sorted."""
        self._machines.pop(key, None)
        return tuple(sorted(self._seen.pop(key, set())))

    def has_begun(self, key: str) -> bool:
        """Whether the run is under way."""
        return key in self._machines
