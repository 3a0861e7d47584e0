"""The training loop as a person would write it by hand, in a worker: ``bench.run.worker ORDER FD --bare``.

It trains what a run of the same order trains (model, adapters, batches, checkpointing, optimizer), loaded in
the same way, with nothing of ``bench.run.training`` in its loop and nothing that looks on. It is what the
harness's loop is compared with (``bench.run.overhead``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.record.overhead import BareStep
from bench.run.stages import Run

if TYPE_CHECKING:
    import torch

    from bench.run.training import Trainer
    from bench.run.workload import Batch, WorkloadReader


class BareRun(Run):
    """The stages of a worker that trains by hand."""

    def train_by_hand(self) -> None:
        """Load as a run does, then train, telling each step's seconds and loss as a person would print them.

        Raises ValueError for float16, whose scaler this loop does not have.
        """
        self.channel.stage("load")
        with self.watched:
            self._import_libraries()
        from bench.probe.clock import now
        from bench.probe.memory import release_unused

        builder = self._builder()
        trainer = builder.trainer_of(self.request)
        if trainer.scaler is not None:
            raise ValueError("the loop by hand has no gradient scaler; choose another dtype than float16")
        release_unused(trainer.devices)
        self.channel.stage("train")
        for index in range(self.request.workload.steps):
            batches = read_batches(trainer, trainer.reader)
            began = now(trainer.devices)
            loss = bare_step(trainer, batches)
            seconds = now(trainer.devices) - began
            self.channel.send("step", step=BareStep(index=index, seconds=seconds, loss=loss))


def bare_step(trainer: Trainer, batches: list[Batch]) -> float:
    """One training step as it would be written by hand. Returns its loss, which waits for the device."""
    from torch import nn

    total = 0.0
    for batch in batches:
        loss = _loss(trainer, batch)
        (loss / len(batches)).backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach()) / len(batches)
    limit = trainer.request.optimizer.max_gradient_norm
    if limit is not None:
        nn.utils.clip_grad_norm_(trainer.parameters, limit)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    return total


def read_batches(trainer: Trainer, reader: WorkloadReader) -> list[Batch]:
    """The micro-batches of one optimizer step."""
    return [reader.next_batch() for _ in range(trainer.request.workload.gradient_accumulation_steps)]


def _loss(trainer: Trainer, batch: Batch) -> torch.Tensor:
    """Mean cross-entropy over the answer tokens.

    In a function, so that the logits are not held by a name through the backward, which would slow the loop
    down.
    """
    import torch
    from torch import nn

    from bench.run.workload import IGNORED_LABEL

    device, packed = trainer.devices[0], trainer.request.workload.padding == "packed"
    with torch.autocast(device.type, trainer.dtype, enabled=trainer.dtype != torch.float32):
        mask = None if packed else batch.attention_mask.to(device)
        logits = trainer.adapters.model(input_ids=batch.input_ids.to(device), attention_mask=mask).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1),
        batch.labels[:, 1:].to(logits.device).flatten(),
        ignore_index=IGNORED_LABEL,
    )
