"""Parts of a record that several ranks tell, made into the one part of their run. For ``bench.run.ranks``.

Everything here works on the plain values of events, where a number that is not finite is a word.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

PHASES = ("forward", "backward", "optimizer")
AVERAGED = ("gradient of lora", "gradient norm")
"""How the names of tensors begin that every rank has alike, once gradients are averaged."""


def merged_step(steps: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """One step of all ranks, in their order: losses as the stream has them, the seconds of the slowest."""
    losses = [loss for turn in zip(*(step["losses"] for step in steps), strict=True) for loss in turn]
    probes = [step["probe"] for step in steps]
    slowest = max(steps, key=lambda step: step["seconds"])
    return {
        **steps[0],
        "losses": losses,
        "seconds": slowest["seconds"],
        "watching_seconds": slowest.get("watching_seconds"),
        "tokens": sum(step["tokens"] for step in steps),
        "loss_tokens": sum(step["loss_tokens"] for step in steps),
        "peak_reserved_bytes": highest([step["peak_reserved_bytes"] for step in steps]),
        "resident_bytes": highest([step["resident_bytes"] for step in steps]),
        "probe": None if None in probes else _widest(probes),
    }


def merged_proof(proofs: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """What holds on every rank that has looked, and the sentences of all."""
    merged = dict(proofs[0])
    for name in merged:
        values = [proof.get(name) for proof in proofs]
        known = [value for value in values if value is not None]
        if all(isinstance(value, bool) for value in known):
            merged[name] = all(known) if known else None
        else:
            merged[name] = list(dict.fromkeys(sentence for value in known for sentence in value))
    return merged


def merged_load(loads: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Of the rank that took longest, and of the process that held most."""
    names = (
        "kernel_seconds",
        "load_seconds",
        "attach_seconds",
        "host_peak_bytes",
        "quantize_seconds",
        "reload_seconds",
        "cache_write_seconds",
    )
    return {**loads[0], **{name: highest([load.get(name) for load in loads]) for name in names}}


def merged_environment(environments: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Rank 0's, with the devices of all, each once."""
    devices = {device["device"]: device for each in environments for device in each["devices"]}
    return {**environments[0], "devices": list(devices.values())}


def merged_failure(
    failures: Mapping[int, Mapping[str, Any]], steps: Mapping[int, Sequence[Mapping[str, Any]]], count: int
) -> dict[str, Any]:
    """The failure of the earliest step. ``failures``, ``steps``: by rank; ``count``: of all ranks.

    Within a step: ranks share their gradients, so one that is averaged in from another rank is seen on every
    one. It is that rank's whose own losses, activations or gradients at the layers were not finite.
    """
    own = {
        rank: not _is_shared(failure) or (_is_averaged(failure) and _spoilt(steps[rank], failure["step"]))
        for rank, failure in failures.items()
    }
    rank = min(
        failures, key=lambda each: (failures[each]["step"], not own[each], *_order(failures[each]), each)
    )
    failure = failures[rank]
    if own[rank]:
        return _on_rank(failure, rank, count)
    evidence = str(failure["evidence"])
    if _is_averaged(failure):
        evidence += " (in the gradients as averaged over the ranks: whose they were cannot be told)"
    return {**failure, "micro_batch": None, "loss": None, "evidence": evidence}


def highest(values: Sequence[Any]) -> Any:
    """The largest that is known; None: none is."""
    return max((value for value in values if value is not None), default=None)


def _order(failure: Mapping[str, Any]) -> tuple[bool, int]:
    return _is_shared(failure), PHASES.index(failure["phase"])


def _is_shared(failure: Mapping[str, Any]) -> bool:
    """Whether it was seen in what all ranks have alike: averaged gradients, or the adapters."""
    return failure["kind"] in ("poisoned_weights", "optimizer_step") or _is_averaged(failure)


def _is_averaged(failure: Mapping[str, Any]) -> bool:
    return str(failure["tensor"]).startswith(AVERAGED)


def _spoilt(steps: Sequence[Mapping[str, Any]], index: int) -> bool:
    """Whether a rank's own values were not finite in a step."""
    for step in steps:
        if step["index"] == index:
            probe = step["probe"] or {}
            layers = [*probe.get("activation_abs_max", ()), *probe.get("gradient_abs_max", ())]
            return not all(math.isfinite(float(v)) for v in (*step["losses"], *layers) if v is not None)
    return False


def _on_rank(failure: Mapping[str, Any], rank: int, count: int) -> dict[str, Any]:
    """With its micro-batch counted as in `Step.losses`."""
    evidence, own = str(failure["evidence"]), failure["micro_batch"]
    place = None if own is None else own * count + rank
    if own is not None:
        evidence = re.sub(rf"micro-batch {own}\b", f"micro-batch {place}", evidence)
    return {**failure, "rank": rank, "micro_batch": place, "evidence": f"on rank {rank}: {evidence}"}


def _widest(probes: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The largest values over the ranks; the adapters' gradients are the same on all."""
    by_layer = {
        name: [_largest(values) for values in zip(*(probe[name] for probe in probes), strict=True)]
        for name in ("activation_abs_max", "gradient_abs_max")
    }
    return {**probes[0], **by_layer}


def _largest(values: Sequence[Any]) -> Any:
    """NaN before infinity before the largest number, each as it was told; None: no rank has one."""
    known = [value for value in values if value is not None]
    return max(known, key=lambda value: (math.isnan(float(value)), float(value)), default=None)
