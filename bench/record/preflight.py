"""What was found about the cards before anything was measured on them: the preflight of a CUDA run.

Made once a command by ``bench.run.preflight`` and kept in the record of each of its runs. What NVML or the
system would not tell is null.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from bench.record.recorded import Bytes, Recorded, Seconds

HOST = "host"
"""The name of the machine's own memory, as the end of a copy."""


class ForeignProcess(Recorded):
    """A process that used a card before anything of ours ran."""

    pid: int
    """As the driver counts: in a container another number than inside."""
    kind: Literal["compute", "graphics"]
    used_bytes: Bytes | None = None
    """Null where the driver tells none, as for processes of another container."""
    name: str | None = None


class CardState(Recorded):
    """What changes with the work on a card."""

    temperature_celsius: int | None = None
    power_watts: float | None = None
    sm_clock_mhz: int | None = None
    """Of the multiprocessors."""
    memory_clock_mhz: int | None = None
    pcie_generation: int | None = None
    """Lower than the card can while it idles: that saves power."""
    pcie_width: int | None = None
    """Lanes in use."""
    throttle_reasons: tuple[str, ...] | None = None
    """Why the clocks are not higher, in words."""


class Mismatch(Recorded):
    """The first byte that arrived changed."""

    offset_bytes: int
    """Within the copy."""
    copy_bytes: Bytes
    """Size of that copy."""
    pattern: str
    """What was copied."""
    way: Literal["copy engine", "kernel"]
    """What copied it."""
    under_load: bool
    """Whether the cards were busy."""
    expected: int
    """The byte, 0 to 255."""
    found: int
    """The byte that arrived, 0 to 255."""


class CopyCheck(Recorded):
    """Copies from one end to the other, each compared bit by bit with what it should be."""

    largest_copy_bytes: Bytes
    """Of one copy."""
    checked_bytes: Bytes
    """Compared in all."""
    rounds: int
    """Copies compared while the cards had nothing else to do."""
    rounds_under_load: int
    """Copies compared while they multiplied matrices and copied the other way."""
    mismatching_bytes: Bytes
    """That arrived changed."""
    mismatching_bytes_under_load: Bytes
    """Of those above."""
    staged_mismatching_bytes: Bytes = 0
    """Bytes that were changed on their way from the card to the host already."""
    first_mismatch: Mismatch | None = None
    """Null: none arrived changed."""
    seconds: Seconds
    gigabytes_per_second: float | None = None
    """Of the largest copies without load, as measured; 1 GB is 10**9 bytes."""
    staged_gigabytes_per_second: float | None = None
    """The same data over the host: both parts of the way together, without getting the host's memory (records
    of before 28 November 2026: with it, which took most of the time)."""
    note: str | None = None
    """What could not be done as meant."""

    @property
    def corrupt(self) -> bool:
        """Whether any byte arrived changed."""
        return bool(self.mismatching_bytes or self.staged_mismatching_bytes)


class CardFindings(Recorded):
    """One card, as found before anything of ours ran on it."""

    device: str
    """As torch names it: cuda:0."""
    name: str
    uuid: str | None = None
    nvml_index: int | None = None
    """Its number in nvidia-smi."""
    pci_bus_id: str | None = None
    total_bytes: Bytes | None = None
    free_bytes: Bytes | None = None
    used_bytes: Bytes | None = None
    """By other processes; without the driver's own share where that can be told apart."""
    processes: tuple[ForeignProcess, ...] | None = None
    """Null: the driver would not tell."""
    power_limit_watts: float | None = None
    default_power_limit_watts: float | None = None
    max_power_limit_watts: float | None = None
    pcie_max_generation: int | None = None
    """What card and slot can both do."""
    pcie_max_width: int | None = None
    ecc: bool | None = None
    uncorrected_ecc_errors: int | None = None
    """Since the driver was loaded."""
    idle: CardState = CardState()
    busy: CardState | None = None
    """While it multiplied matrices."""
    host_copies: CopyCheck | None = None
    """From the host to the card and back."""


class PairFindings(Recorded):
    """One ordered pair of cards."""

    source: str
    """As torch names it: cuda:0."""
    target: str
    """Another one."""
    peer_access: bool | None = None
    """Whether the driver says that the cards reach each other's memory."""
    nvlinks: int | None = None
    """NVLink connections between the two; null where that cannot be told."""
    link: str | None = None
    """The way between them, in words."""
    copies: CopyCheck | None = None


class Preflight(Recorded):
    """Everything found, and what it means."""

    status: Literal["completed", "failed", "skipped"]
    message: str | None = None
    """Why it is not completed, in one line. What was found before stands."""
    started_at: str
    """UTC, ISO 8601."""
    seconds: Seconds
    """Of the whole look."""
    driver: str | None = None
    """Its version."""
    visible_devices: str | None = None
    """CUDA_VISIBLE_DEVICES."""
    cards: tuple[CardFindings, ...] = ()
    pairs: tuple[PairFindings, ...] = ()
    warnings: tuple[str, ...] = ()
    """Each with what to do about it."""
    stopped: str | None = None
    """Why no run was started, where none was."""

    def corrupt(self) -> Iterator[tuple[str, str, CopyCheck]]:
        """Source, target and findings of every way on which a byte arrived changed."""
        for card in self.cards:
            if card.host_copies and card.host_copies.corrupt:
                yield HOST, card.device, card.host_copies
        for pair in self.pairs:
            if pair.copies and pair.copies.corrupt:
                yield pair.source, pair.target, pair.copies

    @property
    def corrupt_pairs(self) -> tuple[tuple[str, str], ...]:
        """Source and target of every way on which a byte arrived changed."""
        return tuple((source, target) for source, target, _ in self.corrupt())
