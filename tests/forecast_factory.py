"""A preset of six small layers, and made-up repeats of a forecast for the tests of what is derived from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from bench.ask.experiment import Workload
from bench.record.depths import DepthTimes, Repeat, Turns
from bench.record.memory import BytesByKind, Memory, MemoryReading
from bench.record.schema import Load, Record
from tests.record_factory import digest, failed, record, request

SIX = """
description = "six small layers"
model = "local/six"

[architecture]
model_type = "qwen2"
architectures = ["Qwen2ForCausalLM"]
hidden_size = 64
intermediate_size = 256
num_hidden_layers = 6
num_attention_heads = 4
num_key_value_heads = 2
vocab_size = 512
max_position_embeddings = 512
rope_theta = 1000000.0
rms_norm_eps = 1e-6
hidden_act = "silu"
initializer_range = 0.02
tie_word_embeddings = true

[workload]
sequence_length = 64
"""
SMALL = Workload(sequence_length=64, steps=3, warmup_steps=2)


def six(folder: Path) -> Path:
    """The preset as a file."""
    path = folder / "six.toml"
    path.write_text(SIX, encoding="utf-8")
    return path


Peaks = Callable[[int, str], int]


def slice_record(
    depth: int,
    *,
    repeat: int = 0,
    backend: str = "bnb-nf4",
    peaks: Peaks = lambda depth, phase: 1000 + 10 * depth,
    cuda: bool = False,
    load_seconds: float | None = None,
    **changes: Any,
) -> Record:
    """A completed run of ``depth`` layers whose tensors grow by odd numbers of bytes a layer."""
    field = "peak_allocated_bytes" if cuda else "peak_resident_bytes"
    device = "cuda:0" if cuda else "cpu"
    readings = []
    for phase in ("loaded", "attached", "forward", "backward", "optimizer_step"):
        peak = peaks(depth, phase)
        more = {"peak_reserved_bytes": peak + 100} if cuda else {}
        readings.append(MemoryReading.model_validate({"phase": phase, "device": device, field: peak, **more}))
    kinds = BytesByKind(
        device=device,
        quantized_weights=7 * depth,
        quantization_metadata=3 * depth,
        unquantized_weights=101 + 13 * depth,
        lora=5 * depth,
        gradients=5 * depth,
        optimizer_state=11 * depth,
    )
    load = Load(
        import_seconds=4.0,
        load_seconds=1.0 + 0.5 * depth if load_seconds is None else load_seconds,
        host_peak_bytes=None,
        weights_digest=digest("unquantized"),
    )
    made = record(backend, repeat=repeat, cpu=not cuda)
    own = {
        "key": f"{backend}-{depth}-{repeat}",
        "memory": Memory(readings=tuple(readings), bytes_by_kind=(kinds,), phase_step=1),
        "load": load,
    }
    return made.model_copy(update=own | changes)


def times(
    rounds: list[Mapping[int, float]], *, warmup: int = 0, repeat: int = 0, **changes: Any
) -> DepthTimes:
    """Turns that gave these seconds, round by round; the warm-up rounds come first."""
    depths = tuple(sorted({depth for of_round in rounds for depth in of_round}))
    seconds = {depth: tuple(of_round.get(depth) for of_round in rounds) for depth in depths}
    often = set.intersection(*(set(of_round) for of_round in rounds))
    values: dict[str, Any] = {
        "key": f"times-{repeat}",
        "request": request("bnb-nf4", repeat=repeat),
        "turns": Turns(
            depths=depths,
            warmup_rounds=warmup,
            rounds=len(rounds) - warmup,
            seldom=next((depth for depth in depths if depth not in often), None),
        ),
        "status": "completed",
        "message": None,
        "seconds": seconds,
        "losses": {depth: (2.0,) * len(rounds) for depth in depths},
        "tokens_per_step": 512,
        "started_at": "2026-10-01T12:00:00+00:00",
        "wall_seconds": 20.0,
    }
    return DepthTimes(**(values | changes))


def repeat_of(
    depths: tuple[int, ...],
    *,
    index: int = 0,
    rounds: list[Mapping[int, float]] | None = None,
    fails_at: int | None = None,
    **changes: Any,
) -> Repeat:
    """One repeat; ``fails_at``: that depth ran out of memory and nothing came after it."""
    if fails_at is not None:
        gone = failed("bnb-nf4", "out_of_memory", "load", "not enough memory", repeat=index)
        before = [depth for depth in depths if depth < fails_at]
        records = {depth: slice_record(depth, repeat=index, **changes) for depth in before}
        return Repeat(index, records | {fails_at: gone})
    records = {depth: slice_record(depth, repeat=index, **changes) for depth in depths}
    linear = [{depth: 0.1 + 0.05 * depth for depth in depths}] * 4
    return Repeat(index, records, times(rounds or linear, repeat=index))
