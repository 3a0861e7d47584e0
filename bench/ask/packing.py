"""Which packed checkpoint a GPTQ or AWQ run reads: a published one, or one that the project makes.

Torch-free: the parent decides, and starts the process that makes one where it is missing.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Literal, get_args

from pydantic import ValidationError

from bench.ask.experiment import Frozen
from bench.ask.models import ResolvedModel, cache_folder
from bench.ask.plan import ModelRequest, RunRequest
from bench.errors import BadValue

MANIFEST = "qlora_bench.json"
LAYOUT = 2
"""Raised when what the project writes changes, so that older checkpoints in a cache are not read."""
Calibration = Literal["auto", "rtn", "calibrated", "random"]
CALIBRATIONS = get_args(Calibration)
RANDOM_HINT = "use --weights synthetic, or --calibration rtn or calibrated"
Method = Literal["rtn", "calibrated", "published", "random"]
RANDOM_NOTE = "its codes and scales were drawn at random: memory and speed are the format's, values are not"


class Manifest(Frozen):
    """How a packed checkpoint of ours was made."""

    calibration: str
    samples: int
    seconds: float


def decide_calibration(
    model: ModelRequest, asked: Calibration, preset: Calibration = "auto"
) -> tuple[Method, str | None]:
    """How the packed checkpoint of ``model`` comes to be, and a note where that is not what was asked.

    A checkpoint that is quantized already is read as published. ``auto``: real weights are calibrated with
    the backend's own method, synthetic ones rounded to nearest (there is nothing to calibrate on random
    values), or drawn as codes where the preset says so: a large model's dense weights would be drawn and
    rounded for many minutes only to change values that mean nothing. A model cut with --layers is rounded as
    well, since the calibrating library reads whole checkpoints. Raises BadValue for random codes in the place
    of real weights.
    """
    if "quantization_config" in model.architecture:
        return "published", None
    if asked == "random" and model.weights == "real":
        raise BadValue("--calibration random: random codes would take the place of real weights", RANDOM_HINT)
    if asked == "random" or (asked == "auto" and preset == "random" and model.weights == "synthetic"):
        return "random", RANDOM_NOTE
    if asked == "rtn":
        return "rtn", None
    if model.weights == "synthetic":
        note = "rounded to nearest: synthetic weights give nothing to calibrate on"
        return "rtn", note if asked == "calibrated" else None
    if model.layers is not None:
        return "rtn", "rounded to nearest instead of calibrated: the model is cut with --layers"
    return "calibrated", None


def packed_folder(request: RunRequest, model: ResolvedModel) -> Path:
    """Where the packed checkpoint of ``request`` is, or will be once it is made."""
    if request.calibration == "published":
        assert model.folder is not None
        return model.folder
    body = {
        "fingerprint": request.model.fingerprint,
        "architecture": dict(request.model.architecture),
        "backend": request.backend,
        "options": {name: value for name, value in request.options.items() if name != "kernel"},
        "calibration": request.calibration,
        "version": request.versions.get("gptqmodel") if request.calibration == "calibrated" else None,
        "layout": LAYOUT,
    }
    if model.folder is None and request.device != "cpu":
        # Drawn there, with other values than a CPU draws.
        body["drawn_on"] = request.device
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "packed" / f"{request.backend}-{request.calibration}-{digest}"


def read_manifest(folder: Path) -> Manifest | None:
    """The manifest of a finished checkpoint, None where there is none."""
    try:
        return Manifest.model_validate_json((folder / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValidationError):
        return None
