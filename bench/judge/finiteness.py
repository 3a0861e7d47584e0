"""Did a run train with finite numbers? The question that the margin and the triage ask of every run.

It is put to the record itself, not to ``judge_stability``: that verdict is withheld for synthetic weights and
for short runs, while whether a number overflowed is plain arithmetic there as well. And where that verdict
counts a run whose last update was skipped as failed, this one leaves it open: a longer run can tell.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

from bench.judge.dead import find_dead
from bench.judge.scaler import (
    PATIENCE_SKIPS,
    failing_steps,
    skips_at_the_end,
    spelt,
    what_is_not_finite,
)
from bench.record.schema import Record, Status

STATUSES: frozenset[str] = frozenset(get_args(Status)) - {"completed", "skipped"}
"""Names of a `Finiteness` that say that the run did not complete. "skipped" is the scaler's word here: none
of the runs that are judged so is ever passed over."""


@dataclass(frozen=True)
class Finiteness:
    """Whether a run trained with finite numbers, and where it first did not."""

    finite: bool | None
    """None: the run does not say, because it did not complete or its scaler was still searching."""
    name: str
    """"finite", "non_finite", "poisoned", "skipped", "dead", "unsettled", or the status of a run that did not
    complete."""
    reason: str
    step: int | None = None
    """The first step that failed."""
    module: str | None = None
    """Where it failed first, if the record tells."""


def judge_finiteness(record: Record) -> Finiteness:
    """Whether ``record`` trained with finite numbers.

    It did if it completed, every loss is finite, every gradient norm of an applied step is finite, nothing
    inside the model was seen to overflow that the scaler did not catch, the trained weights are finite, and
    its adapters are not dead (``bench.judge.dead``). A step that the float16 scaler skipped although its
    losses were finite is the scaler at work and no failure, as long as some step was applied and fewer than
    ``PATIENCE_SKIPS`` skips stand at the end.

    Numbers that fail are a failure however the run ended; nothing else is said of one that did not complete.
    """
    found = _non_finite(record) or _dead(record)
    if found is not None:
        return found
    if record.status != "completed":
        return Finiteness(None, record.status, record.message or f"the run ended as '{record.status}'")
    count, skips = len(record.steps), skips_at_the_end(record.steps)
    if skips >= PATIENCE_SKIPS:
        first = record.steps[-skips].index
        reason = f"the scaler skipped the last {skips} steps: lowering the scale to 1 did not help"
        return Finiteness(False, "skipped", reason, first, _module(record, first))
    if count == 0:
        return Finiteness(None, "unsettled", "no step was recorded")
    if skips == count:
        return Finiteness(None, "unsettled", f"the scaler skipped all {skips} steps and was still searching")
    return Finiteness(True, "finite", f"all losses and updates of {count} steps are finite")


def _non_finite(record: Record) -> Finiteness | None:
    poisoned = record.trainable_weights_finite is False
    name = "poisoned" if poisoned else "non_finite"
    after = "; the trained weights are not finite" if poisoned else ""
    failing = failing_steps(record.steps)
    if failing:
        first = failing[0]
        reason = f"{what_is_not_finite(first)} at step {first.index}{after}"
        return Finiteness(False, name, reason, first.index, _module(record, first.index))
    failure = record.first_failure
    if failure is not None and failure.value is not None and not failure.skipped_by_scaler:
        reason = f"a value inside the model is {spelt(failure.value)} at step {failure.step}{after}"
        return Finiteness(False, name, reason, failure.step, failure.module)
    if record.proof.weights_finite is False:
        return Finiteness(False, name, f"the frozen weights are not finite as loaded{after}")
    if poisoned:
        return Finiteness(False, name, "the trained weights are not finite after the last step")
    return None


def _dead(record: Record) -> Finiteness | None:
    found = find_dead(record)
    return None if found is None else Finiteness(False, "dead", found.reason, found.step)


def _module(record: Record, step: int) -> str | None:
    """The module of the record's first failure, where that is the failure of this step."""
    failure = record.first_failure
    return failure.module if failure is not None and failure.step == step else None
