"""Growth by depth: how the largest numbers of a run change from layer to layer.

``find_growth(record)`` gives the strongest growth of activations and of gradients over the probed steps, and
`Growth.exceeds` whether it is beyond its threshold (``bench.judge.thresholds.DEPTH_GROWTH``).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.judge.headroom import Direction, compute_dtype, headroom_bits
from bench.judge.thresholds import DEPTH_GROWTH, DEPTH_GROWTH_LAYERS
from bench.record.schema import Record, Step


@dataclass(frozen=True)
class Growth:
    """How the largest absolute values change with depth, in the order in which they are computed.

    OLMo 2 (arXiv 2501.00656) computes its growth exponent from norms; ours is computed from absolute maxima,
    for these are what runs out of range.
    """

    direction: Direction
    step: int
    first_abs_max: float
    """Forward: of layer 0. Backward: of the last layer, where the gradient sets out."""
    last_abs_max: float
    layers: int
    headroom_bits: float | None
    """Of ``last_abs_max`` in the compute dtype; None: its range is unknown here."""

    @property
    def exponent(self) -> float:
        """ln(last / first) over the number of layers: 0.69 means doubling in every layer."""
        return (math.log(self.last_abs_max) - math.log(self.first_abs_max)) / self.layers

    @property
    def limit(self) -> float:
        """The exponent that is allowed for so many layers."""
        return DEPTH_GROWTH * max(1.0, DEPTH_GROWTH_LAYERS / self.layers)

    @property
    def exceeds(self) -> bool:
        """Whether the exponent is above its limit; of activations, which are normalized before they are
        used, only where as much growth again would leave the dtype's range."""
        if self.exponent <= self.limit:
            return False
        again = self.exponent * self.layers / math.log(2)
        return self.direction == "backward" or self.headroom_bits is None or self.headroom_bits < again


def find_growth(record: Record) -> tuple[Growth, ...]:
    """The strongest growth of any step: one of activations and one of gradients, where they were probed.

    A step whose first or last layer has no finite maximum above zero has no growth.
    """
    dtype = compute_dtype(record)
    found: list[Growth] = []
    for direction in DIRECTIONS:
        steps = list(_growths(record.steps, direction, dtype))
        if steps:
            found.append(max(steps, key=lambda growth: (growth.exceeds, growth.exponent)))
    return tuple(found)


DIRECTIONS: tuple[Direction, ...] = ("forward", "backward")


def _growths(steps: Sequence[Step], direction: Direction, dtype: str) -> Iterator[Growth]:
    for step in steps:
        if step.probe is None:
            continue
        maxima: Sequence[float | None] = (
            step.probe.activation_abs_max if direction == "forward" else step.probe.gradient_abs_max[::-1]
        )
        # One layer has no depth.
        if len(maxima) < 2 or not (_is_size(maxima[0]) and _is_size(maxima[-1])):
            continue
        first, last = maxima[0] or 0.0, maxima[-1] or 0.0
        yield Growth(direction, step.index, first, last, len(maxima), headroom_bits(last, dtype))


def _is_size(value: float | None) -> bool:
    return value is not None and math.isfinite(value) and value > 0
