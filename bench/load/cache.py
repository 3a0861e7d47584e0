"""The quantized layers of a model on disk (``--cache``): kept while one run quantizes, read by the next.

    with QuantizedCache(clock) as cache:
        cache.open(backend, request, layers, pairs)
        built = build_model(model, weights, backend, layout, progress, cache)
        cache.finish(load_seconds)

Whatever is not a quantized layer is read from the original weights as ever, so it is the same with a cache
and without by construction. An entry is written beside its place and renamed: two commands that make the same
one do no harm, and an interrupted one leaves nothing that is taken for complete. What is broken is not used
but made again, with a note for the record.

Memory: written are the layers' own tensors, a shard at a time (on a GPU: a copy of one shard on the host);
they are read one tensor at a time.
"""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError

from bench.ask.plan import RunRequest
from bench.ask.quantized_cache import QuantizedKey
from bench.ask.stress import Pair
from bench.load.contract import Backend
from bench.load.stored_model import BrokenCache, ModelWriter, StoredModel, remove_entry


class QuantizedCache:
    """One run's entry of the cache: read where it is complete, filled while the model is built where not."""

    def __init__(self, clock: Callable[[], float], *, fills: bool = True) -> None:
        """``clock``: seconds, read once the devices have finished what is queued. ``fills``: whether this
        process makes an entry that is not there; of several that load the same model, one does."""
        self._clock = clock
        self._fills = fills
        self._stored: StoredModel | None = None
        self._writer: ModelWriter | None = None
        self._opened = clock()
        self.notes: list[str] = []
        """What the record must say about the cache, one sentence each."""
        self.seconds_apart = 0.0
        """Spent on writing, or on reading what turned out to be broken: no part of the load."""
        self.load: dict[str, float | bool | None] = {"from_cache": False}
        """Facts of the load, for the record; complete after `finish`."""

    def __enter__(self) -> QuantizedCache:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._drop()

    def open(
        self, backend: Backend, request: RunRequest, layers: Collection[str], pairs: Sequence[Pair]
    ) -> None:
        """Find the entry of a fitted backend and its model. ``layers``: names of the quantized layers;
        ``pairs``: those that ``--stress`` rescales."""
        if backend.uncached is not None:
            self.notes.append(f"--cache changes nothing: {backend.uncached}")
            return
        self._opened = self._clock()
        self._key = key_of(backend, request, pairs)
        self._layers = frozenset(layers)
        if not self._key.folder.exists():
            self._begin()
            return
        try:
            self._stored = StoredModel(self._key, self._layers)
        except BrokenCache as error:
            self.discard(error)

    def tensors(self, layer: str, device: torch.device) -> dict[str, torch.Tensor] | None:
        """A layer's stored tensors on ``device``, each in memory of its own; None: it must be quantized.

        Raises BrokenCache where they are not what was written: `discard` the entry then, and build again."""
        return self._stored.tensors(layer, device) if self._stored else None

    def keep(self, layer: str, backend: Backend, built: torch.nn.Module) -> None:
        """Take over a layer that has just been quantized, where the entry is being made."""
        if self._writer is None:
            return
        began = self._clock()
        try:
            self._writer.add(layer, backend.store(built))
        except (OSError, SafetensorError) as error:
            self._give_up(error)
        self.seconds_apart += self._clock() - began

    def discard(self, error: BrokenCache) -> None:
        """Remove a broken entry and begin another; the time that it cost is no part of the load."""
        self._stored = None
        self.notes.append(f"the quantized model in the cache was not used, and is made again: {error}")
        try:
            remove_entry(self._key.folder)
        except OSError as reason:
            self.notes.append(f"the broken one could not be removed: {reason}")
        else:
            self._begin()
        self.seconds_apart += self._clock() - self._opened

    def finish(self, load_seconds: float) -> None:
        """The model is built, which took ``load_seconds`` without `seconds_apart`: complete the entry."""
        if self._stored is not None:
            manifest = self._stored.manifest
            self.load = {
                "from_cache": True,
                "quantize_seconds": manifest.quantize_seconds,
                "reload_seconds": load_seconds,
                "cache_bytes": manifest.bytes,
            }
        elif self._writer is not None:
            began = self._clock()
            try:
                kept = self._writer.finish(load_seconds)
            except (OSError, SafetensorError) as error:
                self._give_up(error)
                return
            self._writer = None
            self.seconds_apart += self._clock() - began
            self.load |= {
                "quantize_seconds": load_seconds,
                "cache_write_seconds": self.seconds_apart,
                "cache_bytes": kept,
            }

    def _begin(self) -> None:
        if not self._fills:
            return
        try:
            self._writer = ModelWriter(self._key, self._layers)
        except OSError as error:
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        self._drop()
        self.notes.append(f"the quantized model could not be kept in the cache: {error}")

    def _drop(self) -> None:
        """Leave nothing of an entry that is not finished."""
        if self._writer is not None:
            self._writer.remove()
        self._writer = None


def key_of(backend: Backend, request: RunRequest, pairs: Sequence[Pair]) -> QuantizedKey:
    """What the layers that ``backend`` builds for ``request`` depend on. It has been fitted to the shapes."""
    libraries = ("qlora-bench", "torch", *backend.requires)
    return QuantizedKey(
        fingerprint=request.model.fingerprint,
        weights=request.model.weights,
        architecture=request.model.architecture,
        backend=request.backend,
        options=backend.options.model_dump(mode="json"),
        adapter=adapter_digest(type(backend)),
        stored_form=backend.stored_form(),
        versions={name: request.versions.get(name) for name in libraries},
        dtype=backend.dtype,
        device=request.device,
        cpu_threads=torch.get_num_threads() if request.device == "cpu" else None,
        sharded=request.placement == "fsdp",
        stress=tuple((pair.scaled, pair.compensated, pair.factor) for pair in pairs),
    )


def adapter_digest(backend: type[Backend]) -> str:
    """SHA-256 over the adapter's file and the private ones beside it: a version number does not change with
    every change of the code."""
    digest = hashlib.sha256()
    for kind in backend.__mro__:
        file = getattr(sys.modules[kind.__module__], "__file__", None)
        if not issubclass(kind, Backend) or kind.__module__ == Backend.__module__ or file is None:
            continue
        for source in sorted({Path(file), *Path(file).parent.glob("_*.py")}):
            digest.update(source.read_bytes())
    return digest.hexdigest()
