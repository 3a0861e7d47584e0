"""The verdict on one run: did the losses, the gradients and the trained weights survive?

``judge_stability(record)`` gives a word, a sentence that says why, and the evidence: every measure beside
its threshold (``bench.judge.thresholds``). A run whose values are not finite is a completed run with a bad
verdict, not a failed run: it ran, and that is its result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Literal, get_args

from bench.judge.course import Course, follow
from bench.judge.dead import NAMED_TENSORS, find_dead
from bench.judge.evidence import gather
from bench.judge.location import first_failure
from bench.judge.scaler import (
    PATIENCE_SKIPS,
    failing_steps,
    skipped_share,
    skips_at_the_end,
    what_is_not_finite,
)
from bench.judge.thresholds import SKIP_RATE, Evidence
from bench.record.schema import Record, Step

VerdictName = Literal["poisoned", "non_finite", "dead", "spiking", "not_judged", "healthy"]
GRAVITY: tuple[VerdictName, ...] = get_args(VerdictName)
"""Gravest first."""
BAD: frozenset[VerdictName] = frozenset(("poisoned", "non_finite", "dead", "spiking"))
"""What speaks against training like this."""

SYNTHETIC = (
    "weights are synthetic: random values have no outliers, so nothing about stability can be concluded"
)
CUT = "the model is cut with --layers: its losses and norms jump, and say nothing of the whole model's"
MEASURED_STEPS_NEEDED = 2


@dataclass(frozen=True)
class Verdict:
    """A word for the stability of a run, why in a plain sentence, and every measure beside its threshold."""

    verdict: VerdictName
    reason: str
    evidence: tuple[Evidence, ...] = ()


def judge_stability(record: Record) -> Verdict:
    """Judge one run from what was recorded of it.

    Synthetic weights are never judged, but what went wrong in such a run is still told in the reason.
    """
    course = follow(record)
    return replace(_judged(record, course), evidence=gather(record, course))


def _judged(record: Record, course: Course) -> Verdict:
    fault = _poisoned(record) or _non_finite(record) or _dead(record) or _spiking(course)
    unlike = _unlike_the_real_model(record, fault)
    if unlike is not None:
        return Verdict("not_judged", unlike if fault is None else f"{unlike}; even so, {fault.reason}")
    open_question = None if fault else _open_question(record)
    if open_question is not None:
        return Verdict("not_judged", open_question)
    return fault or _healthy(record)


def _unlike_the_real_model(record: Record, fault: Verdict | None) -> str | None:
    """Why what was found says nothing of the model that is meant."""
    if record.request.model.weights == "synthetic":
        return SYNTHETIC
    if fault is not None and fault.verdict == "spiking" and record.request.model.layers is not None:
        return CUT
    return None


def _open_question(record: Record) -> str | None:
    """Why a run in which nothing failed is not called healthy either."""
    if record.status != "completed":
        told = first_failure(record)
        return f"the run did not complete ({record.status})" + (f"; {told}" if told else "")
    measured = measured_steps(record)
    if len(measured) < MEASURED_STEPS_NEEDED:
        return f"{len(measured)} measured step(s), and a verdict needs {MEASURED_STEPS_NEEDED}"
    last = skips_at_the_end(record.steps)
    if not last:
        return None
    which = "the last update" if last == 1 else f"the last {last} updates"
    return f"the loss scaler skipped {which}: only more steps can show that it finds a scale that works"


def measured_steps(record: Record) -> tuple[Step, ...]:
    """The steps after the warm-up: those that every statistic is made of."""
    return tuple(step for step in record.steps if not step.warmup)


# ---- poisoned, not finite ------------------------------------------------------------------------


def _poisoned(record: Record) -> Verdict | None:
    if record.trainable_weights_finite is not False:
        return None
    first = _non_finite(record)
    origin = first.reason if first else "every loss and gradient norm on the way was finite"
    return Verdict("poisoned", f"the trained weights are not all finite after the last step; {origin}")


def _non_finite(record: Record) -> Verdict | None:
    what = _failing_steps(record) or _loaded_broken(record) or _inside(record) or _unscaled(record)
    if what is None:
        return None
    told = first_failure(record)
    return Verdict("non_finite", f"{what}; {told}" if told else what)


def _failing_steps(record: Record) -> str | None:
    failing = failing_steps(record.steps)
    if not failing:
        return None
    first = failing[0]
    skipped = "" if first.applied else ", whose update the loss scaler skipped"
    return (
        f"{what_is_not_finite(first)} at step {first.index}{skipped} "
        f"({len(failing)} of {len(record.steps)} steps are not finite)"
    )


def _loaded_broken(record: Record) -> str | None:
    if record.proof.weights_finite is not False:
        return None
    named = "; ".join(record.proof.non_finite_weights[:NAMED_TENSORS])
    return "the frozen weights are not all finite as loaded" + (f" ({named})" if named else "")


def _inside(record: Record) -> str | None:
    """A value inside the model that was not finite and that no scaler spared, whatever the loss says."""
    failure = record.first_failure
    if failure is None or failure.value is None or failure.skipped_by_scaler:
        return None
    return "a value inside the model is not finite, though every loss and gradient norm recorded is"


def _unscaled(record: Record) -> str | None:
    """Updates that the scaler skipped beyond what its work explains."""
    steps, skipped = record.steps, sum(not step.applied for step in record.steps)
    if not skipped:
        return None
    if skipped == len(steps):
        return f"nothing was trained: the loss scaler skipped all {skipped} updates"
    last = skips_at_the_end(steps)
    if last >= PATIENCE_SKIPS:
        return f"the loss scaler skipped the last {last} updates: lowering the scale to 1 did not help"
    share, measured = skipped_share(steps), measured_steps(record)
    if share is not None and share > SKIP_RATE.value:
        count = sum(not step.applied for step in measured)
        return (
            f"too little was trained: the loss scaler skipped {count} of {len(measured)} measured updates, "
            f"more than {SKIP_RATE.value:.0%}"
        )
    return None


# ---- dead, spiking, healthy ----------------------------------------------------------------------


def _dead(record: Record) -> Verdict | None:
    found = find_dead(record)
    return Verdict("dead", found.reason) if found else None


def _spiking(course: Course) -> Verdict | None:
    found = []
    rise, spike = course.rise, course.spike
    if rise is not None and rise.exceeds:
        found.append(
            f"the loss rose from {rise.start:.3g} to {rise.loss:.3g} at step {rise.step}, "
            f"by more than {rise.allowed:.2g} nats"
        )
    if spike is not None and spike.exceeds:
        found.append(
            f"the gradient norm jumped to {spike.norm:.3g} at step {spike.step}, "
            f"{spike.ratio:.3g} times the mean of the norms before it"
        )
    for growth in course.growths:
        if growth.exceeds:
            what = "activations grow" if growth.direction == "forward" else "gradients grow"
            found.append(
                f"{what} by a factor of {math.exp(growth.exponent):.3g} in every layer at step {growth.step} "
                f"(from {growth.first_abs_max:.3g} to {growth.last_abs_max:.3g})"
            )
    return Verdict("spiking", "; ".join(found)) if found else None


def _healthy(record: Record) -> Verdict:
    skipped = sum(not step.applied for step in record.steps)
    # A skipped step's norm is not finite, and it moved nothing: the range is of those that trained.
    norms = [step.gradient_norm for step in measured_steps(record) if step.applied]
    weights = (
        "the trained weights are finite"
        if record.trainable_weights_finite
        else "the trained weights were not checked"
    )
    scaler = (
        f"; the loss scaler skipped {skipped} of {len(record.steps)} updates, which is its work"
        if skipped
        else ""
    )
    applied = f"{len(record.steps) - skipped} applied" if skipped else f"{len(record.steps)}"
    return Verdict(
        "healthy",
        f"all losses and gradient norms of {applied} steps are finite "
        f"(measured norms {min(norms):.3g} to {max(norms):.3g}), and {weights}{scaler}",
    )
