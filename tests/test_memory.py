"""Memory readings: peaks of their own, and nothing counted that is not used any more."""

from __future__ import annotations

import sys

import pytest
import torch

from bench.probe.allocator import AllocatorTrouble
from bench.probe.memory import MemoryProbe, release_unused, resident_bytes

CPU = torch.device("cpu")
MIB = 2**20
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")


@linux
def test_a_phase_has_a_peak_of_its_own() -> None:
    probe = MemoryProbe([CPU])
    large = torch.ones(128 * MIB, dtype=torch.uint8)
    del large
    release_unused([CPU])
    probe.start_phase()
    (quiet,) = probe.read("forward")
    assert quiet.resident_bytes is not None
    assert quiet.peak_resident_bytes is not None
    assert quiet.peak_resident_bytes < quiet.resident_bytes + 64 * MIB
    assert (probe.process_peak_bytes() or 0) >= quiet.peak_resident_bytes + 64 * MIB


@linux
def test_small_freed_pieces_are_given_back() -> None:
    """Below the size at which malloc maps pages of their own, free memory stays in the heap."""
    pieces = [torch.ones(100_000, dtype=torch.uint8) for _ in range(2000)]
    kept = pieces[::50]
    before = resident_bytes()
    del pieces
    release_unused([CPU])
    assert resident_bytes() < before - 100 * MIB
    assert len(kept) == 40


def test_a_cpu_has_no_allocator_figures() -> None:
    (reading,) = MemoryProbe([CPU]).read("loaded")
    assert (reading.allocated_bytes, reading.peak_reserved_bytes, reading.nvml_used_bytes) == (
        None,
        None,
        None,
    )


def test_the_allocator_of_a_cpu_has_no_troubles_to_count() -> None:
    assert AllocatorTrouble([CPU]).after_step(warmup=False) is None


def test_troubles_of_the_warm_up_are_not_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    """The driver's counters are stood in for: only their arithmetic is tested here."""
    totals = {"num_alloc_retries": 5, "num_ooms": 1}
    monkeypatch.setattr(torch.cuda, "memory_stats", lambda device: dict(totals))
    trouble = AllocatorTrouble([torch.device("cuda", 0), torch.device("cuda", 1)])
    totals["num_alloc_retries"] = 7
    assert trouble.after_step(warmup=True) == {"allocator_retries": 0, "allocator_ooms": 0}
    totals["num_alloc_retries"] = 10
    assert trouble.after_step(warmup=False) == {"allocator_retries": 6, "allocator_ooms": 0}
    totals["num_ooms"] = 2
    assert trouble.after_step(warmup=False) == {"allocator_retries": 6, "allocator_ooms": 2}
