"""Frozen weights that are not finite: scales, tables, norms and embeddings as they were loaded."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import nn

from bench.load.model import BuiltModel
from bench.load.proof import held, tensors_of

CHUNK = 2**24
"""Values looked at in one go: ``isfinite`` makes a temporary of a byte each."""


def non_finite_weights(built: BuiltModel) -> dict[str, str]:
    """Module -> which of its tensors hold values that are not finite, and how many, in words.

    Looks into every floating tensor of the quantized layers (scales, second-level scales, tables, biases)
    and at every other parameter of the model. Integer codes are always finite.
    """
    found: dict[str, list[str]] = {}
    for module, name, tensor in _floating(built):
        count = _count(tensor)
        if count:
            found.setdefault(module, []).append(f"{name}: {count} of {tensor.numel()} values")
    return {module: "; ".join(texts) for module, texts in found.items()}


def _floating(built: BuiltModel) -> Iterator[tuple[str, str, torch.Tensor]]:
    """Module, tensor name and tensor; a module's storages once, those of a tied head under both names."""
    seen: set[tuple[str, int]] = set()
    quantized = tuple(f"{name}." for name in built.layers)
    for name, layer in built.quantized():
        # Once adapters are attached, PEFT's layer stands here and keeps the frozen one inside.
        for path, tensor in tensors_of(getattr(layer, "base_layer", layer)):
            yield from _once(name, ".".join(path), tensor, seen)
    for name, parameter in built.model.named_parameters(remove_duplicate=False):
        if not name.startswith(quantized):
            yield from _once(*name.rpartition(".")[::2], held(parameter), seen)


def _once(
    module: str, name: str, tensor: torch.Tensor, seen: set[tuple[str, int]]
) -> Iterator[tuple[str, str, torch.Tensor]]:
    place = (module, tensor.data_ptr())
    if tensor.is_floating_point() and tensor.device.type != "meta" and place not in seen:
        seen.add(place)
        yield module, name, tensor.detach()


def _count(tensor: torch.Tensor) -> int:
    flat = tensor.reshape(-1)
    if isinstance(tensor, nn.Parameter):
        flat = flat.detach()
    return sum(
        int((~torch.isfinite(flat[start : start + CHUNK])).sum()) for start in range(0, flat.numel(), CHUNK)
    )
