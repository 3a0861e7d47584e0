"""A sweep: the runs of one experiment, done by an executor, each record saved as soon as its run ends.

Runs that have a record already are skipped, and those that cannot fit because a smaller one did not
(``bench.run.skipping``); Ctrl-C saves the interrupted run's record and stops.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import partial
from typing import Literal, Protocol

from bench.ask.models import ResolvedModel
from bench.ask.plan import RunRequest
from bench.load.registry import Entry
from bench.record.preflight import Preflight
from bench.record.schema import Record
from bench.record.store import Store
from bench.run import environments
from bench.run.executors import Executor, Job, LocalExecutor
from bench.run.here import order_here
from bench.run.interruption import held_back
from bench.run.listening import Listener
from bench.run.order import Order
from bench.run.preflight import Examiner
from bench.run.skipping import SkipRule
from bench.run.sources import Source, packing_request


class Watcher(Protocol):
    """What is told of a sweep while it goes (``bench.show.progress`` implements it)."""

    def examining(self, cards: int) -> None:
        """The cards that the runs use are looked at."""

    def examined(self, preflight: Preflight) -> None:
        """What was found about them."""

    def skipped(self, request: RunRequest) -> None:
        """A run that has a record already."""

    def listener(self, place: int, total: int, request: RunRequest) -> Listener:
        """A run begins; the listener gets its events."""

    def ended(self, record: Record) -> None:
        """A run's record has been saved."""


@dataclass(frozen=True)
class Sweep:
    """What a sweep needs."""

    requests: Sequence[RunRequest]
    sources: Mapping[str, Source]
    """Backend id -> where its runs have their model from."""
    entries: dict[str, Entry]
    store: Store
    memory_bytes: int | None = None
    """Of the device that runs; None: unknown."""
    force: bool = False
    retry_failed: bool = False
    """Only runs with a record that is not completed are run."""
    skip_larger: bool = False
    """Whether runs are skipped that need no less memory than one that ran out of it."""
    replay: bool = True
    """Whether failures are replayed (see `Order`)."""
    examiner: Examiner = field(default_factory=Examiner)
    """Looks at the cards before the first run."""

    @property
    def model(self) -> ResolvedModel:
        """The model that was asked for; a published checkpoint of it where every backend reads one."""
        return min(self.sources.values(), key=lambda source: source.calibration == "published").model

    def obstacle(self, request: RunRequest) -> str | None:
        """Why a run cannot even be started; None where nothing speaks against it."""
        return self.sources[request.backend].obstacle or obstacle(request, self.entries[request.backend])

    def waiting(self) -> list[RunRequest]:
        """Runs that have no standing record yet, in order; where failures are retried, those with one."""
        if self.retry_failed:
            return [r for r in self.requests if self.store.failed(r.key)]
        return [r for r in self.requests if self.force or not self.store.finished(r.key)]

    def skip_rule(self) -> SkipRule:
        """The rule, with what the folder's records teach about the runs of this sweep."""
        rule = SkipRule(self.memory_bytes)
        # What is to be repeated teaches nothing before it has been.
        if self.skip_larger and not self.force and not self.retry_failed:
            for record in self.store.of_backends({request.backend for request in self.requests}):
                rule.observe(record)
        return rule

    def order(self, request: RunRequest) -> Order:
        """The job handed to a worker."""
        source = self.sources[request.backend]
        return order_here(
            request,
            source.model.folder,
            packing=packing_request(request, self.entries),
            note=source.note,
            replay=self.replay,
            memory_bytes=self.memory_bytes,
        )


def run_sweep(sweep: Sweep, watcher: Watcher, executor: Executor | None = None) -> Iterator[Record]:
    """Run what is waiting and yield each of its records once it has been saved.

    ``executor``: where, which has been entered; None: here, one run after another. Unless it examines cards
    itself, they are looked at before the first run on CUDA; where a copy between them arrives changed, every
    waiting run gets a record that says so. A record that says nothing about the backend is yielded and
    replaces none that does (`Store.keep`). Raises KeyboardInterrupt after the interrupted runs' records have
    been saved.
    """
    executor = executor or LocalExecutor()
    waiting = {request.key: place for place, request in enumerate(sweep.waiting())}
    found = None
    if not executor.examines_cards:
        able = [r for r in sweep.requests if r.key in waiting and sweep.obstacle(r) is None]
        found = sweep.examiner.find(able, watcher)
    rule = sweep.skip_rule()

    def keep(record: Record) -> Record:
        record = with_preflight(record, found)
        rule.observe(record)
        with held_back():
            sweep.store.keep(record)
        watcher.ended(record)
        return record

    running = executor.run(_jobs(sweep, watcher, waiting, found, rule))
    try:
        for record in running:
            yield keep(record)
    except KeyboardInterrupt as interruption:
        for interrupted in interruption.args:
            keep(interrupted)
        raise


def _jobs(
    sweep: Sweep, watcher: Watcher, waiting: Mapping[str, int], found: Preflight | None, rule: SkipRule
) -> Iterator[Job | Record]:
    """What is to be run, in order; whether a run is skipped is decided when it is taken."""
    for request in sweep.requests:
        if request.key not in waiting:
            watcher.skipped(request)
            continue
        standing = _not_started(sweep, request, found, rule)
        if standing is None:
            yield Job(
                request,
                partial(sweep.order, request),
                partial(watcher.listener, waiting[request.key], len(waiting), request),
            )
        elif standing.status == "skipped" and sweep.store.out_of_memory(request.key):
            # Retried, and known to be in vain by now: what was observed says more than that.
            watcher.skipped(request)
        else:
            yield standing


def _not_started(
    sweep: Sweep, request: RunRequest, found: Preflight | None, rule: SkipRule
) -> Record | None:
    """The record of a run that is not even started, with the reason; None: it is."""
    if reason := sweep.obstacle(request):
        return not_started(request, "unavailable", reason)
    if found is not None and found.stopped:
        return not_started(request, "error", found.stopped)
    if sweep.skip_larger and (reason := rule.reason(request)):
        return not_started(request, "skipped", reason)
    return None


def obstacle(request: RunRequest, entry: Entry) -> str | None:
    """Why a run cannot even be started: a device that the backend cannot be trained on, a library or an
    environment that is not installed, with the line that installs it, or a placement that it refuses."""
    if device := entry.backend.refused_devices.get(request.device):
        return f"backend '{entry.id}' cannot be trained on {request.device}: {device}"
    if reason := environments.obstacle(request.environment, entry):
        return reason
    refused = entry.backend.refused_placements.get(request.placement)
    return refused and f"placement '{request.placement}' is not possible with '{entry.id}': {refused}"


def with_preflight(record: Record, found: Preflight | None) -> Record:
    """The record with what was found about the cards; None: nothing, or the executor, which examined them
    itself, has put it there."""
    if found is None or record.request.device != "cuda":
        return record
    return record.model_copy(update={"preflight": found})


def not_started(
    request: RunRequest, status: Literal["unavailable", "error", "skipped", "crashed"], reason: str
) -> Record:
    """The record of a run that could not be started."""
    return Record(
        key=request.key,
        command=request.command,
        request=request,
        status=status,
        stage=None if status == "skipped" else "launch",
        message=reason,
        started_at=datetime.now(UTC).isoformat(timespec="seconds"),
        wall_seconds=0.0,
    )
