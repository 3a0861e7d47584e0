"""What looks on while a step is trained: the probes, the finder of the first failure, and what it keeps.

``bench.run.training`` calls it; with no `Watch` the same loop runs unobserved, which is how its cost is
measured (``make probes``).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from bench.load.lora import Adapters
from bench.probe.failure import FailureFinder
from bench.probe.gradients import non_finite_tensors, tensor_statistics
from bench.probe.observation import Observation
from bench.probe.ranges import RangeProbe
from bench.record.stability import FirstFailure
from bench.run.consumed import Consumed
from bench.run.workload import Batch


@dataclass(frozen=True)
class RandomState:
    """The generators' states."""

    cpu: torch.Tensor
    cuda: list[torch.Tensor]

    @classmethod
    def now(cls) -> RandomState:
        """As they are."""
        # Asking for the states of a GPU that nothing uses would set one up.
        cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
        return cls(torch.get_rng_state(), cuda)

    def restore(self) -> None:
        """Put the generators back to them."""
        torch.set_rng_state(self.cpu)
        if self.cuda:
            torch.cuda.set_rng_state_all(self.cuda)


@dataclass(frozen=True)
class Snapshot:
    """A step from before its update, kept for the replay."""

    batches: Sequence[Batch]
    random: RandomState
    weights: Mapping[str, torch.Tensor]
    """Trainable tensors by name, on the CPU."""
    loss_scale: float | None


class BadBatch(ValueError):
    """A micro-batch that no model could compute; carries the failure for the record."""

    def __init__(self, failure: FirstFailure) -> None:
        super().__init__(failure.evidence)
        self.failure = failure


class Watch:
    """Probes on one model, and what they have found so far."""

    def __init__(
        self,
        adapters: Adapters,
        linears: Sequence[str],
        broken: Mapping[str, str],
        device: torch.device,
        dtype: torch.dtype,
        *,
        fine: bool = False,
    ) -> None:
        """``linears``: names of the quantized layers. ``broken``: see `FailureFinder`. ``fine``: --trace."""
        self.tensors = adapters.tensors
        self.ranges = RangeProbe(adapters.model, linears, fine=fine)
        self.consumed = Consumed(adapters.model)
        self.finder = FailureFinder(list(adapters.tensors), broken, str(device), dtype)
        self.snapshot: Snapshot | None = None
        """Of the step in ``finder.found``; None where that is no step that could be replayed."""
        embedding = adapters.model.get_input_embeddings()  # type: ignore[operator]
        self.vocabulary = int(embedding.weight.shape[0])

    def check(self, step: int, batches: Sequence[Batch]) -> None:
        """Raise BadBatch for ids outside the vocabulary: on a CUDA device they would end the process."""
        for micro_batch, batch in enumerate(batches):
            bad = (batch.input_ids < 0) | (batch.input_ids >= self.vocabulary)
            if bool(bad.any()):
                raise BadBatch(_outside(step, micro_batch, batch, bad, self.vocabulary))
        self.consumed.begin()

    def observe(
        self,
        step: int,
        batches: Sequence[Batch],
        losses: Sequence[torch.Tensor],
        norm: torch.Tensor,
        loss_scale: float | None,
    ) -> Observation:
        """Read every probe, after the backward and before the update."""
        self.consumed.count(batches)
        return Observation(
            step=step,
            losses=tuple(float(loss) for loss in losses),
            target_counts=tuple(batch.loss_tokens for batch in batches),
            ranges=self.ranges.read(),
            gradients=tensor_statistics(list(self.tensors.values())),
            gradient_norm=float(norm),
            spoilt_weights=tuple(non_finite_tensors(self.tensors)),
            loss_scale=loss_scale,
        )

    def keep(self, seen: Observation, batches: Sequence[Batch], random: RandomState) -> Snapshot | None:
        """A snapshot before the update, where something is not finite and nothing final was found yet."""
        if (seen.finite and not seen.spoilt_weights) or self.finder.final:
            return None
        weights = {name: p.detach().to("cpu", copy=True) for name, p in self.tensors.items()}
        return Snapshot(tuple(batches), random, weights, seen.loss_scale)

    def settle(self, seen: Observation, kept: Snapshot | None, *, applied: bool) -> None:
        """After the update: look for the first failure."""
        if self.finder.look(seen, applied=applied):
            self.snapshot = kept

    def end(self, last_step: int) -> bool:
        """After the last step: take the hooks off. Returns whether the trained weights are finite."""
        self.remove()
        spoilt = non_finite_tensors(self.tensors)
        if self.finder.look_at_weights(last_step, spoilt):
            self.snapshot = None
        return not spoilt

    def remove(self) -> None:
        """Take the hooks off."""
        self.ranges.remove()
        self.consumed.remove()


def _outside(step: int, micro_batch: int, batch: Batch, bad: torch.Tensor, vocabulary: int) -> FirstFailure:
    row, position = (int(i) for i in bad.nonzero()[0])
    identity = int(batch.input_ids[row, position])
    return FirstFailure(
        kind="bad_batch",
        step=step,
        micro_batch=micro_batch,
        phase="forward",
        module="model.embed_tokens",
        tensor="input_ids",
        device="cpu",
        value=None,
        last_finite_abs_max=None,
        dtype_max=None,
        loss=None,
        evidence=f"micro-batch {micro_batch} of step {step} holds token id {identity} (row {row}, position "
        f"{position}), outside of the model's vocabulary of {vocabulary}: tokenizer and model do not match",
    )
