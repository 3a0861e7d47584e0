"""The verdict on one run: did the losses, the gradients and the trained weights survive?

``judge_stability(record)`` gives a word and the evidence for it in one sentence. A run whose values are
not finite is a completed run with a bad verdict, not a failed run: it ran, and that is its result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, get_args

from bench.record.schema import Record, Step

VerdictName = Literal["poisoned", "non_finite", "dead", "not_judged", "healthy"]
GRAVITY: tuple[VerdictName, ...] = get_args(VerdictName)
"""Gravest first."""
BAD: frozenset[VerdictName] = frozenset(("poisoned", "non_finite", "dead"))
"""What speaks against training like this."""

SYNTHETIC = (
    "weights are synthetic: random values have no outliers, so nothing about stability can be concluded"
)
MEASURED_STEPS_NEEDED = 2


@dataclass(frozen=True)
class Verdict:
    """A word for the stability of a run, and the evidence for it in one plain sentence."""

    verdict: VerdictName
    reason: str


def judge_stability(record: Record) -> Verdict:
    """Judge one run from what was recorded of it.

    Synthetic weights are never judged, but what went wrong in such a run is still told in the reason.
    """
    fault = _poisoned(record) or _non_finite(record) or _dead(record)
    if record.request.model.weights == "synthetic":
        return Verdict("not_judged", SYNTHETIC if fault is None else f"{SYNTHETIC}; even so, {fault.reason}")
    if fault is not None:
        return fault
    if record.status != "completed":
        return Verdict("not_judged", f"the run did not complete ({record.status})")
    measured = measured_steps(record)
    if len(measured) < MEASURED_STEPS_NEEDED:
        return Verdict(
            "not_judged",
            f"{len(measured)} measured step(s), and a verdict needs {MEASURED_STEPS_NEEDED}",
        )
    return _healthy(record, measured)


def measured_steps(record: Record) -> tuple[Step, ...]:
    """The steps after the warm-up: those that every statistic is made of."""
    return tuple(step for step in record.steps if not step.warmup)


def is_finite_step(step: Step) -> bool:
    """Whether every loss and the gradient norm of a step are finite."""
    return math.isfinite(step.gradient_norm) and all(math.isfinite(loss) for loss in step.losses)


def _poisoned(record: Record) -> Verdict | None:
    if record.trainable_weights_finite is not False:
        return None
    first = _non_finite(record)
    origin = f"; {first.reason}" if first else "; every loss and gradient norm on the way was finite"
    return Verdict("poisoned", f"the trained weights are not all finite after the last step{origin}")


def _non_finite(record: Record) -> Verdict | None:
    bad = [step for step in record.steps if not is_finite_step(step)]
    if not bad:
        return None
    first = bad[0]
    # The loss comes before the gradient in a step, so it is the earlier evidence.
    losses = [loss for loss in first.losses if not math.isfinite(loss)]
    name, value = ("loss", losses[0]) if losses else ("gradient norm", first.gradient_norm)
    skipped = "" if first.applied else ", whose update the loss scaler skipped"
    return Verdict(
        "non_finite",
        f"the {name} is {spelt(value)} at step {first.index}{skipped} "
        f"({len(bad)} of {len(record.steps)} steps are not finite)",
    )


def spelt(value: float) -> str:
    """A number that is not finite, as the records spell it."""
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def _dead(record: Record) -> Verdict | None:
    measured = measured_steps(record)
    # A run that ended early has shown too little to be called dead.
    if record.status != "completed" or not measured or any(step.gradient_norm != 0 for step in measured):
        return None
    return Verdict(
        "dead",
        f"the gradient norm is exactly 0 in all {len(measured)} measured steps, "
        f"from step {measured[0].index} on",
    )


def _healthy(record: Record, measured: tuple[Step, ...]) -> Verdict:
    norms = [step.gradient_norm for step in measured]
    weights = (
        "the trained weights are finite"
        if record.trainable_weights_finite
        else "the trained weights were not checked"
    )
    return Verdict(
        "healthy",
        f"all losses and gradient norms of {len(record.steps)} steps are finite "
        f"(measured norms {min(norms):.3g} to {max(norms):.3g}), and {weights}",
    )
