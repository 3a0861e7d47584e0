"""The unquantized reference that gradients are compared with: which one, and where it is kept.

One reference serves every backend, dtype, seed and stress of the same model and work: it is made once, in a
worker of its own, by the unquantized backend in float32 (bfloat16 where float32 would not fit).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.ask.experiment import Dtype
from bench.ask.models import cache_folder
from bench.ask.plan import RunRequest

REFERENCE_BACKEND = "bf16"
"""The id of the unquantized backend; it computes in whatever dtype is asked for."""
LAYOUT = 1
"""Raised when what a reference file holds changes."""
BYTES = {"float32": 4, "bfloat16": 2}
ROOM = 0.6
"""Share of the memory that the dense weights may take: gradients, activations and logits need the rest."""


def dense_parameters(architecture: Mapping[str, Any], layers: int | None = None) -> int:
    """Weights of a decoder with gated MLPs: embedding, head where untied, projections, norms."""
    hidden, inner = int(architecture["hidden_size"]), int(architecture["intermediate_size"])
    heads = int(architecture["num_attention_heads"])
    groups = int(architecture.get("num_key_value_heads") or heads)
    head = int(architecture.get("head_dim") or hidden // heads)
    count = min(int(architecture["num_hidden_layers"]), layers or int(architecture["num_hidden_layers"]))
    layer = hidden * head * (2 * heads + 2 * groups) + 3 * hidden * inner + 2 * hidden
    embeddings = int(architecture["vocab_size"]) * hidden
    return count * layer + hidden + embeddings * (1 if architecture.get("tie_word_embeddings") else 2)


def reference_dtype(request: RunRequest, memory_bytes: int | None) -> tuple[Dtype | None, str | None]:
    """The reference's dtype, or None and why there is none. ``memory_bytes``: of the device, if known."""
    model = request.model
    if request.calibration == "published":
        return None, "the checkpoint is published quantized: there are no dense weights to compare with"
    count = dense_parameters(model.architecture, model.layers)
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
            "options": {},
            "calibration": None,
            "dtype": dtype,
            "stress": {},
            "trace": False,
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
        "dtype": dtype,
        "versions": [request.versions.get(name) for name in ("torch", "transformers", "peft")],
        "layout": LAYOUT,
    }
    digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
    return cache_folder() / "references" / f"{dtype}-{digest}.safetensors"
