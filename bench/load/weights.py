"""Where a model's tensors come from: a checkpoint on disk, or a generator in the model's exact shape.

Both give one tensor at a time by its checkpoint name, so the host never holds more than the model placed
so far and one tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Protocol

import torch
from safetensors import safe_open

from bench.ask.shards import weight_files
from bench.errors import BrokenFile
from bench.load.contract import PackedBackend, Shape

CPU = torch.device("cpu")
SYNTHETIC_SEED = 0
"""Fixed: like real weights, synthetic ones are the same in every run and repeat."""


class Weights(Protocol):
    """A source of tensors by name."""

    def __contains__(self, name: str) -> bool:
        """Whether a tensor of this name exists."""

    def tensor(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """The tensor, on ``device``, in the checkpoint's dtype, owned by the caller."""


class CheckpointWeights:
    """Tensors of a folder of safetensors files, sharded or not."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._files = weight_files(folder)

    def __contains__(self, name: str) -> bool:
        return name in self._files

    def tensor(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """Read one tensor. The file is opened for this read only: a mapping kept open would let its pages
        count as this process's memory."""
        if name not in self._files:
            raise BrokenFile(f"'{self.folder}' holds no tensor '{name}'")
        with safe_open(self._files[name], framework="pt", device="cpu") as file:
            return file.get_tensor(name).to(device, copy=True)  # type: ignore[no-any-return]


class SyntheticWeights:
    """Random tensors in a model's exact shape: the same values wherever and in whatever order they are asked
    for.

    A CPU and a GPU have different generators: values are drawn on a device of the kind that trains, so that
    whoever asks for them (a loader, what packs a checkpoint on the CPU, what compares weights) gets the same
    model.

    Linear, embedding and bias values are normal with ``initializer_range``, in bfloat16 as checkpoints
    are; norm weights are one. Never zeros: values change a GPU's power draw and so its speed.
    """

    def __init__(self, shapes: Mapping[str, torch.Size], deviation: float, kind: str = "cpu") -> None:
        """``kind``: of the device that trains, as torch names it: cpu or cuda."""
        self._shapes = shapes
        self._deviation = deviation
        self._kind = kind

    def __contains__(self, name: str) -> bool:
        return name in self._shapes

    def tensor(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """One tensor on ``device``, drawn there where that is of the kind that trains."""
        there = device if device.type == self._kind else torch.device(self._kind)
        return self._drawn(name, there).to(device)

    def _drawn(self, name: str, device: torch.device) -> torch.Tensor:
        """From a generator seeded by the name."""
        shape = self._shapes[name]
        if len(shape) == 1 and name.endswith("norm.weight"):
            return torch.ones(shape, dtype=torch.bfloat16, device=device)
        generator = torch.Generator(device).manual_seed(seed_of(name, SYNTHETIC_SEED))
        drawn = torch.empty(shape, dtype=torch.bfloat16, device=device)
        # In pieces, so that the float32 draw of a 2.5 GB embedding does not triple the peak.
        flat = drawn.view(-1)
        piece = 2**24
        for start in range(0, math.prod(shape), piece):
            part = flat[start : start + piece]
            part.copy_(torch.randn(part.shape, generator=generator, device=device) * self._deviation)
        return drawn


class RandomCodes:
    """Synthetic weights whose linear layers are packed already: codes and scales drawn at random."""

    def __init__(
        self, plain: SyntheticWeights, backend: PackedBackend, layers: Mapping[str, Shape], deviation: float
    ) -> None:
        """``layers``: the shapes of the linear layers by name; everything else comes from ``plain``."""
        self._plain = plain
        self._backend = backend
        self._layers = layers
        self._deviation = deviation
        self._drawn: tuple[str, dict[str, torch.Tensor]] = ("", {})

    def __contains__(self, name: str) -> bool:
        layer, _, kind = name.rpartition(".")
        return (
            kind in self._backend.packed_names
            if layer in self._layers and kind != "bias"
            else name in self._plain
        )

    def tensor(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """One packed tensor, or one of the rest. A layer is drawn whole, once for all its tensors, which are
        asked for one after another."""
        layer, _, kind = name.rpartition(".")
        if layer not in self._layers or kind == "bias":
            return self._plain.tensor(name, device)
        if self._drawn[0] != layer:
            generator = torch.Generator(device).manual_seed(seed_of(layer, SYNTHETIC_SEED))
            drawn = self._backend.draw(self._layers[layer], self._deviation, generator, device)
            self._drawn = (layer, drawn)
        return self._drawn[1].pop(kind)


def seed_of(name: str, seed: int) -> int:
    """A 63-bit seed that depends on a parameter's name and nothing else drawn before it."""
    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:8], "little") >> 1
