"""Faults to plant in a rig (``tests/rig.py``): each makes a `Plant` that spoils one thing at a known place.

What computes something new is a hook that goes through autograd, as a kernel would. Hooks apply wherever
``when`` holds, by step and micro-batch, so that a recomputation and a replay meet the same fault again.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bench.load.model import BuiltModel
from bench.run.workload import IGNORED_LABEL, Batch
from tests.rig import Plant, Rig

When = Callable[[int, int], bool]
"""Given step and micro-batch."""
Change = Callable[[torch.Tensor], torch.Tensor]


def always(step: int, micro_batch: int) -> bool:
    return True


def at(step: int, micro_batch: int = 0) -> When:
    return lambda s, m: (s, m) == (step, micro_batch)


def since(step: int) -> When:
    return lambda s, m: s >= step


def both(first: Plant, second: Plant) -> Plant:
    """Two faults at once; they spoil different kinds of things, or both weights."""

    def weights(built: BuiltModel) -> None:
        for plant in (first, second):
            if plant.weights:
                plant.weights(built)

    return Plant(weights, first.model or second.model, first.batch or second.batch)


# ---- forward --------------------------------------------------------------------------------------


def output(module: str, change: Callable[[torch.Tensor, Rig], torch.Tensor], when: When = always) -> Plant:
    """The module's output goes through ``change``."""

    def plant(rig: Rig) -> None:
        def hook(_: nn.Module, inputs: Any, result: Any) -> Any:
            if not when(rig.step, rig.micro_batch):
                return None
            if isinstance(result, tuple):
                return (change(result[0], rig), *result[1:])
            return change(result, rig)

        rig.module(module).register_forward_hook(hook)

    return Plant(model=plant)


def multiplied(module: str, factor: float, when: When = always) -> Plant:
    """The output is ``factor`` times as large."""
    return output(module, lambda tensor, rig: tensor * factor, when)


def growing(module: str, factor: float) -> Plant:
    """The output grows by ``factor`` from each step to the next."""
    return output(module, lambda tensor, rig: tensor * factor**rig.step)


def holding(module: str, value: float, when: When = always) -> Plant:
    """One number of the output is ``value``, whatever was computed."""

    def change(tensor: torch.Tensor, rig: Rig) -> torch.Tensor:
        changed = tensor.clone()
        changed[0, 3, 5] = value
        return changed

    return output(module, change, when)


def detached(module: str) -> Plant:
    """The output is cut out of the graph."""
    return output(module, lambda tensor, rig: tensor.detach())


# ---- backward -------------------------------------------------------------------------------------


class _Backward(torch.autograd.Function):
    """The identity, whose gradient goes through a function."""

    @staticmethod
    def forward(ctx: Any, tensor: torch.Tensor, change: Change) -> torch.Tensor:
        ctx.change = change
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> tuple[torch.Tensor, None]:
        return ctx.change(gradients[0]), None


def gradient(module: str, change: Change, when: When = always) -> Plant:
    """The forward is untouched; the gradient that comes to the module's output goes through ``change``."""
    return output(module, lambda tensor, rig: _Backward.apply(tensor, change), when)


def gradient_multiplied(module: str, factor: float, when: When = always) -> Plant:
    return gradient(module, lambda value: value * factor, when)


def gradient_overflowing(module: str, when: When = always) -> Plant:
    """Beyond the range of every dtype, by two factors that are within the widest."""
    return gradient(module, lambda value: value * 1e30 * 1e30, when)


def gradient_invalid(module: str, when: When = always) -> Plant:
    """0/0."""
    return gradient(module, lambda value: (value * 0) / (value * 0), when)


# ---- weights --------------------------------------------------------------------------------------


def weight(path: str, value: float, place: int | None = 7) -> Plant:
    """One number of a frozen tensor, by the path of attributes to it, is ``value``; ``place`` None: all."""

    def plant(built: BuiltModel) -> None:
        found: Any = built.model
        for part in path.split("."):
            found = found[part] if isinstance(found, dict) else getattr(found, part)
        spoil(found, value, place)

    return Plant(weights=plant)


@torch.no_grad()
def spoil(tensor: torch.Tensor, value: float, place: int | None = 7) -> None:
    """Write ``value`` into a tensor's own memory."""
    flat = tensor.view(-1)
    if place is None:
        flat.fill_(value)
    else:
        flat[min(place, flat.numel() - 1)] = value


def adapter(name: str, value: float) -> Plant:
    """One number of a trainable tensor is ``value`` before the first step."""
    return Plant(model=lambda rig: spoil(rig.adapters.tensors[name].data, value))


# ---- batches --------------------------------------------------------------------------------------


def masked(when: When = always) -> Plant:
    """Every label is masked."""

    def change(step: int, micro_batch: int, batch: Batch) -> Batch:
        if not when(step, micro_batch):
            return batch
        return replace(batch, labels=torch.full_like(batch.labels, IGNORED_LABEL))

    return Plant(batch=change)


def outside(identity: int, when: When) -> Plant:
    """One id is no word of the model's."""

    def change(step: int, micro_batch: int, batch: Batch) -> Batch:
        if not when(step, micro_batch):
            return batch
        ids = batch.input_ids.clone()
        ids[0, 11] = identity
        return replace(batch, input_ids=ids)

    return Plant(batch=change)


# ---- attention ------------------------------------------------------------------------------------


def row_masked_altogether(layer: int, row: int = 9, when: When = always) -> Plant:
    """One position of a layer's attention may look at none: its softmax is over minus infinity alone."""

    def plant(rig: Rig) -> None:
        def hook(_: nn.Module, inputs: Any, keywords: dict[str, Any]) -> Any:
            if not when(rig.step, rig.micro_batch):
                return None
            hidden = keywords["hidden_states"]
            length = hidden.shape[1]
            mask = torch.full((1, 1, length, length), -math.inf, dtype=hidden.dtype).triu(1)
            mask[..., row, :] = -math.inf
            return inputs, {**keywords, "attention_mask": mask}

        rig.module(f"model.layers.{layer}.self_attn").register_forward_pre_hook(hook, with_kwargs=True)

    return Plant(model=plant)
