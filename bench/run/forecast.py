"""A forecast, measured: one run after another until all of a plan's have a record, and their steps in turns.

``Measuring(plan, watcher).all()`` runs the slices of a ``bench.run.forecast_plan`` and times their steps
(``bench.run.depths``). What the records say is derived in ``bench.judge.forecast``.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace

from bench.record.depths import DepthTimes, Repeat, Turns, read_times, save_times, times_key
from bench.record.schema import Record
from bench.record.store import read_record
from bench.run.forecast_plan import ForecastPlan
from bench.run.launch import time_depths
from bench.run.sweep import Sweep, Watcher, run_sweep


@dataclass
class Measuring:
    """Runs what a plan asks for. What has a record is not run again."""

    plan: ForecastPlan
    watcher: Watcher
    tell: Callable[[str], None] = lambda line: None
    """Takes a line for the person who waits."""
    _begun: int = 0
    """Runs and turns that were begun."""
    _given_up: set[str] = field(default_factory=set)
    """Backends of which a slice did not complete: the same would happen again."""
    _too_deep: set[str] = field(default_factory=set)
    """Backends that did not complete at the full depth."""

    def all(self) -> dict[str, list[Repeat]]:
        """Every repeat of every backend, round by round, so that drift of the machine hits all alike.

        Raises KeyboardInterrupt after the interrupted run's record has been saved.
        """
        found: dict[str, list[Repeat]] = {backend: [] for backend in self.plan.backends}
        for repeat in self.plan.repeats:
            for backend in self.plan.backends:
                if backend not in self._given_up:
                    found[backend].append(self._one(backend, repeat))
        return found

    def _one(self, backend: str, repeat: int) -> Repeat:
        plan, records = self.plan, {}
        for depth in plan.slices:
            records[depth] = self._run(backend, repeat, depth, plan.sweep)
            if records[depth].status != "completed":
                self._given_up.add(backend)
                return Repeat(repeat, records)
        full = plan.full_layers
        if plan.verify and backend not in self._too_deep:
            records[full] = self._run(backend, repeat, full, plan.full)
            if records[full].status != "completed":
                self._too_deep.add(backend)
        return self._timed(Repeat(repeat, records), backend)

    def _run(self, backend: str, repeat: int, depth: int, sweep: Sweep) -> Record:
        request = self.plan.by_depth[backend, repeat, depth]
        self._begin(backend, repeat, layers_in_words(depth))
        for record in run_sweep(replace(sweep, requests=[request]), self.watcher):
            return record
        return read_record(sweep.store.path(request.key))

    def _timed(self, repeat: Repeat, backend: str) -> Repeat:
        """The repeat with its steps in turns; without the full depth where that cannot be had."""
        plan, abandoned = self.plan, None
        if plan.verify and backend not in self._too_deep:
            times = self._times(backend, repeat.index, plan.depths, seldom=plan.full_layers)
            if times.status == "completed":
                return replace(repeat, times=times)
            abandoned = times
            self._too_deep.add(backend)
        times = self._times(backend, repeat.index, plan.slices)
        return replace(repeat, times=times, abandoned=abandoned)

    def _times(
        self, backend: str, repeat: int, depths: tuple[int, ...], seldom: int | None = None
    ) -> DepthTimes:
        plan = self.plan
        turns = Turns(depths=depths, warmup_rounds=plan.warmup_rounds, rounds=plan.rounds, seldom=seldom)
        request, folder = plan.by_depth[backend, repeat, depths[-1]], plan.sweep.store.folder
        self._begin(backend, repeat, f"steps at {', '.join(map(str, depths))} layers in turns")
        known = None if plan.sweep.force else read_times(folder, times_key(request, turns))
        if known is not None:
            self.tell(f"{backend}: recorded already, skipped")
            return known
        order = plan.full.order(request).model_copy(update={"turns": turns, "variables": {}})
        times = time_depths(order, self.watcher.listener(0, 1, request))
        save_times(folder, times)
        self.tell(describe_times(times))
        return times

    def _begin(self, backend: str, repeat: int, what: str) -> None:
        plan = self.plan
        self._begun += 1
        total = len(plan.backends) * len(plan.repeats) * (len(plan.depths) + 1)
        which = f", repeat {repeat}" if len(plan.repeats) > 1 else ""
        self.tell(f"({self._begun} of {total}) {backend}{which}: {what}")


def layers_in_words(depth: int) -> str:
    """With the noun."""
    return f"{depth} layer" if depth == 1 else f"{depth} layers"


def describe_times(times: DepthTimes) -> str:
    """How the turns ended, in one line."""
    rounds = times.rounds()
    name = times.request.backend
    if times.status != "completed":
        return f"{name}: {times.status.replace('_', ' ')}: {times.message}"
    last = rounds[-1]
    each = ", ".join(f"{seconds:.3g} s at {depth}" for depth, seconds in last.items())
    return f"{name}: {len(rounds)} rounds in {times.wall_seconds:.0f} s, the last with {each} layers"
