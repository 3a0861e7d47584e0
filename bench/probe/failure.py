"""Where the first value that is not finite came from: step, micro-batch, phase, module, and the evidence.

`FailureFinder` is told of every step and remembers how large the numbers were at every place. Causes are
looked for in the order in which they come: the trainable weights as the step found them, the batch, the
frozen weights of the module, the forward, the backward, the optimizer.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence

import torch

from bench.probe.observation import Observation
from bench.probe.ranges import MicroBatchRanges, Place, Seen
from bench.record.stability import FailureKind, FailurePhase, FirstFailure

HISTORY = 64
"""Micro-batches remembered at each place."""


class FailureFinder:
    """Told of every step in order; ``found`` is the first failure, or the first that no scaler spared."""

    def __init__(
        self, names: Sequence[str], broken: Mapping[str, str], device: str, dtype: torch.dtype
    ) -> None:
        """``names``: of the trainable tensors. ``broken``: module -> what of its frozen weights is not
        finite. ``device``, ``dtype``: of the loss and the adapters' products."""
        self.found: FirstFailure | None = None
        self._names = names
        self._broken = broken
        self._device = device
        self._dtype = dtype
        self._history: dict[tuple[Place, FailurePhase], deque[float]] = {}
        self._last_finite_step: int | None = None

    @property
    def final(self) -> bool:
        """Whether a failure was found that no later one can take the place of."""
        return self.found is not None and not self.found.skipped_by_scaler

    def look(self, seen: Observation, *, applied: bool) -> bool:
        """Take one step's observation. Returns whether ``found`` is new. ``applied``: whether the update
        was; the scaler skips one whose gradients are not finite."""
        failure = None if self.final else self._first(seen, spared=not applied)
        new = failure is not None and (self.found is None or not failure.skipped_by_scaler)
        if new:
            self.found = failure
        self._remember(seen)
        return new

    def look_at_weights(self, step: int, spoilt: Sequence[str]) -> bool:
        """After the last step: trainable tensors that its update left not finite."""
        if self.final or not spoilt:
            return False
        self.found = self._optimizer(step, spoilt)
        return True

    def _first(self, seen: Observation, *, spared: bool) -> FirstFailure | None:
        if seen.spoilt_weights:
            if self._last_finite_step == seen.step - 1 and seen.step > 0:
                return self._optimizer(seen.step - 1, seen.spoilt_weights)
            return self._poisoned(seen)
        for micro_batch in range(len(seen.losses)):
            failure = self._in_micro_batch(seen, micro_batch, spared=spared)
            if failure is not None:
                return failure
        if math.isfinite(seen.gradient_norm):
            return None
        # Of several micro-batches the gradients are summed: which one it was is not to be seen here.
        only = 0 if len(seen.losses) == 1 else None
        return self._in_adapters(seen, self._bad_adapters(seen), only, spared=spared)

    def _bad_adapters(self, seen: Observation) -> list[int]:
        return [i for i, count in enumerate(seen.gradients.non_finite) if count]

    def _above(self, adapter: int, place: Place) -> bool:
        """Whether an adapter's layer comes after the place in the forward, so before it in the backward."""
        layer = Place(self._names[adapter], "output").layer
        return layer is not None and place.layer is not None and layer > place.layer

    def _in_micro_batch(self, seen: Observation, micro_batch: int, *, spared: bool) -> FirstFailure | None:
        finite = math.isfinite(seen.losses[micro_batch])
        if not finite and not seen.target_counts[micro_batch]:
            return self._empty_batch(seen, micro_batch)
        place = _first_bad(seen.ranges[micro_batch].forward)
        if place is not None:
            return self._at(seen, micro_batch, "forward", place, spared=spared and finite)
        if not finite:
            return self._in_loss(seen, micro_batch)
        place = _first_bad(seen.ranges[micro_batch].backward)
        if place is None:
            return None
        # The gradient at this place came out of what lies above it. Where an adapter up there has a gradient
        # that is not finite, the fault began in its layer.
        above = [i for i in self._bad_adapters(seen) if self._above(i, place.place)]
        if above:
            return self._in_adapters(seen, above, micro_batch, spared=spared)
        return self._at(seen, micro_batch, "backward", place, spared=spared)

    def _remember(self, seen: Observation) -> None:
        self._last_finite_step = seen.step if seen.finite else None
        for ranges in seen.ranges:
            phases: tuple[tuple[FailurePhase, list[Seen]], ...]
            phases = (("forward", ranges.forward), ("backward", ranges.backward))
            for phase, all_seen in phases:
                for one in all_seen:
                    if math.isfinite(one.abs_max):
                        self._history.setdefault((one.place, phase), deque(maxlen=HISTORY)).append(
                            one.abs_max
                        )

    def _broken_at(self, place: Place, ranges: MicroBatchRanges) -> str | None:
        """A module with broken weights that explains the place: itself, else one of its decoder layer whose
        own output is not watched (a norm). One that is watched would have been the first place itself."""
        if place.module in self._broken:
            return place.module
        watched = {one.place.module for one in ranges.forward}
        same = (
            module
            for module in self._broken
            if place.layer is not None
            and Place(module, "output").layer == place.layer
            and module not in watched
        )
        return next(same, None)

    # ---- one sentence for each kind ----------------------------------------------------------------

    def _at(
        self, seen: Observation, micro_batch: int, phase: FailurePhase, at: Seen, *, spared: bool
    ) -> FirstFailure:
        earlier = seen.ranges[:micro_batch]
        history = [*self._history.get((at.place, phase), ()), *_values(earlier, at.place, phase)][-HISTORY:]
        overflow = math.isinf(at.abs_max)
        what = at.place.part if phase == "forward" else f"gradient of the {at.place.part}"
        limit = torch.finfo(at.dtype).max
        name = str(at.dtype).removeprefix("torch.")
        broken = self._broken_at(at.place, seen.ranges[micro_batch]) if phase == "forward" else None
        before = (
            f"the largest value there before was {history[-1]:.5g}" if history
            else "there was no micro-batch before"
        )  # fmt: skip
        held = (
            f"the {what} of {at.place.module} held {'an infinity' if overflow else 'NaN'} in the {phase} of "
            f"step {seen.step}, micro-batch {micro_batch}"
        )
        kind: FailureKind
        module = at.place.module
        if broken is not None:
            module = broken
            kind = "broken_weights"
            evidence = f"{module} was loaded with broken weights ({self._broken[module]}), and {held}"
        else:
            kind = _kind(phase, overflow=overflow)
            evidence = f"{held}; {name} ends at {limit:.5g}, and {before}"
        if spared:
            evidence += f"; the loss scaler (at {seen.loss_scale:g}) skipped the update"
        return self._failure(
            seen, micro_batch, kind=kind, phase=phase, module=module, tensor=what,
            device=at.device, value=at.abs_max, last_finite_abs_max=history[-1] if history else None,
            history_abs_max=tuple(history), dtype_max=limit, skipped_by_scaler=spared, evidence=evidence,
        )  # fmt: skip

    def _in_loss(self, seen: Observation, micro_batch: int) -> FirstFailure:
        loss = seen.losses[micro_batch]
        return self._failure(
            seen, micro_batch, kind=_kind("forward", overflow=math.isinf(loss)), phase="forward",
            module=None, tensor="loss", value=loss, dtype_max=torch.finfo(torch.float32).max,
            evidence=f"the loss of step {seen.step}, micro-batch {micro_batch} is not finite, though all "
            "activations that were watched are",
        )  # fmt: skip

    def _in_adapters(
        self, seen: Observation, bad: Sequence[int], micro_batch: int | None, *, spared: bool
    ) -> FirstFailure:
        """Some adapters' gradients are not finite, where the gradients that came to their layer are."""
        if not bad:
            return self._failure(
                seen, micro_batch, kind="backward_overflow", phase="backward", module=None,
                tensor="gradient norm", value=seen.gradient_norm, skipped_by_scaler=spared,
                dtype_max=torch.finfo(torch.float32).max,
                evidence=f"the gradient norm of step {seen.step} is not finite, though every value is",
            )  # fmt: skip
        # Gradients arrive from the last layer to the first, and B's before A's.
        first = bad[-1]
        module, _, tensor = self._names[first].rpartition(".")
        norm = seen.gradients.norms[first]
        overflow = norm is not None and math.isinf(norm)
        spoilt = len(self._bad_adapters(seen))
        scaler = f"; the loss scaler (at {seen.loss_scale:g}) skipped the update" if spared else ""
        return self._failure(
            seen, micro_batch, kind=_kind("backward", overflow=overflow), phase="backward", module=module,
            tensor=f"gradient of {tensor}", value=norm, dtype_max=torch.finfo(self._dtype).max,
            skipped_by_scaler=spared,
            evidence=f"the gradient of {self._names[first]} is not finite in step {seen.step}, though what "
            f"came to its layer in the backward is ({spoilt} of {len(self._names)} adapter tensors are not "
            f"finite){scaler}",
        )  # fmt: skip

    def _empty_batch(self, seen: Observation, micro_batch: int) -> FirstFailure:
        return self._failure(
            seen, micro_batch, kind="bad_batch", phase="forward", module=None, tensor="labels",
            value=seen.losses[micro_batch],
            evidence=f"micro-batch {micro_batch} of step {seen.step} holds no answer token: all its labels "
            "are masked, and the mean loss over nothing is NaN",
        )  # fmt: skip

    def _poisoned(self, seen: Observation) -> FirstFailure:
        module, _, tensor = seen.spoilt_weights[0].rpartition(".")
        return self._failure(
            seen, None, kind="poisoned_weights", phase="forward", module=module, tensor=tensor,
            value=math.nan,
            evidence=f"{len(seen.spoilt_weights)} trainable tensors were not finite when step {seen.step} "
            f"began, {seen.spoilt_weights[0]} the first of them",
        )  # fmt: skip

    def _optimizer(self, step: int, spoilt: Sequence[str]) -> FirstFailure:
        module, _, tensor = spoilt[0].rpartition(".")
        return FirstFailure(
            kind="optimizer_step", step=step, micro_batch=None, phase="optimizer", module=module,
            tensor=tensor, device=self._device, value=math.nan, last_finite_abs_max=None, dtype_max=None,
            loss=None,
            evidence=f"the update of step {step} left {len(spoilt)} of {len(self._names)} trainable tensors "
            f"not finite, {spoilt[0]} the first of them, though its losses and gradients were finite",
        )  # fmt: skip

    def _failure(self, seen: Observation, micro_batch: int | None, **facts: object) -> FirstFailure:
        known = {
            "step": seen.step, "micro_batch": micro_batch, "device": self._device,
            "last_finite_abs_max": None, "dtype_max": None, "loss_scale": seen.loss_scale,
            "loss": None if micro_batch is None else seen.losses[micro_batch],
        }  # fmt: skip
        return FirstFailure.model_validate({**known, **facts})


def _kind(phase: FailurePhase, *, overflow: bool) -> FailureKind:
    if phase == "forward":
        return "forward_overflow" if overflow else "forward_invalid"
    return "backward_overflow" if overflow else "backward_invalid"


def _first_bad(seen: Sequence[Seen]) -> Seen | None:
    return next((one for one in seen if not math.isfinite(one.abs_max)), None)


def _values(ranges: Sequence[MicroBatchRanges], place: Place, phase: FailurePhase) -> list[float]:
    return [
        one.abs_max
        for batch in ranges
        for one in (batch.forward if phase == "forward" else batch.backward)
        if one.place == place and math.isfinite(one.abs_max)
    ]
