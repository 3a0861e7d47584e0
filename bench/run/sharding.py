"""FSDP for a frozen, quantized model: each rank keeps its part of every weight, and layers are gathered in
turn.

    builder = ShardingBuilder(order, channel, watched)
    backend, built, shapes = builder.build(request)     # cut while it is built: no rank holds all of it
    builder.cut.damaged()                               # sentences, if what is gathered is not what was cut

torch's ``fully_shard`` (FSDP2) cuts along the first axis whatever dtype a parameter has and moves it as
bytes, so packed codes stay as their library packs them: cast to a floating-point ``quant_storage``, as FSDP1
needs them, some look like a NaN and come back as another one (bitsandbytes-foundation/bitsandbytes#1945).
What a layer holds besides parameters (scales in a QuantState, buffers, tables) is whole on every rank.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from bench.ask.plan import RunRequest
from bench.load.layout import Layout
from bench.load.model import HASH_CHUNK_BYTES, BuiltModel, linear_shapes
from bench.load.proof import layer_bits, quantization_breaches
from bench.probe.clock import now
from bench.run.building import Builder, places_of

if TYPE_CHECKING:
    from bench.load.cache import QuantizedCache
    from bench.load.contract import Backend, Shape
    from bench.load.weights import Weights

DECODER_LAYER = re.compile(r"(?:.*\.)?layers\.\d+(?=\.)")


class Cut:
    """A model that is cut layer by layer, and what was known of it before."""

    def __init__(self, model: nn.Module, backend: Backend, mesh: DeviceMesh, device: torch.device) -> None:
        self.bits: dict[str, float] = {}
        """Linear layer -> storage bits per weight, counted while it was whole."""
        self.breaches: list[str] = []
        """Layers whose bits were not those of the arithmetic."""
        self.seconds_apart = 0.0
        """Spent on digests and counts before cutting: no part of the load."""
        self._model, self._backend, self._mesh = model, backend, mesh
        self._devices = (device,)
        self._shapes = linear_shapes(model)
        self._waiting = _by_decoder_layer(list(self._shapes))
        self._whole: dict[str, dict[str, str]] = {}

    def reached(self, done: int) -> None:
        """The first ``done`` linear layers are quantized: cut the decoder layers that are complete."""
        if done == 0 and self._whole:
            # Built anew, by then in another model: the ranks could not agree any more.
            raise RuntimeError("the cache held a broken model, which has been removed: run again")
        complete = set(list(self._shapes)[:done])
        for layer, linears in list(self._waiting.items()):
            if complete.issuperset(linears):
                began = now(self._devices)
                self._count(linears)
                self.seconds_apart += now(self._devices) - began
                self._cut(layer)
                del self._waiting[layer]

    def finish(self) -> None:
        """Cut what is in no decoder layer: the embedding, the last norm and the head."""
        assert not self._waiting
        self._cut("")

    def damaged(self) -> list[str]:
        """Gather every layer, and compare what it would compute with to what was cut. All ranks must ask."""
        found = []
        for layer, digests in self._whole.items():
            module: Any = self._model.get_submodule(layer)
            module.unshard()
            now = _digests(module)
            module.reshard()
            found += [
                f"{layer}.{name} is not the same when gathered again as before it was cut"
                for name, digest in digests.items()
                if now.get(name) != digest
            ]
        return found

    def _count(self, linears: list[str]) -> None:
        codes = self._backend.codes
        for name in linears:
            self.bits[name] = layer_bits(self._model.get_submodule(name), self._shapes[name], codes)
        part = BuiltModel(self._model, tuple(linears), Layout.on(torch.device("cpu")))
        self.breaches += quantization_breaches(part, self._shapes, self._backend)

    def _cut(self, layer: str) -> None:
        module = self._model.get_submodule(layer)
        # What was queued before belongs to the load, and a digest waits for it.
        began = now(self._devices)
        self._whole[layer] = _digests(module)
        self.seconds_apart += now(self._devices) - began
        attributes = {name: dict(vars(p)) for name, p in module.named_parameters()}
        # The root too is gathered again for its backward: head and embedding of a large model are gigabytes.
        fully_shard(module, mesh=self._mesh, reshard_after_forward=True)
        for name, parameter in module.named_parameters():
            # A library's own parameter class is gone, and with it what PEFT reads from it.
            vars(parameter).update(attributes[name])


class ShardingBuilder(Builder):
    """Cuts each decoder layer as soon as it is built."""

    cut: Cut
    _mesh: DeviceMesh | None = None

    def open(
        self, request: RunRequest, folder: Path | None, *, stressed: bool = True
    ) -> tuple[Backend, nn.Module, Weights]:
        """As `Builder`."""
        backend, model, weights = super().open(request, folder, stressed=stressed)
        if self._mesh is not None:
            self.cut = Cut(model, backend, self._mesh, places_of(request)[0].device)
        return backend, model, weights

    def build(
        self, request: RunRequest, cache: QuantizedCache | None = None
    ) -> tuple[Backend, BuiltModel, dict[str, Shape]]:
        """As `Builder`, with every parameter cut over the ranks."""
        self._mesh = init_device_mesh(request.device, (request.device_count,))
        built = super().build(request, cache)
        self.cut.finish()
        self.seconds_apart = self.cut.seconds_apart
        return built

    def progress(self, done: int, total: int) -> None:
        """Called before each linear layer and after the last."""
        super().progress(done, total)
        self.cut.reached(done)


def _by_decoder_layer(linears: list[str]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name in linears:
        layer = DECODER_LAYER.match(name)
        if layer is None:
            raise ValueError(f"{name} is in no decoder layer: --placement fsdp cuts a model by those")
        found.setdefault(layer.group(), []).append(name)
    return found


def _own(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Parameters of a module, but those of modules inside that are cut by themselves."""
    inside = tuple(
        f"{name}." for name, part in module.named_modules() if name and isinstance(part, FSDPModule)
    )
    for name, parameter in module.named_parameters():
        if not name.startswith(inside):
            yield name, parameter


def _digests(module: nn.Module) -> dict[str, str]:
    """Frozen parameter, by the name that it has without PEFT -> SHA-256 over its bytes."""
    return {
        name.replace(".base_layer.", "."): _digest(parameter)
        for name, parameter in _own(module)
        if not parameter.requires_grad
    }


def _digest(parameter: nn.Parameter) -> str:
    digest = hashlib.sha256()
    flat = parameter.detach().contiguous().view(-1).view(torch.uint8)
    for start in range(0, flat.numel(), HASH_CHUNK_BYTES):
        # A copy: FSDP could not free a storage that numpy has seen.
        digest.update(flat[start : start + HASH_CHUNK_BYTES].to("cpu", copy=True).numpy().tobytes())
    return digest.hexdigest()
