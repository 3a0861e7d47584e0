"""Which packed checkpoint a GPTQ or AWQ run reads: a published one, or one that the project makes.

Torch-free: the parent decides, and starts the process that makes one where it is missing.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from pydantic import ValidationError

from bench.ask.experiment import Frozen
from bench.ask.models import ResolvedModel, cache_folder
from bench.ask.plan import RunRequest

MANIFEST = "qlora_bench.json"
Calibration = Literal["auto", "rtn", "calibrated"]
CALIBRATIONS = get_args(Calibration)


class Manifest(Frozen):
    """How a packed checkpoint of ours was made."""

    calibration: str
    samples: int
    seconds: float


@dataclass(frozen=True)
class PackedCheckpoint:
    """The checkpoint of one run."""

    folder: Path
    calibration: str | None
    """How it is made; None: published, read as it is."""
    note: str | None = None

    @property
    def ready(self) -> bool:
        """Whether it can be read now."""
        return self.calibration is None or read_manifest(self.folder) is not None


def packed_checkpoint(
    request: RunRequest, model: ResolvedModel, calibration: Calibration
) -> PackedCheckpoint:
    """Where the packed checkpoint of ``request`` is or will be, and how it is made.

    ``auto``: real weights are calibrated with the backend's method, synthetic ones rounded to nearest
    (there is nothing to calibrate on random values). A model cut with --layers is rounded as well, since
    the calibrating library reads whole checkpoints.
    """
    if model.folder is not None and "quantization_config" in request.model.architecture:
        return PackedCheckpoint(model.folder, None)
    method, note = calibration, None
    if request.model.weights == "synthetic":
        method = "rtn"
    elif request.model.layers is not None and method != "rtn":
        method, note = "rtn", "rounded to nearest instead of calibrated: the model is cut with --layers"
    elif method == "auto":
        method = "calibrated"
    body = {
        "fingerprint": request.model.fingerprint,
        "architecture": dict(request.model.architecture),
        "backend": request.backend,
        "options": {k: v for k, v in request.options.items() if k != "kernel"},
        "method": method,
        "version": request.versions.get("gptqmodel") if method != "rtn" else None,
        "layout": 1,
    }
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
    folder = cache_folder() / "packed" / f"{request.backend}-{method}-{digest}"
    return PackedCheckpoint(folder, method, note)


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished checkpoint, None where there is none."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None
