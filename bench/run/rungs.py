"""What may be changed in a failing run, one thing at a time: the rungs of the triage's ladder.

`find_changes` lists them in the order in which they are tried. A change that does not apply stays in the list
with its reason, so that the ladder shows what was considered.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any, get_args

from bench.ask.experiment import Attention, Workload
from bench.ask.plan import RunRequest
from bench.record.triage import RungKind
from bench.run.one_by_one import changed

OTHER_BACKENDS = ("hqq", "eetq", "awq", "gptq", "bnb-nf4", "bnb-int8", "bf16")
"""Tried in this order; the one that fails is left out."""
NEEDS_CUDA = ("sdpa_flash", "sdpa_efficient")
LEARNING_RATE_DIVISOR = 10
CLIPPING_NORM = 1.0


@dataclass(frozen=True)
class Change:
    """One thing changed."""

    name: str
    group: str
    kind: RungKind
    words: str
    settings: Mapping[str, Any]
    """Dotted name in the request -> its new value."""
    request: RunRequest | None
    """The run with the change; None: it does not apply, see ``note``."""
    note: str | None = None


def find_changes(base: RunRequest, others: Mapping[str, RunRequest]) -> list[Change]:
    """Every change of ``base``. ``others``: backend id -> the run on that backend with all else equal."""
    found: list[Change] = []
    seen = {base.key: "the run as asked"}
    for change in _all_changes(base, others):
        key = change.request.key if change.request is not None else None
        if key in seen:
            found.append(replace(change, request=None, note=f"the same run as '{seen[key]}'"))
            continue
        if key is not None:
            seen[key] = change.words
        found.append(change)
    return found


def _all_changes(base: RunRequest, others: Mapping[str, RunRequest]) -> Iterator[Change]:
    yield _double_quantization(base, others)
    yield from _training(base)
    yield _compute_dtype(base)
    yield _adapter_precision(base)
    yield from _attention(base)
    yield from _checkpointing(base)
    yield from _padding(base)
    yield _not_applicable(
        "placement=one", "placement", "setting", "one device instead of several", "the run has one device"
    )
    for backend, request in others.items():
        yield Change(
            f"backend={backend}", "backend", "backend", f"backend {backend}", {"backend": backend}, request
        )


def _changed(base: RunRequest, group: str, kind: RungKind, words: str, path: str, value: Any) -> Change:
    shown = "null" if value is None else f"{value:g}" if isinstance(value, float) else str(value)
    settings = {path: value}
    return Change(f"{path}={shown}", group, kind, words, settings, changed(base, settings))


def _not_applicable(name: str, group: str, kind: RungKind, words: str, note: str) -> Change:
    return Change(name, group, kind, words, {}, None, note)


def _double_quantization(base: RunRequest, others: Mapping[str, RunRequest]) -> Change:
    group, words = "double quantization", "double quantization off"
    plain = others.get("bnb-nf4")
    if not base.options.get("double_quantization"):
        note = "already off" if "double_quantization" in base.options else "the backend has none"
        return _not_applicable("double_quantization=off", group, "precision", words, note)
    if base.backend == "bnb-nf4-dq" and plain is not None:
        # The other id, so that the record is the one that an ordinary run of bnb-nf4 makes.
        settings = {"backend": "bnb-nf4", "options": {**base.options, "double_quantization": False}}
        request = changed(plain, {"options": settings["options"]})
        return Change("double_quantization=off", group, "precision", words, settings, request)
    return _changed(base, group, "precision", words, "options.double_quantization", False)


def _training(base: RunRequest) -> Iterator[Change]:
    rate = base.optimizer.learning_rate / LEARNING_RATE_DIVISOR
    yield _changed(
        base,
        "learning rate",
        "training",
        f"learning rate a tenth ({rate:g})",
        "optimizer.learning_rate",
        rate,
    )
    clipped = base.optimizer.max_gradient_norm is not None
    yield _changed(
        base,
        "clipping",
        "training",
        "clipping off" if clipped else f"clipping on, at norm {CLIPPING_NORM:g}",
        "optimizer.max_gradient_norm",
        None if clipped else CLIPPING_NORM,
    )


def _compute_dtype(base: RunRequest) -> Change:
    group, words = "compute dtype", "bfloat16"
    if base.dtype != "float16":
        note = "already" if base.dtype == "bfloat16" else "float32 has the same range already"
        return _not_applicable("dtype=bfloat16", group, "precision", words, note)
    return _changed(base, group, "precision", words, "dtype", "bfloat16")


def _adapter_precision(base: RunRequest) -> Change:
    group, words = "adapter precision", "adapters multiplied in float32"
    if base.lora.precision == "float32" or base.dtype == "float32":
        return _not_applicable("lora.precision=float32", group, "precision", words, "already")
    return _changed(base, group, "precision", words, "lora.precision", "float32")


def _attention(base: RunRequest) -> Iterator[Change]:
    for kernel in get_args(Attention):
        words = f"attention kernel {kernel}"
        if kernel == base.attention:
            continue
        if kernel in NEEDS_CUDA and base.device != "cuda":
            yield _not_applicable(f"attention={kernel}", "attention", "setting", words, "needs CUDA")
        else:
            yield _changed(base, "attention", "setting", words, "attention", kernel)


def _checkpointing(base: RunRequest) -> Iterator[Change]:
    for mode in get_args(RunRequest.model_fields["checkpointing"].annotation):
        if mode != base.checkpointing:
            words = f"checkpointing {mode.replace('_', '-')}"
            yield _changed(base, "checkpointing", "setting", words, "checkpointing", mode)


def _padding(base: RunRequest) -> Iterator[Change]:
    for side in get_args(Workload.model_fields["padding"].annotation):
        if side != base.workload.padding:
            words = "rows packed end to end" if side == "packed" else f"padding on the {side}"
            yield _changed(base, "padding", "setting", words, "workload.padding", side)
