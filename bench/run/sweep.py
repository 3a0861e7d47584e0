"""A sweep: the runs of one experiment, one after another, each record saved as soon as its run ends.

Runs that have a record already are skipped, and those that cannot fit because a smaller one did not
(``bench.run.skipping``); Ctrl-C saves the interrupted run's record and stops.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Literal, Protocol

from bench.ask.models import ResolvedModel
from bench.ask.packing import packed_folder
from bench.ask.plan import RunRequest
from bench.ask.reference import reference_dtype, reference_file, reference_request
from bench.load.registry import Entry
from bench.record.preflight import Preflight
from bench.record.schema import Record
from bench.record.store import Store
from bench.run import environments
from bench.run.launch import run_one
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
        folder = source.model.folder.resolve() if source.model.folder else None
        packed, making = None, packing_request(request, self.entries)
        if request.calibration not in (None, "random"):
            packed = packed_folder(making, source.model).resolve()
        return Order(
            request=request,
            model_folder=folder,
            packed_folder=packed,
            packing_request=making if making is not request else None,
            note=source.note,
            replay=self.replay,
            **(_reference(request, self.memory_bytes) if request.fidelity else {}),
        )


def _reference(request: RunRequest, memory_bytes: int | None) -> dict[str, Any]:
    """The parts of an order that concern the comparison with an unquantized model."""
    dtype, reason = reference_dtype(request, memory_bytes)
    if dtype is None:
        return {"reference_note": reason}
    return {
        "reference_file": reference_file(request, dtype).resolve(),
        "reference_request": reference_request(request, dtype),
    }


def run_sweep(sweep: Sweep, watcher: Watcher) -> Iterator[Record]:
    """Run what is waiting and yield every record of the sweep's requests, old ones included.

    Before the first run on CUDA the cards are looked at; where a copy between them arrives changed, every
    waiting run gets a record that says so. Raises KeyboardInterrupt after the interrupted run's record has
    been saved.
    """
    waiting = {request.key: place for place, request in enumerate(sweep.waiting())}
    able = [r for r in sweep.requests if r.key in waiting and sweep.obstacle(r) is None]
    found = sweep.examiner.find(able, watcher)
    rule = sweep.skip_rule()
    for request in sweep.requests:
        if request.key not in waiting:
            watcher.skipped(request)
            continue
        standing = _not_started(sweep, request, found, rule)
        if standing is not None and standing.status == "skipped" and sweep.store.out_of_memory(request.key):
            # Retried, and known to be in vain by now: what was observed says more than that.
            watcher.skipped(request)
            continue
        record = standing
        if record is None:
            try:
                record = run_one(
                    sweep.order(request), watcher.listener(waiting[request.key], len(waiting), request)
                )
            except KeyboardInterrupt as interruption:
                for interrupted in interruption.args:
                    interrupted = _with_preflight(interrupted, found)  # noqa: PLW2901
                    sweep.store.save(interrupted)
                    watcher.ended(interrupted)
                raise
        record = _with_preflight(record, found)
        rule.observe(record)
        sweep.store.save(record)
        watcher.ended(record)
        yield record


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


def _with_preflight(record: Record, found: Preflight | None) -> Record:
    return record.model_copy(update={"preflight": found}) if record.request.device == "cuda" else record


def not_started(
    request: RunRequest, status: Literal["unavailable", "error", "skipped"], reason: str
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
