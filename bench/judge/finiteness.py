"""Did a run train with finite numbers? The question that the margin and the triage ask of every run.

It is put to the record itself, not to ``judge_stability``: that verdict is withheld for synthetic weights and
for short runs, while whether a number overflowed is plain arithmetic there as well. And where that verdict
counts a run whose last update was skipped as failed, this one leaves it open: a longer run can tell.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import get_args

from bench.judge.dead import dead_tensors
from bench.judge.scaler import failing_steps, skips_at_the_end
from bench.judge.stability import measured_steps, spelt
from bench.record.schema import Record, Status, Step

PATIENCE_SKIPS = 17
"""Skips in a row after which the scaler is at its end. Torch's GradScaler starts at 2**16 and halves at each
skip, so that the 17th step ran with a scale of 1: what overflows there overflows without a scaler, too."""

STATUSES: frozenset[str] = frozenset(get_args(Status)) - {"completed"}
"""Names of a `Finiteness` that say that the run did not complete."""


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
    no gradient is zero in every measured step. A step that the float16 scaler skipped although its losses
    were finite is the scaler at work and no failure, as long as some step was applied and fewer than
    ``PATIENCE_SKIPS`` skips stand at the end.

    Numbers that fail are a failure however the run ended; nothing else is said of one that did not complete.
    """
    found = _non_finite(record) or _cut_off(record)
    if found is not None:
        return found
    if record.status != "completed":
        return Finiteness(None, record.status, record.message or f"the run ended as '{record.status}'")
    count, skips = len(record.steps), skips_at_the_end(record.steps)
    if skips >= PATIENCE_SKIPS:
        first = record.steps[-skips].index
        reason = f"the scaler skipped the last {skips} steps: lowering the scale to 1 did not help"
        return Finiteness(False, "skipped", reason, first, _module(record, first))
    if skips == count:
        return Finiteness(None, "unsettled", f"the scaler skipped all {skips} steps and was still searching")
    return _dead(record) or Finiteness(True, "finite", f"all losses and updates of {count} steps are finite")


def _non_finite(record: Record) -> Finiteness | None:
    poisoned = record.trainable_weights_finite is False
    name = "poisoned" if poisoned else "non_finite"
    after = "; the trained weights are not finite" if poisoned else ""
    failing = failing_steps(record.steps)
    if failing:
        first = failing[0]
        reason = f"{_what(first)} at step {first.index}{after}"
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


def _cut_off(record: Record) -> Finiteness | None:
    """The harness ends a run whose first backward leaves adapters without a gradient. So it does where a
    quantizer's float16 scales are rescaled into nothing: that backend trains no further than this."""
    if record.proof.gradients_reach_adapters is not False:
        return None
    why = record.proof.breaches[-1] if record.proof.breaches else "no gradient reached the adapters"
    return Finiteness(False, "dead", why, 0)


def _dead(record: Record) -> Finiteness | None:
    measured = measured_steps(record)
    if measured and all(step.gradient_norm == 0 for step in measured):
        what = "the gradient norm"
    elif dead := dead_tensors(record):
        what = f"the gradient of {len(dead)} LoRA tensors"
    else:
        return None
    return Finiteness(False, "dead", f"{what} is 0 in every measured step", measured[0].index)


def _what(step: Step) -> str:
    """The loss comes before the gradient in a step, so it is the earlier evidence."""
    loss = next((loss for loss in step.losses if not math.isfinite(loss)), None)
    return (
        f"the loss is {spelt(loss)}"
        if loss is not None
        else (f"the gradient norm is {spelt(step.gradient_norm)}")
    )


def _module(record: Record, step: int) -> str | None:
    """The module of the record's first failure, where that is the failure of this step."""
    failure = record.first_failure
    return failure.module if failure is not None and failure.step == step else None
