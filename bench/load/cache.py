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

import fcntl
import hashlib
import shutil
import sys
import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file

from bench.ask.plan import RunRequest
from bench.ask.quantized_cache import MANIFEST, QuantizedKey, QuantizedManifest, StoredFile
from bench.ask.stress import Pair
from bench.errors import BrokenFile
from bench.load.contract import Backend
from bench.load.weights import CheckpointWeights

SHARD_BYTES = 10**9
LOCK = "lock"
"""Held by the process that writes a folder, as long as it lives."""


class BrokenCache(Exception):
    """What is in the cache is not what was written there."""


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
            _remove(self._key.folder)
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


class StoredModel:
    """A complete entry, whose tensors are read one by one."""

    def __init__(self, key: QuantizedKey, layers: Collection[str]) -> None:
        """Raises BrokenCache for an entry that is not complete, or not of these layers. What the tensors hold
        is looked at when they are read."""
        folder = key.folder
        try:
            text = (folder / MANIFEST).read_text(encoding="utf-8")
            self.manifest = QuantizedManifest.model_validate_json(text)
            differing = [n for n, file in self.manifest.files.items() if StoredFile.of(folder / n) != file]
            self._weights = CheckpointWeights(folder)
        except OSError as error:
            raise BrokenCache(f"its {MANIFEST} cannot be read: {error}") from None
        except ValidationError:
            raise BrokenCache(f"its {MANIFEST} is no manifest of this format") from None
        except BrokenFile as error:
            raise BrokenCache(str(error)) from None
        if differing:
            raise BrokenCache(f"{differing[0]} is not the file that was written")
        if self.manifest.key != key:
            raise BrokenCache("it is of another model")
        self._names: dict[str, list[str]] = {}
        for name in self.manifest.checksums:
            layer, _, part = name.rpartition(".")
            self._names.setdefault(layer, []).append(part)
        absent = [name for name in self.manifest.checksums if name not in self._weights]
        absent += sorted(set(layers) - set(self._names))
        if absent:
            raise BrokenCache(f"it holds no '{absent[0]}'")

    def tensors(self, layer: str, device: torch.device) -> dict[str, torch.Tensor]:
        """A layer's tensors on ``device``. Raises BrokenCache where one is not what was written."""
        found = {}
        for part in self._names[layer]:
            name = f"{layer}.{part}"
            try:
                tensor = self._weights.tensor(name, device)
            except (OSError, SafetensorError) as error:
                raise BrokenCache(f"'{name}' cannot be read: {error}") from None
            if checksum(tensor) != self.manifest.checksums[name]:
                raise BrokenCache(f"'{name}' does not hold what was written")
            found[part] = tensor
        return found


class ModelWriter:
    """Writes an entry beside its place, and puts it there when it is complete."""

    def __init__(self, key: QuantizedKey, layers: Collection[str]) -> None:
        """Raises OSError where nothing can be written."""
        self._key = key
        self._layers = layers
        folder = key.folder
        folder.parent.mkdir(parents=True, exist_ok=True)
        _sweep(folder.parent)
        self._target = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        self._lock = (self._target / LOCK).open("w")
        fcntl.flock(self._lock, fcntl.LOCK_EX)
        self._gathered: dict[str, torch.Tensor] = {}
        self._gathered_bytes = 0
        self._checksums: dict[str, int] = {}
        self._files: dict[str, StoredFile] = {}

    def add(self, layer: str, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take a layer's tensors. Raises OSError or SafetensorError where a shard cannot be written."""
        for part, given in tensors.items():
            tensor = given.detach().as_subclass(torch.Tensor)
            self._checksums[f"{layer}.{part}"] = checksum(tensor)
            if self._gathered and self._gathered_bytes + tensor.nbytes > SHARD_BYTES:
                self._flush()
            self._gathered[f"{layer}.{part}"] = tensor.cpu().contiguous()
            self._gathered_bytes += tensor.nbytes

    def finish(self, quantize_seconds: float) -> int:
        """Complete the entry and return its bytes. One that another command has completed meanwhile stays.

        Raises OSError or SafetensorError where it cannot be written."""
        self._flush()
        manifest = QuantizedManifest(
            key=self._key,
            layers=len(self._layers),
            quantize_seconds=quantize_seconds,
            files=self._files,
            checksums=self._checksums,
        )
        (self._target / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        self._target.chmod(0o755)
        (self._target / LOCK).unlink()
        try:
            self._target.rename(self._key.folder)
        except OSError:
            if not (self._key.folder / MANIFEST).is_file():
                raise
        self.remove()
        return manifest.bytes

    def remove(self) -> None:
        """Leave nothing of what is not in its place."""
        self._lock.close()
        shutil.rmtree(self._target, ignore_errors=True)

    def _flush(self) -> None:
        if not self._gathered:
            return
        file = self._target / f"quantized-{len(self._files) + 1:05d}.safetensors"
        save_file(self._gathered, file, metadata={"format": "pt"})
        file.chmod(0o644)
        self._files[file.name] = StoredFile.of(file)
        self._gathered, self._gathered_bytes = {}, 0


def checksum(tensor: torch.Tensor) -> int:
    """Sum of a tensor's bytes taken as 64-bit integers, modulo 2^64, computed where the tensor is.

    One value that has changed always changes it. It guards against disks, not against people: it costs one
    pass over the memory, where a cryptographic digest of 40 GB would take longer than reading them."""
    data = tensor.detach().contiguous().view(-1).view(torch.uint8)
    if data.storage_offset() % 8:
        data = data.clone()
    whole = data.numel() // 8 * 8
    total = int(data[:whole].view(torch.int64).sum()) + int(data[whole:].sum())
    return total % 2**64


def _sweep(entries: Path) -> None:
    """Remove what interrupted commands have left: what no living process writes to."""
    for left in entries.glob(".*"):
        try:
            with (left / LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        except OSError:  # it is being written, or has just gone
            continue


def _remove(folder: Path) -> None:
    """Take an entry out of its place first, so that nobody finds half of it."""
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        folder.rename(aside / "broken")
    except FileNotFoundError:  # another command was quicker
        pass
    finally:
        shutil.rmtree(aside, ignore_errors=True)
