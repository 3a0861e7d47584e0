"""One quantized model on disk: written shard by shard beside its place, and read tensor by tensor.

    writer = ModelWriter(key, layers)
    writer.add(layer, tensors)                # of every layer
    writer.finish(quantize_seconds)           # now it is there
    StoredModel(key, layers).tensors(layer, device)

``bench.load.cache`` decides when. Nothing incomplete or changed is ever taken for what was written.
"""

from __future__ import annotations

import fcntl
import shutil
import tempfile
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import IO

import torch
from pydantic import ValidationError
from safetensors import SafetensorError
from safetensors.torch import save_file

from bench.ask.quantized_cache import MANIFEST, QuantizedKey, QuantizedManifest, StoredFile
from bench.errors import BrokenFile
from bench.load.weights import CheckpointWeights

SHARD_BYTES = 10**9
LOCK = "lock"
"""Held by the process that writes a folder, as long as it lives."""


class BrokenCache(Exception):
    """What is in the cache is not what was written there."""


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
        self._target, self._lock = _locked(folder)
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


def _locked(folder: Path) -> tuple[Path, IO[str]]:
    """A new folder beside ``folder``, and its lock, held by this process."""
    while True:
        target = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
        lock = (target / LOCK).open("w")
        fcntl.flock(lock, fcntl.LOCK_EX)
        # Between these two lines another command may have taken it for a rest and swept it.
        if (target / LOCK).exists():
            return target, lock
        lock.close()


def _sweep(entries: Path) -> None:
    """Remove what interrupted commands have left: what no living process writes to."""
    for left in entries.glob(".*"):
        try:
            with (left / LOCK).open() as lock:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(left, ignore_errors=True)
        except OSError:  # it is being written, or has just gone
            continue


def remove_entry(folder: Path) -> None:
    """Take an entry out of its place first, so that nobody finds half of it."""
    aside = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        folder.rename(aside / "broken")
    except FileNotFoundError:  # another command was quicker
        pass
    finally:
        shutil.rmtree(aside, ignore_errors=True)
