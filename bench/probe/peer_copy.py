"""Copies between two cards, compared bit by bit with the same data staged over the host.

    check = PairCheck(TorchTransfer(), source, target).run()

Where the platform drops or changes what one card writes into the other's memory, CUDA reports success
(pytorch/pytorch#84803, NVIDIA/open-gpu-kernel-modules#1257), and a training on such cards looks like a bad
backend. A dropped write leaves what stood there before, often the right data of an earlier copy
(pytorch/pytorch#87363): so every target is filled with the complement of what must arrive.

What copies and what makes the cards busy is a `Transfer`; nothing else here knows about CUDA.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from functools import cache
from typing import Literal, Protocol

import torch

from bench.load.layout import Place
from bench.record.preflight import CopyCheck, Mismatch

MIB = 2**20
SIZES_BYTES = (MIB, 16 * MIB + 8, 256 * MIB)
"""The second ends beyond a page."""
LARGE_BYTES = 64 * MIB
"""From here on only the two patterns that show a misplaced or repeated piece."""
KERNEL_BYTES = 32 * MIB
"""Up to here a copy is made by a kernel too: it stores into the other card's memory as NCCL's kernels do, and
a copy engine does not."""
SHARE_OF_FREE_MEMORY = 1 / 8
"""A round holds the data, its staged copy, the target, and what the comparison makes of them."""
ROW_BYTES = 4096
"""A copy by a kernel transposes rows of this length."""
SEED = 912

Way = Literal["copy engine", "kernel"]


class Transfer(Protocol):
    """What moves data between places and makes them busy."""

    def copy(self, data: torch.Tensor, into: torch.Tensor, source: Place, target: Place) -> None:
        """Copy ``data`` on ``source`` straight into ``into`` on ``target``: of one shape, uint8 or int64,
        perhaps not contiguous."""

    def host_memory(self, size: int, source: Place, *, pinned: bool) -> torch.Tensor:
        """uint8 [size] of the host for data from ``source``, page-locked or not, ready to be written to."""

    def stage(self, data: torch.Tensor, into: torch.Tensor, source: Place) -> None:
        """Copy ``data`` on ``source`` into memory of the host."""

    def place(self, data: torch.Tensor, target: Place) -> torch.Tensor:
        """``data`` of the host on ``target``."""

    def streams(self, places: Sequence[Place]) -> AbstractContextManager[object]:
        """Other streams than the default ones for the work inside, on each place."""

    def busy(self, places: Sequence[Place]) -> AbstractContextManager[list[str]]:
        """Matrix products on every place and copies from the last to the first, while inside. The list gets
        a sentence where that could not be kept up."""

    def wait(self, places: Sequence[Place]) -> None:
        """Wait for the work of the present streams."""

    def free_bytes(self, place: Place) -> int:
        """Memory that a place has left, with what earlier checks let go."""


@dataclass
class PairCheck:
    """The check of one ordered pair of places; of one place and the host where both are the same."""

    transfer: Transfer
    source: Place
    target: Place
    sizes_bytes: Sequence[int] = SIZES_BYTES
    peer_access: bool | None = None
    """False: the driver stages every copy, so that no kernel can write across."""
    _tally: _Tally = field(init=False)
    _sizes: list[int] = field(init=False)

    def run(self) -> CopyCheck:
        """Copy and compare, first at rest, then under load. Raises what CUDA raises."""
        began = time.perf_counter()
        free = min(self.transfer.free_bytes(place) for place in self._places)
        fitting = [size for size in self.sizes_bytes if size <= free * SHARE_OF_FREE_MEMORY]
        self._sizes = fitting or [min(self.sizes_bytes)]
        self._tally = _Tally(largest=max(self._sizes))
        self._rounds(under_load=False)
        with self.transfer.busy(self._places) as troubles:
            self._rounds(under_load=True)
        if troubles:
            self._tally.notes.append(f"the load was not kept up: {troubles[0]}")
        return self._tally.told(time.perf_counter() - began)

    @property
    def _places(self) -> tuple[Place, ...]:
        return tuple(dict.fromkeys((self.source, self.target)))

    def _rounds(self, *, under_load: bool) -> None:
        rounds = [(size, pattern) for size in self._sizes for pattern in patterns(size)]
        for number, (size, pattern) in enumerate(rounds):
            self._round(size, pattern, pinned=bool(number % 2), under_load=under_load)

    def _round(self, size: int, pattern: str, *, pinned: bool, under_load: bool) -> None:
        """The same data staged once, then copied on the default streams and on others."""
        truth = pattern_bytes(pattern, size)
        data = self.transfer.place(truth, self.source)
        # Not timed: to get such memory takes several times as long as to fill it.
        host = self.transfer.host_memory(size, self.source, pinned=pinned)
        self.transfer.wait(self._places)
        began = time.perf_counter()
        self.transfer.stage(data, host, self.source)
        expected = self.transfer.place(host, self.target)
        self.transfer.wait(self._places)
        if not under_load:
            self._tally.staged(size, time.perf_counter() - began)
        self._tally.staged_mismatching += int((host != truth).sum()) if not torch.equal(host, truth) else 0
        if self.source == self.target:
            # One card: it went to the host and came back, which is all that there is to compare.
            self._tally.compare(data, expected, pattern, "copy engine", under_load=under_load)
            return
        self._copies(data, expected, pattern, under_load=under_load)
        with self.transfer.streams(self._places):
            self._copies(data, expected, pattern, under_load=under_load)

    def _copies(self, data: torch.Tensor, expected: torch.Tensor, pattern: str, *, under_load: bool) -> None:
        into = expected.bitwise_not()
        self.transfer.wait(self._places)
        began = time.perf_counter()
        self.transfer.copy(data, into, self.source, self.target)
        self.transfer.wait(self._places)
        if not under_load:
            self._tally.direct(data.numel(), time.perf_counter() - began)
        self._tally.compare(expected, into, pattern, "copy engine", under_load=under_load)
        whole = data.numel() - data.numel() % ROW_BYTES
        if self.peer_access is False or not whole or whole > KERNEL_BYTES:
            return
        # Transposed on one side only: torch copies that with a kernel on the source, which stores straight
        # into the target's memory where peer access is on (ATen/native/cuda/Copy.cu).
        across = _transposed(data[:whole])
        into = _transposed(expected[:whole]).contiguous().bitwise_not()
        self.transfer.copy(across, into, self.source, self.target)
        self.transfer.wait(self._places)
        arrived = into.t().contiguous().view(-1).view(torch.uint8)
        self._tally.compare(expected[:whole], arrived, pattern, "kernel", under_load=under_load)


def _transposed(data: torch.Tensor) -> torch.Tensor:
    """uint8 [n] as int64 [n / ROW_BYTES, ROW_BYTES / 8], not contiguous."""
    return data.view(torch.int64).view(ROW_BYTES // 8, -1).t()


def patterns(size_bytes: int) -> tuple[str, ...]:
    """Names of the patterns that copies of this size are checked with."""
    few = ("random", "counter")
    return few if size_bytes >= LARGE_BYTES else (*few, "ones", "alternating")


@cache
def pattern_bytes(pattern: str, size_bytes: int) -> torch.Tensor:
    """uint8 [size_bytes] on the CPU: the same whenever it is asked for. The size is a multiple of 8."""
    words = size_bytes // 8
    match pattern:
        case "random":
            generator = torch.Generator().manual_seed(SEED)
            made = torch.empty(words, dtype=torch.int64).random_(generator=generator)
            # random_ leaves the sign bit alone (it draws from 0 to 2**63 - 1); every other word gets it.
            made[::2].bitwise_not_()
        case "ones":
            made = torch.full((words,), -1, dtype=torch.int64)
        case "alternating":
            made = torch.full((words,), 0x55AA55AA55AA55AA, dtype=torch.int64)
        case "counter":
            made = torch.arange(words, dtype=torch.int64)
        case _:
            raise ValueError(f"no such pattern: {pattern}")
    return made.view(torch.uint8)


@dataclass
class _Tally:
    """Counts what was copied, and what of it arrived changed."""

    largest: int
    checked: int = 0
    rounds: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    mismatching: dict[bool, int] = field(default_factory=lambda: {False: 0, True: 0})
    staged_mismatching: int = 0
    first: Mismatch | None = None
    notes: list[str] = field(default_factory=list)
    _direct: list[float] = field(default_factory=list)
    _staged: list[float] = field(default_factory=list)

    def direct(self, size: int, seconds: float) -> None:
        """Time a copy; those of the largest size count."""
        if size == self.largest:
            self._direct.append(seconds)

    def staged(self, size: int, seconds: float) -> None:
        """Time a way over the host."""
        if size == self.largest:
            self._staged.append(seconds)

    def compare(
        self, expected: torch.Tensor, found: torch.Tensor, pattern: str, way: Way, *, under_load: bool
    ) -> None:
        """Compare uint8 [n] with uint8 [n], on the device that holds them."""
        self.rounds[under_load] += 1
        self.checked += expected.numel()
        if torch.equal(expected, found):
            return
        different = (expected != found).cpu()
        self.mismatching[under_load] += int(different.sum())
        if self.first is None:
            offset = int(different.to(torch.uint8).argmax())
            self.first = Mismatch(
                offset_bytes=offset,
                copy_bytes=expected.numel(),
                pattern=pattern,
                way=way,
                under_load=under_load,
                expected=int(expected[offset]),
                found=int(found[offset]),
            )

    def told(self, seconds: float) -> CopyCheck:
        """Everything, for the record."""
        return CopyCheck(
            largest_copy_bytes=self.largest,
            checked_bytes=self.checked,
            rounds=self.rounds[False],
            rounds_under_load=self.rounds[True],
            mismatching_bytes=sum(self.mismatching.values()),
            mismatching_bytes_under_load=self.mismatching[True],
            staged_mismatching_bytes=self.staged_mismatching,
            first_mismatch=self.first,
            seconds=seconds,
            gigabytes_per_second=_rate(self.largest, self._direct),
            staged_gigabytes_per_second=_rate(self.largest, self._staged),
            note="; ".join(self.notes) or None,
        )


def _rate(size: int, seconds: Sequence[float]) -> float | None:
    """Over all timed copies together."""
    total = sum(seconds)
    return size * len(seconds) / total / 1e9 if total > 0 else None


def ordered_pairs(places: Sequence[Place]) -> Iterator[tuple[Place, Place]]:
    """Every ordered pair of two places, neighbours first to last."""
    return ((one, other) for one in places for other in places if one != other)
