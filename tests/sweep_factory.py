"""Many records as a sweep leaves them: backends, dtypes, learning rates, lengths and group sizes, with repeats."""

from __future__ import annotations

import itertools
import random
from collections.abc import Iterator
from typing import Any

from bench.ask.experiment import Optimizer, Workload
from bench.record.schema import Memory, Record
from tests.record_factory import FIGURES, GIB, failed, memory, probed, quantization, record, steps

GROUPED = ("hqq", "gptq", "awq")
DTYPES = ("bfloat16", "float16")
LENGTHS = (512, 1024, 2048, 4096)
RATES = (5e-5, 1e-4, 2e-4, 5e-4)
SIZES = (64, 128)


def sweep(runs: int, seed: int = 0) -> list[Record]:
    """So many records, probed, one in twelve of them failed; repeats come after all settings were run once."""
    chance = random.Random(seed)
    return [_run(number, *one, chance) for number, one in enumerate(itertools.islice(_settings(), runs))]


def _settings() -> Iterator[tuple[int, str, str, int, float, int | None]]:
    for repeat in itertools.count():
        for length, dtype, rate, backend in itertools.product(LENGTHS, DTYPES, RATES, FIGURES):
            for size in SIZES if backend in GROUPED else (None,):
                yield repeat, backend, dtype, length, rate, size


def _run(
    number: int, repeat: int, backend: str, dtype: str, length: int, rate: float, size: int | None,
    chance: random.Random,
) -> Record:  # fmt: skip
    ask: dict[str, Any] = {
        "dtype": dtype,
        "options": {"group_size": size} if size else {},
        "optimizer": Optimizer(learning_rate=rate),
        "workload": Workload(sequence_length=length, steps=8, warmup_steps=2),
    }
    stamp = f"2026-10-{1 + number // 1440:02d}T{number // 60 % 24:02d}:{number % 60:02d}:00Z"
    if number % 12 == 11:
        message = "CUDA out of memory. Tried to allocate 1.21 GiB."
        return failed(backend, "out_of_memory", "train", message, repeat=repeat, ask=ask, started_at=stamp)
    grown, shaken = length / 512, 1 + 0.02 * chance.random()
    made = record(
        backend,
        repeat=repeat,
        ask=ask,
        started_at=stamp,
        quantization=quantization(backend, requested_dtype=dtype, effective_dtype=dtype),
        memory=_grown(memory(backend), grown),
        steps=tuple(
            one.model_copy(update={"seconds": one.seconds * grown * shaken, "tokens": length})
            for one in steps(backend, repeat)
        ),
    )
    return probed(made)


def _grown(seen: Memory, by: float) -> Memory:
    readings = tuple(
        one.model_copy(update={"peak_reserved_bytes": int((one.peak_reserved_bytes or 0) + 0.6 * GIB * (by - 1))})
        for one in seen.readings
    )
    return seen.model_copy(update={"readings": readings})
