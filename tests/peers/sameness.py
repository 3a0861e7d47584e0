"""Whether an arm did the same work as this project, step by step: digests of what was consumed, losses, norms.

Data and initial adapters are compared by digest, which leaves no doubt. That the computing is the same shows in
the losses and gradient norms: they come from other code in another process, which rounds in another order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from tests.peers.outcome import Outcome, StepSeen

TOLERANCE = 2**-8
"""One rounding of bfloat16 (8 bits of significand), in which both compute: relative, for losses. A loss is a mean
over tokens of float32 cross-entropies of bfloat16 logits, so what one order of rounding does to it is below that."""

HALF_A_LAST_PLACE = 2**-24
"""Of a float32, relative: what undoing a peer's divisor in float64 can cost."""


@dataclass(frozen=True)
class Sameness:
    """One run beside this project's of the same case and round."""

    same_data: bool | None
    """None: not observed."""
    same_adapters: bool | None
    same_quantization: bool | None
    """As many layers hold 4-bit codes."""
    loss_difference: float | None
    """Largest relative difference of the losses per predicted token; NaN where one alone is not finite."""
    norm_difference: float | None
    """Largest relative difference of the gradient norms before clipping."""
    equal_losses: int
    """Steps whose loss is the same to the bit of a float32."""
    steps: int

    @property
    def problems(self) -> list[str]:
        """What speaks against the same work; empty where nothing does."""
        said = {
            "other data": self.same_data is False,
            "other initial adapters": self.same_adapters is False,
            "another number of quantized layers": self.same_quantization is False,
        }
        found = [name for name, holds in said.items() if holds]
        difference = self.loss_difference
        if difference is not None and not difference <= TOLERANCE:
            found.append(f"losses differ by up to {difference:.2g}")
        return found


def compare(outcome: Outcome, ours: Outcome) -> Sameness:
    """``outcome`` beside this project's own."""
    steps = list(zip(outcome.steps, ours.steps, strict=False))
    return Sameness(
        same_data=_same(outcome.data_digest, ours.data_digest),
        same_adapters=_same(outcome.adapters_digest, ours.adapters_digest),
        same_quantization=_same(outcome.quantized_layers, ours.quantized_layers),
        loss_difference=_largest([_difference(a.loss_per_token, b.loss_per_token) for a, b in steps]),
        norm_difference=_largest([_norms(a, b) for a, b in steps]),
        equal_losses=sum(_difference(a.loss_per_token, b.loss_per_token) <= HALF_A_LAST_PLACE for a, b in steps),
        steps=len(steps),
    )


def _same(one: str | int | None, other: str | int | None) -> bool | None:
    return None if one is None or other is None else one == other


def _norms(one: StepSeen, other: StepSeen) -> float | None:
    """The norm scales with what the sum of losses was divided by, as the loss does."""
    if one.gradient_norm is None or other.gradient_norm is None:
        return None
    scale = one.divisor / one.loss_tokens if one.divisor is not None and one.loss_tokens else 1.0
    return _difference(one.gradient_norm * scale, other.gradient_norm)


def _difference(one: float, other: float) -> float:
    """Relative to the other; 0 where both are NaN or the same infinity."""
    if math.isnan(one) and math.isnan(other):
        return 0.0
    if one == other:
        return 0.0
    if not math.isfinite(one) or not math.isfinite(other) or other == 0:
        return math.nan
    return abs(one - other) / abs(other)


def _largest(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if any(math.isnan(value) for value in known):
        return math.nan
    return max(known, default=None)
