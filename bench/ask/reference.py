"""The unquantized reference that gradients are compared with: which one, and where it is kept.

One reference serves every backend, dtype, seed and stress of the same model and work: it is made once, in a
worker of its own, by the unquantized backend in float32 (bfloat16 where float32 would not fit).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

from bench.ask.experiment import Dtype
from bench.ask.models import cache_folder
from bench.ask.plan import RunRequest
from bench.ask.shapes import decoder_of
from bench.ask.versions import CURRENT, HARNESS_LIBRARIES, installed_versions
from bench.errors import UserError

REFERENCE_BACKEND = "bf16"
"""The id of the unquantized backend; it computes in whatever dtype is asked for."""
LAYOUT = 2
"""Raised when what a reference file holds changes."""
BYTES = {"float32": 4, "bfloat16": 2}
ROOM = 0.6
"""Share of the memory that the dense weights may take: gradients, activations and logits need the rest."""


def reference_dtype(request: RunRequest, memory_bytes: int | None) -> tuple[Dtype | None, str | None]:
    """The reference's dtype, or None and why there is none. ``memory_bytes``: of the device, if known."""
    model = request.model
    if request.calibration == "published":
        return None, "the checkpoint is published quantized: there are no dense weights to compare with"
    if request.calibration == "random":
        return None, "codes were drawn at random: they stand for no dense weights"
    try:
        count = decoder_of(model.architecture).parameters
    except UserError as error:
        return None, f"how large the unquantized model is cannot be told: {error}"
    choices: tuple[Dtype, ...] = ("float32", "bfloat16")
    for dtype in choices:
        if memory_bytes is None or count * BYTES[dtype] <= ROOM * memory_bytes:
            return dtype, None
    return None, (
        f"the unquantized model ({count * 2 / 2**30:.1f} GiB in bfloat16) does not fit in "
        f"{(memory_bytes or 0) / 2**30:.1f} GiB beside its gradients"
    )


def reference_request(request: RunRequest, dtype: Dtype) -> RunRequest:
    """The run that makes the reference for ``request``."""
    return request.model_copy(
        update={
            "backend": REFERENCE_BACKEND,
            "environment": CURRENT,
            "versions": _versions(request),
            "options": {},
            "calibration": None,
            "dtype": dtype,
            "stress": {},
            "trace": False,
            "placement": "single",
            "device_count": 1,
            "cache": False,
            "lora": request.lora.model_copy(update={"precision": "autocast"}),
        }
    )


def reference_file(request: RunRequest, dtype: Dtype) -> Path:
    """Where the reference for ``request`` is, or will be."""
    lora, work = request.lora, request.workload
    body = {
        "fingerprint": request.model.fingerprint,
        "architecture": dict(request.model.architecture),
        "layers": request.model.layers,
        "lora": [lora.rank, lora.alpha, list(lora.target_modules)],
        "work": [work.sequence_length, work.micro_batch_size, work.padding, work.without_targets],
        "data": request.data_digest,
        "device": request.device,
        "attention": request.attention,
        "dtype": dtype,
        "versions": [_versions(request).get(name) for name in ("torch", "transformers", "peft")],
        "layout": LAYOUT,
    }
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "references" / f"{dtype}-{digest}.safetensors"


def _versions(request: RunRequest) -> Mapping[str, str | None]:
    """Of what makes the reference: always the current environment, so that there is one for all."""
    if request.environment == CURRENT:
        return request.versions
    return installed_versions(HARNESS_LIBRARIES)
