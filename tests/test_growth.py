"""Memory that grows from step to step is warned about; a heap that settles, or jumps once, is not."""

from __future__ import annotations

import math
import random

import pytest

from bench.judge.comparison import compare
from bench.judge.growth import BYTES_PER_STEP, FEWEST_STEPS, find_leak
from bench.record.schema import Record
from tests.record_factory import MIB, record, step


def ran(resident_mib: list[float], field: str = "resident_bytes") -> Record:
    """A run of two warm-up steps, and one measured step for each value."""
    values = [*resident_mib[:1] * 2, *resident_mib]
    return record(steps=tuple(step(i, **{field: int(v * MIB)}) for i, v in enumerate(values)))


def leak_mib(values: list[float]) -> float | None:
    found = find_leak(ran(values))
    return None if found is None else found.bytes_per_step / MIB


@pytest.mark.parametrize("slope", [1.01, 2, 50])
@pytest.mark.parametrize("count", [FEWEST_STEPS, 13, 14, 40])
def test_a_steady_growth_is_measured(slope: float, count: int) -> None:
    assert leak_mib([1000 + slope * i for i in range(count)]) == pytest.approx(slope, rel=1e-4)


@pytest.mark.parametrize("seed", range(20))
def test_a_leak_is_found_under_the_noise_of_a_heap(seed: int) -> None:
    draw = random.Random(seed)
    assert leak_mib([1500 + 5 * i + draw.uniform(-10, 10) for i in range(30)]) == pytest.approx(5, rel=0.3)


def test_a_leak_whose_beginning_the_heap_took_in_is_found() -> None:
    """As measured: 2 MiB a step were planted, and what earlier steps had freed held the first six of them."""
    resident = [889.4, 889.6, 889.6, 889.7, 889.7, 889.7, 892.7, 896.2, 896.2, 897.7, 899.7, 901.7, 903.7, 905.7, 907.7,
                909.7, 911.7, 913.7, 916.8, 920.3, 920.8, 924.3, 924.3, 925.8]  # fmt: skip
    assert leak_mib(resident) == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize(
    ("kind", "values"),
    [
        ("level", [1200.0] * 24),
        ("jumps twice, late", [1200.0 + 60 * (i >= 12) + 60 * (i >= 18) for i in range(24)]),
        ("falling", [1200.0 - 3 * i for i in range(24)]),
        ("levels off", [1200 + 150 * (1 - math.exp(-i / 4)) for i in range(24)]),
        ("grows as a root does", [1200 + 60 * math.sqrt(i) for i in range(24)]),
        ("grows as a logarithm does", [1200 + 60 * math.log1p(i) for i in range(24)]),
        *((f"jumps at {at}", [1200.0 + 124 * (i >= at) for i in range(24)]) for at in range(1, 24)),
        ("jumps and falls", [1200.0 + 134 * (8 <= i < 16) for i in range(24)]),
        ("grows by less than counts", [1200 + 0.9 * i for i in range(24)]),
        ("too few steps", [1200 + 9.0 * i for i in range(FEWEST_STEPS - 1)]),
    ],
)
def test_what_is_no_leak_is_silent(kind: str, values: list[float]) -> None:
    assert leak_mib(values) is None


def test_on_a_card_what_the_allocator_reserved_counts_though_it_grows_in_pieces() -> None:
    """2 MiB a step, reserved 20 MiB at a time."""
    found = find_leak(ran([20 * math.ceil((500 + 2 * i) / 20) for i in range(40)], "peak_reserved_bytes"))
    assert found is not None
    assert (found.measure, found.bytes_per_step) == ("reserved", pytest.approx(2 * MIB, rel=0.3))


def test_the_warning_names_the_run_and_what_to_do() -> None:
    leaking = ran([1000 + 3.0 * i for i in range(20)]).model_copy(update={"key": "other"})
    (text,) = (t for t in compare([leaking]).warnings if "memory grew" in t)
    assert text.startswith("bf16: resident memory grew by 3 MiB a step over 20 measured steps")
    assert "--steps" in text


def test_a_run_that_ran_out_of_memory_is_named_too() -> None:
    died = ran([1000 + 30.0 * i for i in range(20)])
    died = died.model_copy(update={"status": "out_of_memory", "stage": "train", "message": "out of memory"})
    assert any("memory grew by 30 MiB" in text for text in compare([died]).warnings)


def test_a_gigabyte_in_a_thousand_steps_is_where_it_begins() -> None:
    assert BYTES_PER_STEP * 1024 == 2**30
