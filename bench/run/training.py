"""The one training loop: plain PyTorch, the same for every backend, read top to bottom.

Mixed precision as people train QLoRA: frozen weights in the compute dtype, adapters in float32, autocast
in the compute dtype, AdamW, clipping by global norm, a gradient scaler in float16. Losses are recorded
raw for each micro-batch and the gradient norm before clipping; nothing filters or averages them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import nn
from torch.nn.utils import clip_grads_with_norm_

from bench.ask.plan import RunRequest
from bench.load.lora import Adapters
from bench.load.model import DTYPES
from bench.probe.clock import now
from bench.probe.collector import old_objects_left_alone
from bench.probe.gradients import gradient_norm
from bench.probe.memory import MemoryProbe, peak_reserved_bytes, resident_bytes
from bench.record.memory import MemoryReading, Phase
from bench.record.schema import Step
from bench.run.attention import why_no_kernel
from bench.run.watch import RandomState, Watch
from bench.run.workload import IGNORED_LABEL, Batch, WorkloadReader

if TYPE_CHECKING:
    from bench.run.distributed import Tie


@dataclass
class Trainer:
    """State of one training: what a step needs and nothing else."""

    adapters: Adapters
    request: RunRequest
    reader: WorkloadReader
    devices: Sequence[torch.device]
    dtype: torch.dtype
    """Effective compute dtype."""
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler | None
    watch: Watch | None = None
    """None: nothing looks on, and the steps tell nothing of probes."""
    tie: Tie | None = None
    """None: this process trains alone."""
    index: int = 0
    """Of the present step."""

    @property
    def parameters(self) -> list[nn.Parameter]:
        """The trainable tensors."""
        return list(self.adapters.tensors.values())


def make_trainer(
    adapters: Adapters,
    request: RunRequest,
    reader: WorkloadReader,
    devices: Sequence[torch.device],
    dtype_name: str,
) -> Trainer:
    """Optimizer and scaler for the adapters; the scaler exists in float16 only."""
    settings = request.optimizer
    optimizer = torch.optim.AdamW(
        list(adapters.tensors.values()),
        lr=settings.learning_rate,
        betas=(settings.beta1, settings.beta2),
        eps=settings.epsilon,
        weight_decay=settings.weight_decay,
    )
    scaler = torch.amp.GradScaler(devices[0].type) if dtype_name == "float16" else None
    return Trainer(adapters, request, reader, devices, DTYPES[dtype_name], optimizer, scaler)


def enable_checkpointing(model: nn.Module, mode: str) -> None:
    """Recompute each decoder layer in backward. The mode is the same for all backends: under the
    reentrant one the first forward runs without gradients, which some kernels take as inference."""
    if mode == "none":
        return
    model.gradient_checkpointing_enable(  # type: ignore[operator]
        gradient_checkpointing_kwargs={"use_reentrant": mode == "reentrant"}
    )
    if mode == "reentrant":
        model.enable_input_require_grads()  # type: ignore[operator]


def train(
    trainer: Trainer,
    memory: MemoryProbe,
    on_step: Callable[[Step, list[MemoryReading]], None],
    on_first_backward: Callable[[], None] = lambda: None,
) -> None:
    """Run every step of the request, reporting each as soon as it is done.

    Memory by phase is read in the last warm-up step (the first step where there is no warm-up): there the
    optimizer's state exists, and reading costs no measured step anything.
    """
    workload = trainer.request.workload
    phase_step = max(workload.warmup_steps - 1, 0)
    with old_objects_left_alone():
        for index in range(workload.steps):
            step, readings = one_step(
                trainer,
                index,
                memory if index == phase_step else None,
                on_first_backward if index == 0 else None,
            )
            on_step(step, readings)


def one_step(
    trainer: Trainer,
    index: int,
    memory: MemoryProbe | None = None,
    on_first_backward: Callable[[], None] | None = None,
) -> tuple[Step, list[MemoryReading]]:
    """One optimizer step, and the memory of its phases where a probe is given."""
    readings: list[MemoryReading] = []
    trainer.index = index
    workload, watch = trainer.request.workload, trainer.watch
    batches = [trainer.reader.next_batch() for _ in range(workload.gradient_accumulation_steps)]
    if watch:
        watch.check(index, batches)
    random = RandomState.now()
    began = now(trainer.devices)
    losses = []
    for place, batch in enumerate(batches):
        last = place == len(batches) - 1
        with trainer.tie.micro_batch(last=last) if trainer.tie else nullcontext():
            losses.append(micro_batch(trainer, batch, len(batches), memory if last else None, readings))
    if trainer.tie:
        trainer.tie.average()
    # No gradient is owed where there was nothing to predict.
    if on_first_backward and any(batch.loss_tokens for batch in batches):
        paused = now(trainer.devices)
        on_first_backward()
        began += now(trainer.devices) - paused
    with _phase(trainer, memory, "optimizer_step", readings):
        scale, norm = unscaled_norm(trainer)
        paused = now(trainer.devices)
        seen = watch.observe(index, batches, losses, norm, scale) if watch else None
        kept = watch.keep(seen, batches, random) if watch and seen else None
        watching = now(trainer.devices) - paused if watch else None
        applied = _update(trainer, norm, scale)
    seconds = now(trainer.devices) - began - (watching or 0.0)
    if watch and seen:
        watch.settle(seen, kept, applied=applied)
    step = Step(
        index=index,
        warmup=index < workload.warmup_steps,
        losses=tuple(float(loss) for loss in losses),
        gradient_norm=float(norm),
        learning_rate=trainer.request.optimizer.learning_rate,
        seconds=seconds,
        watching_seconds=watching,
        tokens=sum(batch.tokens for batch in batches),
        loss_tokens=sum(batch.loss_tokens for batch in batches),
        applied=applied,
        loss_scale=scale,
        peak_reserved_bytes=peak_reserved_bytes(trainer.devices),
        resident_bytes=resident_bytes() if trainer.devices[0].type == "cpu" else None,
        probe=seen.summary(watch.ranges.layers) if watch and seen else None,
    )
    return step, readings


def micro_batch(
    trainer: Trainer,
    batch: Batch,
    accumulation: int,
    memory: MemoryProbe | None = None,
    readings: list[MemoryReading] | None = None,
) -> torch.Tensor:
    """Forward and backward of one micro-batch, its gradient divided by ``accumulation``. Returns the loss."""
    readings = [] if readings is None else readings
    ranges = trainer.watch.ranges if trainer.watch else None
    if ranges:
        ranges.forward_begins()
    with _phase(trainer, memory, "forward", readings):
        loss = micro_batch_loss(trainer, batch)
    if ranges:
        ranges.backward_begins()
    with _phase(trainer, memory, "backward", readings):
        scaled = loss / accumulation
        target = trainer.scaler.scale(scaled) if trainer.scaler else scaled
        target.backward()  # type: ignore[no-untyped-call]
    if ranges:
        ranges.ends()
    return loss.detach()


def micro_batch_loss(trainer: Trainer, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the answer tokens, computed in float32 from the model's logits."""
    device = trainer.devices[0]
    autocast = torch.autocast(device.type, trainer.dtype, enabled=trainer.dtype != torch.float32)
    with autocast:
        # A row without padding needs no mask, which keeps the fused causal kernels available.
        mask = batch.attention_mask.to(device) if trainer.request.workload.padding != "packed" else None
        model = trainer.tie.model if trainer.tie else trainer.adapters.model
        logits = model(input_ids=batch.input_ids.to(device), attention_mask=mask).logits
    labels = batch.labels[:, 1:].to(logits.device)
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), labels.flatten(), ignore_index=IGNORED_LABEL
    )


def unscaled_norm(trainer: Trainer) -> tuple[float | None, torch.Tensor]:
    """The loss scale (None without a scaler), and the norm of the unscaled gradients before clipping."""
    scale = None
    if trainer.scaler:
        trainer.scaler.unscale_(trainer.optimizer)
        scale = trainer.scaler.get_scale()
    return scale, gradient_norm(trainer.parameters)


def _update(trainer: Trainer, norm: torch.Tensor, scale: float | None) -> bool:
    """Clip and step. Returns whether the step was applied."""
    limit = trainer.request.optimizer.max_gradient_norm
    if limit is not None:
        clip_grads_with_norm_(trainer.parameters, limit, norm)
    applied = True
    if trainer.scaler:
        trainer.scaler.step(trainer.optimizer)
        trainer.scaler.update()
        # The scaler lowers its scale exactly when it found a non-finite gradient and skipped the step.
        applied = trainer.scaler.get_scale() >= (scale or 0.0)
    else:
        trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    return applied


@contextmanager
def _phase(
    trainer: Trainer, memory: MemoryProbe | None, name: Phase, readings: list[MemoryReading]
) -> Iterator[None]:
    """Where a probe is given: peaks start at the phase's beginning and are read at its end. An error takes
    along in which phase of which step it was raised."""
    if memory:
        memory.start_phase()
    try:
        yield
    except Exception as error:
        error.add_note(f"in the {name.replace('_', ' ')} of step {trainer.index}")
        if reason := why_no_kernel(trainer.request.attention, error):
            error.add_note(reason)
        raise
    if memory:
        readings.extend(memory.read(name))
