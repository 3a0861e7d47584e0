"""The triage: reproduce a failing run small, change one thing at a time, confirm what heals on three seeds.

Every rung is an ordinary run with its record, so that the same command again goes on where it stopped. Which
change is the smallest, and whether a run failed, is decided in ``bench.judge.ladder`` and handed in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

from bench.ask.plan import RunRequest
from bench.errors import BadValue, unknown
from bench.load.registry import find_backends
from bench.record.schema import Record
from bench.record.triage import Confirmation, Evidence, Rung
from bench.run.arrange import arrange
from bench.run.asked import Asked
from bench.run.one_by_one import OneByOne, changed, with_steps
from bench.run.rungs import OTHER_BACKENDS, Change, find_changes
from bench.run.sweep import Sweep

FEW_STEPS = 4
"""Tried first: what fails at all mostly fails at once, and a short run costs little."""
FEWEST_RUNG_STEPS = 2
"""A change that acts on the update alone (the learning rate) shows in the second step at the earliest."""
SEEDS = 3

SmallestFirst = Callable[[Sequence[Rung]], Sequence[Rung]]
"""Takes rungs; gives those that heal, in the order in which they are to be preferred."""


@dataclass(frozen=True)
class TriagePlan:
    """What a triage is made of."""

    sweep: Sweep
    base: RunRequest
    changes: Sequence[Change]
    headline: str


@dataclass(frozen=True)
class Climbed:
    """What a triage found."""

    base: Record
    """The run that reproduces the failure in the fewest steps, or the run as asked."""
    evidence: Evidence
    rungs: tuple[Rung, ...] = ()
    chosen: Rung | None = None
    """The smallest change that heals every seed."""
    confirmations: tuple[Confirmation, ...] = ()
    healed: RunRequest | None = None
    """The run as asked with the chosen change."""


def arrange_triage(asked: Asked, only: Sequence[str] = ()) -> TriagePlan:
    """Everything that can fail because of what was asked, before anything is written.

    ``only``: groups of changes to try, with hyphens for spaces; empty: all. Raises UserError for all that is
    wrong with it.
    """
    names = [name for text in asked.backends for name in text.split(",") if name]
    if len(set(names)) != 1 or names[0] == "all":
        raise BadValue("triage takes exactly one backend", "for example --backend bnb-nf4")
    # First, so that --set can say otherwise.
    asked = replace(asked, settings=("fidelity=off", *asked.settings), repeats=1)
    arranged = arrange(asked)
    sweep = arranged.sweep
    (base,) = sweep.requests
    entries = find_backends()
    others: Mapping[str, RunRequest] = {}
    if wanted := tuple(name for name in OTHER_BACKENDS if name in entries and name != base.backend):
        # Each in its own environment: they need not run in that of the failing one.
        other = arrange(replace(asked, backends=wanted, environment=None)).sweep
        others = {request.backend: request for request in other.requests}
        sweep = replace(sweep, sources={**other.sources, **sweep.sources})
    changes = _narrowed(find_changes(base, others), only)
    return TriagePlan(sweep, base, changes, arranged.headline)


def _narrowed(changes: Sequence[Change], only: Sequence[str]) -> list[Change]:
    groups = {change.group.replace(" ", "-"): change.group for change in changes}
    for name in only:
        if name not in groups:
            raise unknown("group of changes", name, groups)
    wanted = {groups[name] for name in only or groups}
    return [
        change if change.group in wanted else replace(change, request=None, note="not asked for (--only)")
        for change in changes
    ]


def climb(plan: TriagePlan, runner: OneByOne, smallest_first: SmallestFirst) -> Climbed:
    """Reproduce, try every rung, confirm the smallest that heals.

    Ends after the reproduction where nothing failed, or where the run did not come far enough to tell.
    Raises KeyboardInterrupt after the interrupted run's record has been saved.
    """
    record, evidence = reproduce(plan.base, runner, "as asked", replay=True)
    if evidence.finite is not False:
        return Climbed(record, evidence)
    last = evidence.steps - 1 if evidence.failing_step is None else evidence.failing_step
    steps = min(max(last + 1, FEWEST_RUNG_STEPS), plan.base.workload.steps)
    rungs = [
        _try(change, steps, runner, f"[{place}/{len(plan.changes)}] {change.words}")
        for place, change in enumerate(plan.changes, start=1)
    ]
    by_name = {change.name: change.request for change in plan.changes}
    confirmations: list[Confirmation] = []
    for rung in smallest_first(rungs):
        healed = by_name[rung.name]
        assert healed is not None
        own = _confirm(plan.base, healed, rung, evidence, runner)
        confirmations += own
        if all(seed.heals for seed in own):
            return Climbed(record, evidence, tuple(rungs), rung, tuple(confirmations), healed)
    return Climbed(record, evidence, tuple(rungs), None, tuple(confirmations))


def reproduce(
    request: RunRequest, runner: OneByOne, title: str, *, replay: bool = False
) -> tuple[Record, Evidence]:
    """Run a few steps; where nothing fails in them, the steps that were asked for."""
    few = min(FEW_STEPS, request.workload.steps)
    record, evidence = runner.run(with_steps(request, few), f"{title}, {few} steps", replay=replay)
    if evidence.outcome == "completed" and evidence.finite is not False and few < request.workload.steps:
        return runner.run(request, f"{title}, {request.workload.steps} steps", replay=replay)
    return record, evidence


def _try(change: Change, steps: int, runner: OneByOne, title: str) -> Rung:
    evidence = None
    if change.request is None:
        runner.tell(f"{title}: not applicable, {change.note}")
    else:
        _, evidence = runner.run(with_steps(change.request, steps), title)
    return Rung(
        name=change.name,
        group=change.group,
        kind=change.kind,
        change=change.words,
        settings=change.settings,
        evidence=evidence,
        heals=evidence.finite if evidence else None,
        note=change.note,
    )


def _confirm(
    base: RunRequest, healed: RunRequest, rung: Rung, known: Evidence, runner: OneByOne
) -> Iterable[Confirmation]:
    """Seed by seed, with all steps that were asked for; ends at the first seed that is not healed."""
    found: list[Confirmation] = []
    for place in range(SEEDS):
        seed = {"seed": base.seed + place, "repeat": base.repeat + place}
        title = f"seed {seed['seed']}"
        # The first seed's failure is what the ladder began with.
        without = known if place == 0 else reproduce(changed(base, seed), runner, f"{title}, as asked")[1]
        _, with_change = runner.run(changed(healed, seed), f"{title}, {rung.change}")
        found.append(Confirmation(rung=rung.name, seed=seed["seed"], unhealed=without, healed=with_change))
        if not found[-1].heals:
            break
    return found
