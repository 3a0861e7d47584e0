"""Steps of one model at several depths, in turns, in one worker: ``bench.run.worker ORDER FD --depths``.

Extrapolating from 2 and 4 layers to 80 multiplies the noise of a step by dozens, and a machine drifts by more
than that between two processes. So the deepest slice is built once, and round after round one optimizer step
is run at each depth, by leaving the decoder's last layers out. Each depth has adapters, an optimizer and a
reader of its own: step after step it computes to the bit what a model of that many layers computes alone
(tests/test_depths.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from bench.run.stages import Run

if TYPE_CHECKING:
    import torch
    from torch import nn

    from bench.run.building import Builder
    from bench.run.training import Trainer

LAYERS = "model.layers."
"""How the names of everything in a decoder layer begin."""


class DepthRun(Run):
    """The stages of a worker that times depths instead of measuring one run."""

    def time(self) -> None:
        """Build the deepest model and tell every step of every round."""
        turns = self.order.turns
        assert turns is not None
        self.channel.stage("load")
        with self.watched:
            self._import_libraries()
        from bench.probe.collector import old_objects_left_alone
        from bench.probe.memory import release_unused
        from bench.run.training import one_step

        builder = self._builder()
        whole = builder.trainer_of(self.request)
        release_unused(whole.devices)
        shallow = {depth: ShallowTrainer.of(whole, depth, builder) for depth in turns.depths}
        self.channel.stage("train")
        total = turns.warmup_rounds + turns.rounds
        with old_objects_left_alone():
            for place in range(total):
                for depth in turns.of_round(place):
                    with shallow[depth].alone() as trainer:
                        step, _ = one_step(trainer, place)
                    self.channel.send("depth_step", depth=depth, round=place, step=step)
                self.channel.send("progress", done=place + 1, total=total)


@dataclass(frozen=True)
class ShallowTrainer:
    """The training of a model's first layers, as if it had no others."""

    layers: int
    trainer: Trainer
    """Its adapters' tensors are those of the first layers, its model the whole one."""
    values: Mapping[str, torch.Tensor]
    """Adapters as this training left them; the other depths train the same tensors from their own."""

    @classmethod
    def of(cls, whole: Trainer, layers: int, builder: Builder) -> ShallowTrainer:
        """Its own optimizer, scaler and work from the beginning."""
        from bench.run.training import make_trainer

        kept = {name: p for name, p in whole.adapters.tensors.items() if _layer_of(name) < layers}
        trainer = make_trainer(
            replace(whole.adapters, tensors=kept),
            whole.request,
            builder.reader(),
            whole.devices,
            str(whole.dtype).removeprefix("torch."),
        )
        return cls(layers, trainer, {name: p.detach().clone() for name, p in kept.items()})

    @contextmanager
    def alone(self) -> Iterator[Trainer]:
        """The trainer, while the model is cut to its layers and the adapters hold its values."""
        adapters = self.trainer.adapters
        for name, parameter in adapters.tensors.items():
            parameter.detach().copy_(self.values[name])
        with cut(adapters.model, self.layers):
            yield self.trainer
        for name, parameter in adapters.tensors.items():
            self.values[name].copy_(parameter.detach())


@contextmanager
def cut(model: nn.Module, layers: int) -> Iterator[None]:
    """Leave out all but the first ``layers`` decoder layers of a model with adapters, for a while.

    Raises ValueError where it does not have that many.
    """
    from bench.probe.ranges import WRAPPER

    decoder = model.get_submodule(WRAPPER + "model")
    whole = decoder.get_submodule("layers")
    have = len(list(whole.children()))
    if not 1 <= layers <= have:
        raise ValueError(f"a model of {have} decoder layers cannot be cut to {layers}")
    decoder.layers = whole[:layers]  # type: ignore[index]
    try:
        yield
    finally:
        decoder.layers = whole


def _layer_of(name: str) -> int:
    """Place of the decoder layer that a tensor belongs to."""
    assert name.startswith(LAYERS), name
    return int(name.removeprefix(LAYERS).partition(".")[0])
