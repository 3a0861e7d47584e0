"""What the float16 loss scaler did: which steps failed in earnest, and which updates it skipped in its work.

In float16 the loss is scaled up before the backward. Where a gradient overflows under that scale, torch's
GradScaler skips the update and halves the scale; the norm of such a step is not finite, its loss is, and no
weight was touched. That is no failure as long as updates are applied again soon after.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from bench.record.schema import Step

PATIENCE_SKIPS = 17
"""Skips in a row after which the scaler is at its end. Torch's GradScaler starts at 2**16 and halves at each
skip, so that the 17th step ran with a scale of 1: what overflows there overflows without a scaler, too."""


def is_finite_step(step: Step) -> bool:
    """Whether every loss and the gradient norm of a step are finite."""
    return math.isfinite(step.gradient_norm) and all(math.isfinite(loss) for loss in step.losses)


def failing_steps(steps: Sequence[Step]) -> tuple[Step, ...]:
    """Steps with a loss that is not finite, or with such a gradient norm in an update that was applied."""
    return tuple(step for step in steps if not is_finite_step(step) and not is_scaler_at_work(step))


def is_scaler_at_work(step: Step) -> bool:
    """Whether the loss is finite and the update was skipped."""
    return not step.applied and all(math.isfinite(loss) for loss in step.losses)


def has_scaler(steps: Sequence[Step]) -> bool:
    """Whether the run had a loss scaler, as far as its steps tell."""
    return any(step.loss_scale is not None or not step.applied for step in steps)


def skipped_share(steps: Sequence[Step]) -> float | None:
    """Share of the measured steps whose update was skipped; None: no step was measured."""
    measured = [step for step in steps if not step.warmup]
    return sum(not step.applied for step in measured) / len(measured) if measured else None


def skips_at_the_end(steps: Sequence[Step]) -> int:
    """How many of the last steps in a row were skipped."""
    count = 0
    for step in reversed(steps):
        if step.applied:
            break
        count += 1
    return count


def spelt(value: float) -> str:
    """A number that is not finite, as the records spell it."""
    return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"


def what_is_not_finite(step: Step) -> str:
    """The first value of a step that is not finite, in words: the loss comes before the gradient."""
    loss = next((loss for loss in step.losses if not math.isfinite(loss)), None)
    if loss is not None:
        return f"the loss is {spelt(loss)}"
    return f"the gradient norm is {spelt(step.gradient_norm)}"
