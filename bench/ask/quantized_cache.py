"""Which quantized model a run with ``--cache`` reads or keeps, and what that says of itself.

    key = QuantizedKey(...)      # everything that the stored codes depend on
    key.folder                   # quantized/<backend>-<digest> in the project's cache

Torch-free. ``bench.load.cache`` writes and reads what is in the folder.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from bench.ask.experiment import Dtype, Frozen
from bench.ask.models import cache_folder
from bench.ask.shards import safetensors_header

FORMAT: Final = 1
"""Raised when what is written changes, so that what an older version wrote is not read."""
MANIFEST = "manifest.json"


class QuantizedKey(Frozen):
    """Everything that a quantized model's stored tensors depend on."""

    format: Literal[1] = FORMAT
    fingerprint: str
    """Of the weights, as `ModelRequest` has it."""
    weights: Literal["real", "synthetic"]
    architecture: Mapping[str, Any]
    """Cut to the layers that are kept."""
    backend: str
    options: Mapping[str, Any]
    """Complete, and as fitted to the model."""
    adapter: str
    """SHA-256 over the adapter's own source."""
    stored_form: str
    versions: Mapping[str, str | None]
    """Of this project, of torch and of the libraries that the backend requires."""
    dtype: Dtype
    """The compute dtype that the backend really uses."""
    device: Literal["cpu", "cuda"]
    cpu_threads: int | None
    """On a CPU, of the process: sums over a whole tensor are split among them, and rounded accordingly."""
    sharded: bool
    """Whether the layers are built to be cut over several devices (``--placement fsdp``)."""
    stress: tuple[tuple[str, str, float], ...]
    """Pairs of layers that ``--stress`` rescales: multiplied, divided, factor."""

    @property
    def folder(self) -> Path:
        """Where this model is, or will be, in the project's cache."""
        body = json.dumps(self.model_dump(mode="json"), sort_keys=True)
        digest = hashlib.sha256(body.encode()).hexdigest()[:16]
        return cache_folder() / "quantized" / f"{self.backend}-{digest}"


class StoredFile(Frozen):
    """One safetensors file of a stored model, by what can be seen of it without reading its tensors."""

    bytes: int
    header: str
    """SHA-256 over its header: every name, dtype, shape and offset."""

    @classmethod
    def of(cls, file: Path) -> StoredFile:
        """As the file is now. Raises BrokenFile where it is missing or truncated."""
        header = json.dumps(safetensors_header(file), sort_keys=True)
        return cls(bytes=file.stat().st_size, header=hashlib.sha256(header.encode()).hexdigest())


class QuantizedManifest(Frozen):
    """How a stored model was made, and what belongs to it. Written last: without it nothing is complete."""

    key: QuantizedKey
    layers: int
    quantize_seconds: float
    """The load that quantized it: reading or drawing, quantizing and placing all weights."""
    files: Mapping[str, StoredFile]
    checksums: Mapping[str, int]
    """Tensor name -> sum of its bytes taken as 64-bit integers, modulo 2^64."""

    @property
    def bytes(self) -> int:
        """Of all files but this one."""
        return sum(file.bytes for file in self.files.values())
