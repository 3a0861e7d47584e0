"""Packed checkpoints for models that have none: made once, kept in the cache, read like published ones.

Runs in a process of its own before the run that needs it, so that neither its time nor its memory is
counted as loading. A folder is complete when its manifest exists; it is built beside its place and
renamed, so two commands making the same one do no harm.
"""

from __future__ import annotations

import json
import shutil
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from bench.ask.packing import MANIFEST, Manifest
from bench.load.contract import PackedBackend
from bench.load.model import linear_shapes
from bench.load.weights import Weights

SHARD_BYTES = 2 * 10**9
TOKENIZER_PATTERNS = (
    "tokenizer*",
    "vocab*",
    "merges.txt",
    "special_tokens_map.json",
    "chat_template*",
    "added_tokens.json",
    "generation_config.json",
)


def pack_checkpoint(
    model: torch.nn.Module,
    weights: Weights,
    backend: PackedBackend,
    architecture: Mapping[str, Any],
    folder: Path,
    source: Path | None,
    progress: Callable[[int, int], None],
) -> None:
    """Round every linear layer to nearest and write the checkpoint, shard by shard."""
    shapes = linear_shapes(model)

    def fill(target: Path) -> str:
        writer = _ShardWriter(target)
        for name, _ in model.named_parameters():
            owner, _, attribute = name.rpartition(".")
            if owner not in shapes or attribute != "weight":
                writer.add(name, weights.tensor(name))
        for done, name in enumerate(shapes):
            progress(done, len(shapes))
            for suffix, tensor in backend.pack(weights.tensor(f"{name}.weight")).items():
                writer.add(f"{name}.{suffix}", tensor)
        writer.finish()
        config = {**architecture, "quantization_config": backend.config()}
        (target / "config.json").write_text(json.dumps(config, indent=2), encoding="utf-8")
        _copy_tokenizer(source, target)
        return "rtn"

    _build(folder, fill, samples=0)


def calibrate_checkpoint(backend: PackedBackend, source: Path, folder: Path, texts: Sequence[str]) -> None:
    """Let the backend's own library quantize the checkpoint in ``source`` on ``texts``."""

    def fill(target: Path) -> str:
        method = backend.calibrate(source, target, texts)
        _copy_tokenizer(source, target)
        return method

    _build(folder, fill, samples=len(texts))


def _build(folder: Path, fill: Callable[[Path], str], samples: int) -> None:
    folder.parent.mkdir(parents=True, exist_ok=True)
    began = time.perf_counter()
    target = Path(tempfile.mkdtemp(dir=folder.parent, prefix=f".{folder.name}."))
    try:
        method = fill(target)
        manifest = Manifest(calibration=method, samples=samples, seconds=time.perf_counter() - began)
        (target / MANIFEST).write_text(manifest.model_dump_json(indent=1), encoding="utf-8")
        target.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        target.rename(folder)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def _copy_tokenizer(source: Path | None, target: Path) -> None:
    for pattern in TOKENIZER_PATTERNS if source else ():
        for file in _given(source).glob(pattern):
            shutil.copy(file, target / file.name)


def _given(path: Path | None) -> Path:
    assert path is not None
    return path


class _ShardWriter:
    """Collects tensors and writes a shard whenever enough have gathered."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._tensors: dict[str, torch.Tensor] = {}
        self._bytes = 0
        self._map: dict[str, str] = {}

    def add(self, name: str, tensor: torch.Tensor) -> None:
        self._tensors[name] = tensor.contiguous()
        self._bytes += tensor.nbytes
        if self._bytes >= SHARD_BYTES:
            self._flush()

    def finish(self) -> None:
        if self._tensors:
            self._flush()
        index = {"metadata": {}, "weight_map": self._map}
        (self._folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")

    def _flush(self) -> None:
        name = f"model-{len(set(self._map.values())) + 1:05d}.safetensors"
        save_file(self._tensors, self._folder / name, metadata={"format": "pt"})
        self._map |= dict.fromkeys(self._tensors, name)
        self._tensors, self._bytes = {}, 0
