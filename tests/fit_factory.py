"""Runs on several cards, and forecasts, for the tests of the section "Will it fit, how fast".

The numbers are made up and appear nowhere but in tests.
"""

from __future__ import annotations

from typing import Any

from bench.ask.plan import ModelRequest
from bench.ask.preset import load_preset
from bench.record.environment import Device
from bench.record.forecast import BackendForecast, CardOutlook, Check, Forecast, Line, StepSeconds
from bench.record.memory import BytesByKind, Memory, MemoryReading
from bench.record.schema import Record
from tests.record_factory import GIB, PHASES, digest, environment, record

QWEN_72B = ModelRequest(
    name="Qwen/Qwen2-72B-Instruct",
    weights="synthetic",
    fingerprint=digest("qwen2-72b"),
    architecture=load_preset("qwen2-72b").architecture or {},
)
WEIGHT_GIB = {"bf16": 19.3, "bnb-nf4": 6.2, "bnb-nf4-dq": 5.8, "bnb-int8": 10.2, "hqq": 6.1, "gptq": 5.7,
              "awq": 5.7, "eetq": 10.1}  # fmt: skip
"""Backend -> weights on one of seven cards."""


def on_cards(backend: str, count: int = 7, capacity_gib: float = 23.6, **changes: Any) -> Record:
    """A completed run of the 72B, its layers split over so many cards; the last has the head and its logits."""
    readings, kinds = [], []
    for place in range(count):
        weights = int(WEIGHT_GIB[backend] * GIB * 7 / count)
        extra = int((1.2 if place == 0 else 2.9 if place == count - 1 else 0.0) * GIB)
        kinds.append(
            BytesByKind(
                device=f"cuda:{place}", quantized_weights=int(weights * 0.89), quantization_metadata=int(weights * 0.11),
                unquantized_weights=extra or 2**20, lora=60_000_000, gradients=60_000_000, optimizer_state=120_000_000,
            )
        )  # fmt: skip
        for phase, more in zip(PHASES, (0.1, 0.2, 1.1, 1.7, 0.9), strict=True):
            top = weights + extra + int(more * GIB) + 240_000_000
            readings.append(
                MemoryReading(
                    phase=phase, device=f"cuda:{place}", allocated_bytes=weights, peak_allocated_bytes=int(top * 0.97),
                    reserved_bytes=top, peak_reserved_bytes=top, nvml_used_bytes=top + GIB // 2,
                )
            )  # fmt: skip
    cards = tuple(
        Device(
            device=f"cuda:{place}", name="NVIDIA GeForce RTX 3090", total_memory_bytes=int(capacity_gib * GIB)
        )
        for place in range(count)
    )
    asked = {"model": QWEN_72B, "preset": "qwen2-72b", "placement": "split", "device_count": count}
    values: dict[str, Any] = {
        "ask": asked,
        "weights": "synthetic",
        "environment": environment(devices=cards),
        "memory": Memory(readings=tuple(readings), bytes_by_kind=tuple(kinds), phase_step=1),
    }
    return record(backend, **(values | changes))


def outlook(backend: str, cards: str, *, count: int, capacity_gib: float, **changes: Any) -> CardOutlook:
    weights = WEIGHT_GIB[backend] * 7 / count
    peaks = tuple(int((weights + 1.5 + (2.9 if place == count - 1 else 0.3)) * GIB) for place in range(count))
    fits = max(peaks) <= capacity_gib * GIB
    values: dict[str, Any] = {
        "cards": cards,
        "card_count": count,
        "capacity_bytes": int(capacity_gib * GIB),
        "sequence_length": 512,
        "fits": fits,
        "longest_sequence": 8192 if fits else None,
        "peak_bytes": peaks,
        "basis": "arithmetic",
    }
    return CardOutlook(**(values | changes))


def lines(backend: str, *, full: int, verify: bool, spread: bool = True) -> tuple[Line, ...]:
    """Weights, peak, load and step at 2 and 4 layers and what they come to."""
    per_layer = WEIGHT_GIB[backend] * 7 / 80 * GIB
    layer_step = 0.073 + 0.01 * list(WEIGHT_GIB).index(backend)

    def line(group: Any, name: str, unit: Any, fixed: float, slope: float, off: float) -> Line:
        predicted = fixed + slope * full
        exact = group == "weights" or not spread
        return Line(
            name=name, group=group, unit=unit, at_slices=(fixed + 2 * slope, fixed + 4 * slope), per_layer=slope,
            fixed=fixed, predicted=predicted, low=None if exact else predicted * 0.985,
            high=None if exact else predicted * 1.015, measured=predicted / (1 + off) if verify else None,
        )  # fmt: skip

    return (
        line("weights", "quantized_weights", "bytes", 0, round(per_layer * 0.9), 0),
        line("weights", "quantization_metadata", "bytes", 0, round(per_layer * 0.1), 0),
        line("weights", "unquantized_weights", "bytes", 4_982_833_152, 30_000, 0),
        line("peak", "backward", "bytes", 7.1 * GIB, per_layer * 1.02, 0.021),
        line("peak", "highest", "bytes", 7.3 * GIB, per_layer * 1.02, 0.021),
        line("load", "load", "seconds", 3.0, 1.9, -0.13),
        line("step", "step", "seconds", 0.342, layer_step, 0.009),
    )


def backend_forecast(
    backend: str, *, full: int = 80, verify: bool = False, **changes: Any
) -> BackendForecast:
    own = lines(backend, full=full, verify=verify)
    values: dict[str, Any] = {
        "backend": backend,
        "effective_dtype": "bfloat16",
        "slices": (2, 4),
        "slice_keys": (f"{backend}-2", f"{backend}-4"),
        "full_key": f"{backend}-full" if verify else None,
        "lines": own,
        "outlooks": (
            outlook(backend, "7x24GB", count=7, capacity_gib=23.55),
            outlook(backend, "1x80GB", count=1, capacity_gib=78.5, basis="measured"),
        ),
        "tokens_per_step": 512,
        "step_seconds": (StepSeconds(repeat=0, warmup_rounds=2, seconds={2: (0.5,) * 8, 4: (0.6,) * 8}),),
        "checks": tuple(
            Check(slices=slices, repeat=repeat, lines=own) for slices in ((2, 4), (2, 8)) for repeat in (0, 1)
        )
        if verify
        else (),
    }
    return BackendForecast(**(values | changes))


def forecast(*backends: BackendForecast, text: str | None = None, **changes: Any) -> Forecast:
    """``text`` stands in every free string where it is given."""
    made = backends or (backend_forecast("bnb-nf4"), backend_forecast("hqq"))
    if text is not None:
        made = tuple(
            one.model_copy(
                update={
                    "backend": text, "effective_dtype": text, "message": text, "notes": (text,), "failures": (text,),
                    "lines": tuple(line.model_copy(update={"name": text}) for line in one.lines[:2]) + one.lines[4:],
                    "outlooks": tuple(o.model_copy(update={"cards": text, "reason": text}) for o in one.outlooks[:1]),
                }
            )
            for one in made[:1]
        )  # fmt: skip
    values: dict[str, Any] = {
        "command": text or "qlora-bench forecast --preset qwen2-72b --cards 7x24GB",
        "model": text or QWEN_72B.name,
        "weights": "synthetic",
        "full_layers": 80,
        "asked": {
            "preset": text or "qwen2-72b", "dtype": text or "bfloat16", "attention": text or "sdpa",
            "checkpointing": text or "non_reentrant", "workload": {"sequence_length": 512, "micro_batch_size": 1},
            "lora": {"rank": 8, "target_modules": [text or "q_proj"]},
        },
        "device": text or "Intel Xeon",
        "repeats": 2,
        "backends": made,
        "assumptions": (text or "All decoder layers are alike.", "Step times are those of this device."),
        "ended_at": text or "2026-10-01T12:00:00Z",
        "wall_seconds": 812.0,
        "peak_memory": "peak_resident_bytes",
    }  # fmt: skip
    return Forecast(**(values | changes))
