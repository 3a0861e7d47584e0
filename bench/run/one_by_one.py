"""Runs whose order depends on their results: one at a time, each an ordinary run of the sweep machinery.

The margin's bisection and the triage need a verdict between two runs. Verdicts are not this room's business,
so the judge comes as a callable from the command (``bench.judge.ladder.evidence``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

from bench.ask.plan import RunRequest
from bench.record.schema import Record
from bench.record.store import read_record
from bench.record.triage import Evidence
from bench.run.sweep import Sweep, Watcher, run_sweep

SETTLING_STEPS = 18
"""Steps after which the float16 scaler has certainly found its scale or is at its end: it starts at 2**16 and
halves at each skip (torch.amp.GradScaler), so the 17th step in a row that it skips ran with a scale of 1."""

Judge = Callable[[Record], Evidence]


@dataclass
class OneByOne:
    """Runs single requests of a sweep. A request that has a record is not run again."""

    sweep: Sweep
    """Lends its model, backends, folder and ``force``; its own requests are not run."""
    watcher: Watcher
    judge: Judge
    tell: Callable[[str], None] = lambda line: None
    """Takes a line for the person who waits."""
    records: list[Record] = field(default_factory=list)
    """Every record that was asked for, in order, each once."""
    _done: set[str] = field(default_factory=set)

    def run(self, request: RunRequest, title: str, *, replay: bool = False) -> tuple[Record, Evidence]:
        """Run ``request``; where its scaler was still searching at the end, once more with more steps.

        ``replay``: replay its failure. Raises KeyboardInterrupt after the interrupted run's record has been
        saved.
        """
        record, evidence = self._run(request, title, replay)
        unsettled = record.status == "completed" and evidence.finite is None
        if unsettled and request.workload.steps < SETTLING_STEPS:
            longer = with_steps(request, SETTLING_STEPS)
            return self._run(longer, f"{title}, until the scaler has settled", replay)
        return record, evidence

    def _run(self, request: RunRequest, title: str, replay: bool) -> tuple[Record, Evidence]:
        self.tell(title)
        # --force repeats what an earlier command recorded, not what this one did.
        force = self.sweep.force and request.key not in self._done
        sweep = replace(self.sweep, requests=[request], force=force, replay=replay)
        ran = list(run_sweep(sweep, self.watcher))
        # What just happened, even where it was not saved over an older record that says more.
        record = ran[-1] if ran else read_record(self.sweep.store.path(request.key))
        if request.key not in self._done:
            self._done.add(request.key)
            self.records.append(record)
        evidence = self.judge(record)
        self.tell(f"  {evidence.reason}")
        return record, evidence


def with_steps(request: RunRequest, steps: int) -> RunRequest:
    """The same run with so many steps; the warm-up is shortened where it would fill them."""
    warmup = min(request.workload.warmup_steps, steps - 1)
    return changed(request, {"workload.steps": steps, "workload.warmup_steps": warmup})


def changed(request: RunRequest, settings: dict[str, Any]) -> RunRequest:
    """The same run with other values at dotted names. Raises ValidationError for an invalid one."""
    body = request.model_dump()
    for path, value in settings.items():
        *groups, last = path.split(".")
        place = body
        for group in groups:
            place = place[group]
        place[last] = value
    return RunRequest.model_validate(body)
