"""The replay: the failing micro-batch once more, to name the operation and to try what heals it.

It happens after the training, from the batch, random state and trainable weights that the `Watch` kept, so
it costs the measured steps nothing. First every operation is watched; then one thing at a time is changed:
adapters in float32, another attention kernel, a model loaded again in bfloat16 (float32 where the run was
bfloat16 already).
"""

from __future__ import annotations

import gc
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch

from bench.ask.experiment import Dtype
from bench.load.lora import compute_in_autocast, compute_in_float32
from bench.probe.gradients import gradient_norm
from bench.probe.operations import Operation, OperationWatch
from bench.probe.ranges import RangeProbe
from bench.record.stability import FirstFailure, Remedy, Replay
from bench.run.attention import ALTERNATIVES, switch
from bench.run.training import Trainer, micro_batch_loss
from bench.run.watch import Snapshot
from bench.run.workload import Batch

REPLAYABLE = (
    "forward_overflow",
    "forward_invalid",
    "backward_overflow",
    "backward_invalid",
    "broken_weights",
)

Rebuild = Callable[[Dtype], Trainer]
"""Loads the model again with another compute dtype, adapters attached; nothing looks on."""


@dataclass(frozen=True)
class Attempt:
    """What the micro-batch gave."""

    loss: float
    gradient_norm: float
    abs_max_there: float | None
    operation: Operation | None = None

    @property
    def finite(self) -> bool:
        """Whether loss and gradients are."""
        return math.isfinite(self.loss) and math.isfinite(self.gradient_norm)


class Replayer:
    """Replays one failure. ``linears``: names of the quantized layers."""

    def __init__(
        self, trainer: Trainer, linears: list[str], failure: FirstFailure, snapshot: Snapshot
    ) -> None:
        self.trainer = trainer
        self.linears = linears
        self.failure = failure
        self.snapshot = snapshot

    def watched(self) -> Replay:
        """The micro-batch with every operation watched. An error of the replay is told, never raised."""
        try:
            attempt = self._attempt(self.trainer, watched=True)
        except Exception as error:  # noqa: BLE001 - the run's own result stands, whatever happens here
            return Replay(reproduced=False, error=f"{type(error).__name__}: {error}"[:500])
        found = attempt.operation
        if found is None:
            return Replay(reproduced=not attempt.finite)
        return Replay(
            reproduced=not attempt.finite,
            phase=found.phase,
            module=found.module,
            operation=found.name,
            description=found.description,
            value=found.value,
            input_abs_max=found.input_abs_max,
        )

    def float32_adapters(self) -> Remedy:
        """Adapters in float32: their weights and their products."""
        model, asked = self.trainer.adapters.model, self.trainer.request.lora.precision
        detail = f"LoRA weights and products in float32 (the run: {asked})"
        compute_in_float32(model, self.trainer.dtype)
        try:
            return self._remedy("float32_adapters", detail, lambda: self.trainer)
        finally:
            compute_in_autocast(model)

    def attention(self) -> Remedy:
        """Another attention kernel."""
        asked = self.trainer.request.attention
        other = ALTERNATIVES[asked]
        base = self.trainer.adapters.model.get_base_model()  # type: ignore[operator]
        try:
            switch(base, other)
            return self._remedy(
                "attention", f"attention '{other}' instead of '{asked}'", lambda: self.trainer
            )
        finally:
            switch(base, asked)

    def another_dtype(self, rebuild: Rebuild) -> Remedy:
        """The model loaded again in bfloat16, or in float32 where it was bfloat16. The failing model must
        not be needed any more: it is dropped first."""
        failing = self.trainer.dtype
        dtype: Dtype = "float32" if failing == torch.bfloat16 else "bfloat16"
        was = str(failing).removeprefix("torch.")
        del self.trainer
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return self._remedy(
            "float32" if dtype == "float32" else "bfloat16",
            f"the model loaded again with compute dtype {dtype} instead of {was}",
            lambda: rebuild(dtype),
        )

    def _remedy(self, change: str, detail: str, prepare: Callable[[], Trainer]) -> Remedy:
        try:
            attempt = self._attempt(prepare(), watched=False)
        except Exception as error:  # noqa: BLE001 - a remedy that cannot be tried is told as such
            text = f"{type(error).__name__}: {' '.join(str(error).split())}"[:500]
            return Remedy.model_validate({"change": change, "detail": detail, "heals": None, "error": text})
        return Remedy.model_validate({
            "change": change, "detail": detail, "heals": attempt.finite, "loss": attempt.loss,
            "gradient_norm": attempt.gradient_norm, "abs_max_there": attempt.abs_max_there,
        })  # fmt: skip

    def _attempt(self, trainer: Trainer, *, watched: bool) -> Attempt:
        """Forward and backward of the failing micro-batch from the weights before the step, no update."""
        with torch.no_grad():
            for name, parameter in trainer.adapters.tensors.items():
                parameter.copy_(self.snapshot.weights[name])
                parameter.grad = None
        self.snapshot.random.restore()
        batches = self.snapshot.batches
        place = self.failure.micro_batch
        scale = self.snapshot.loss_scale if trainer.scaler else None
        ranges = RangeProbe(trainer.adapters.model, self.linears, fine=trainer.request.trace)
        operation = None
        losses = []
        try:
            for batch in batches if place is None else [batches[place]]:
                ranges.forward_begins()
                if watched and operation is None:
                    with OperationWatch(trainer.adapters.model) as mode:
                        losses.append(self._run(trainer, batch, scale, len(batches), ranges, mode))
                    operation = mode.found
                else:
                    losses.append(self._run(trainer, batch, scale, len(batches), ranges, None))
            norm = float(gradient_norm(trainer.parameters)) / (scale or 1.0)
        finally:
            ranges.remove()
            for parameter in trainer.parameters:
                parameter.grad = None
        loss = next((loss for loss in losses if not math.isfinite(loss)), losses[0])
        return Attempt(loss, norm, self._there(ranges), operation)

    @staticmethod
    def _run(
        trainer: Trainer,
        batch: Batch,
        scale: float | None,
        accumulation: int,
        ranges: RangeProbe,
        mode: OperationWatch | None,
    ) -> float:
        loss = micro_batch_loss(trainer, batch)
        if mode:
            mode.phase = "backward"
        ranges.backward_begins()
        target = loss / accumulation
        (target if scale is None else target * scale).backward()  # type: ignore[no-untyped-call]
        ranges.ends()
        return float(loss.detach())

    def _there(self, ranges: RangeProbe) -> float | None:
        """The largest absolute value at the place of the failure."""
        part = "input" if self.failure.tensor.endswith("input") else "output"
        found = None
        for seen in ranges.read():
            for one in seen.forward if self.failure.phase == "forward" else seen.backward:
                if one.place.module == self.failure.module and one.place.part == part:
                    found = one.abs_max if found is None else max(found, one.abs_max)
        return found


def refined(failure: FirstFailure, replay: Replay) -> FirstFailure:
    """The failure with its kind as the replay taught it: an operation that made an infinity out of finite
    values is an overflow, even where the probe saw the NaN that came of it first."""
    if not replay.reproduced or replay.value is None or failure.kind == "broken_weights":
        return failure
    kind = f"{replay.phase}_{'overflow' if math.isinf(replay.value) else 'invalid'}"
    return FirstFailure.model_validate({**failure.model_dump(), "kind": kind})
