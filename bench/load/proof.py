"""Proof, not hope: that layers are really quantized, the base really frozen, gradients really arrive.

Nothing here believes the adapter. Every tensor that a layer holds is found by walking its attributes, so
a dense copy kept in some corner counts as what it is.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from logging import Logger
from types import CellType, ModuleType
from typing import Any

import torch
from torch import nn

from bench.load.contract import Backend, Shape
from bench.load.model import BuiltModel

TOLERANCE = 0.01
"""Relative difference allowed between counted and computed bits: the arithmetic is exact, so this only
covers what a kernel pads."""
BIAS_NAMES = frozenset({"bias"})
WALK_DEPTH = 12
OPAQUE = (type(None), type, ModuleType, str, bytes, int, float, complex, torch.dtype, torch.device, Logger)
"""What holds no tensors of a layer, or leads out of it."""


@dataclass
class StorageCount:
    """Bytes of the storages a set of layers holds. A storage shared by several tensors counts once."""

    codes: int = 0
    metadata: int = 0
    biases: int = 0
    seen: set[tuple[str, int]] = field(default_factory=set)

    def add(self, layer: nn.Module, codes: tuple[str, ...]) -> None:
        """Count what ``layer`` holds; ``codes``: names of the attributes that hold quantized codes."""
        for path, tensor in tensors_of(layer):
            storage = tensor.untyped_storage()
            identity = (str(tensor.device), storage.data_ptr())
            if identity in self.seen or tensor.device.type == "meta":
                continue
            self.seen.add(identity)
            if len(path) == 1 and path[0] in BIAS_NAMES:
                self.biases += storage.nbytes()
            elif len(path) == 1 and path[0] in codes:
                self.codes += storage.nbytes()
            else:
                self.metadata += storage.nbytes()


def layer_bits(layer: nn.Module, shape: Shape, codes: tuple[str, ...]) -> float:
    """Storage bits per weight of one layer, biases excluded, counted from its tensors."""
    count = StorageCount()
    count.add(layer, codes)
    return (count.codes + count.metadata) * 8 / shape.weights


def quantization_breaches(built: BuiltModel, shapes: Mapping[str, Shape], backend: Backend) -> list[str]:
    """Layers whose counted bits differ from the adapter's arithmetic, one sentence each."""
    breaches = []
    for name, layer in built.quantized():
        counted = layer_bits(layer, shapes[name], backend.codes)
        expected = backend.expected_bits(shapes[name])
        if abs(counted - expected) > TOLERANCE * expected:
            breaches.append(
                f"{name} ({type(layer).__name__}) holds {counted:.3f} bits per weight, "
                f"the arithmetic says {expected:.3f}"
            )
    return breaches


def frozen_breaches(model: nn.Module, trainable: Mapping[str, nn.Parameter]) -> list[str]:
    """Base parameters that would be trained, and adapter tensors that would not."""
    wanted = {id(parameter) for parameter in trainable.values()}
    loose = [
        f"base parameter {name} is not frozen"
        for name, parameter in model.named_parameters()
        if parameter.requires_grad and id(parameter) not in wanted
    ]
    stuck = [
        f"adapter tensor {name} is not trainable"
        for name, parameter in trainable.items()
        if not parameter.requires_grad
    ]
    return loose + stuck


def gradient_breaches(trainable: Mapping[str, nn.Parameter]) -> list[str]:
    """Adapter tensors that the first backward did not reach.

    B must have a finite gradient that is not zero everywhere; A's is exactly zero while B is zero, so A
    must only have one. A non-finite gradient is a result and not a breach: the run goes on and says so.
    """
    breaches = []
    for name, parameter in trainable.items():
        if parameter.grad is None:
            breaches.append(f"no gradient reached {name}")
        elif name.endswith("lora_B") and not bool(parameter.grad.detach().any()):
            breaches.append(f"the gradient of {name} is zero everywhere")
    return breaches


def tensors_of(layer: nn.Module) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    """Every tensor that a layer holds, in parameters, buffers, attributes, dicts and plain objects."""
    yield from _walk(vars(layer), (), {id(layer)}, 0)


def held(tensor: torch.Tensor) -> torch.Tensor:
    """What this process holds of a tensor: its part, where the tensor is cut over several."""
    local = getattr(tensor, "to_local", None)
    return tensor if local is None else local().detach()


def _walk(
    value: Any, path: tuple[str, ...], seen: set[int], depth: int
) -> Iterator[tuple[tuple[str, ...], torch.Tensor]]:
    if depth > WALK_DEPTH or id(value) in seen:
        return
    seen.add(id(value))
    if isinstance(value, torch.Tensor):
        yield path or ("tensor",), held(value)
        # Params4bit and Int8Params carry their scales as attributes of the parameter itself.
        yield from _walk(getattr(value, "__dict__", {}), path, seen, depth + 1)
    elif isinstance(value, dict):
        for key, inner in value.items():
            step = () if key in ("_parameters", "_buffers", "_modules") else (str(key),)
            yield from _walk(inner, (*path, *step), seen, depth + 1)
    elif isinstance(value, list | tuple | set | frozenset):
        for inner in value:
            yield from _walk(inner, path, seen, depth + 1)
    elif not isinstance(value, OPAQUE) and not type(value).__module__.startswith("torch.distributed"):
        for below, inner in _held_by(value):
            yield from _walk(inner, (*path, *below), seen, depth + 1)


def _held_by(value: Any) -> Iterator[tuple[tuple[str, ...], Any]]:
    """What an object holds: attributes, slots, a closure's variables, a bound method's object."""
    yield (), getattr(value, "__dict__", {})
    yield (), getattr(value, "__self__", None)
    for cell in getattr(value, "__closure__", None) or ():
        yield (), _content(cell)
    for kind in type(value).__mro__:
        for slot in _slots(kind):
            yield (slot,), getattr(value, slot, None)


def _content(cell: CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # a cell that nothing was put into yet
        return None


def _slots(kind: type) -> tuple[str, ...]:
    slots = vars(kind).get("__slots__", ())
    names = (slots,) if isinstance(slots, str) else tuple(slots)
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))
