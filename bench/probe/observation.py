"""What the probes saw of one step, before its update: read from the devices once, as plain numbers."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.probe.gradients import TensorStatistics
from bench.probe.ranges import MicroBatchRanges, Seen
from bench.record.stability import StepProbe


@dataclass(frozen=True)
class Observation:
    """What the probes saw of one step, before its update."""

    step: int
    losses: tuple[float, ...]
    target_counts: tuple[int, ...]
    """Answer tokens of each micro-batch."""
    ranges: Sequence[MicroBatchRanges]
    gradients: TensorStatistics
    gradient_norm: float
    spoilt_weights: tuple[str, ...]
    """Trainable tensors that were not finite when the step began."""
    loss_scale: float | None

    @property
    def finite(self) -> bool:
        """Whether losses and gradients are."""
        return all(map(math.isfinite, (*self.losses, self.gradient_norm)))

    def summary(self, layers: int) -> StepProbe:
        """What goes into the record."""
        return StepProbe(
            activation_abs_max=_by_layer(layers, (seen for m in self.ranges for seen in m.forward)),
            gradient_abs_max=_by_layer(layers, (
                seen for m in self.ranges for seen in m.backward if seen.place.module.endswith(
                    f"layers.{seen.place.layer}"))),
            tensor_norms=self.gradients.norms,
            non_finite_values=self.gradients.non_finite,
            zero_values=self.gradients.zeros,
        )  # fmt: skip


def _by_layer(layers: int, seen: Iterable[Seen]) -> tuple[float | None, ...]:
    largest: list[float | None] = [None] * layers
    for one in seen:
        if one.place.layer is not None:
            largest[one.place.layer] = worst(largest[one.place.layer], one.abs_max)
    return tuple(largest)


def worst(known: float | None, new: float) -> float:
    """The larger of two absolute maxima; a NaN outranks every number."""
    if known is None or math.isnan(new):
        return new
    return known if math.isnan(known) else max(known, new)
