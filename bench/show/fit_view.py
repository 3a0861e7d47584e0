"""Memory of each card of each run against the card's size, for the section "Will it fit, how fast".

``uses_of(comparison)`` takes one run of each kind apart, card by card: exact bytes of its tensors, what else
its peak was, and what the card has left. ``card_plots`` draws it, ``page_fit.html`` and ``fit_markdown``
write it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from bench.judge.comparison import Comparison
from bench.judge.rows import Row, largest
from bench.record.memory import BytesByKind, MemoryReading
from bench.record.schema import Record
from bench.show.columns import MISSING, gib
from bench.show.memory_plots import KINDS
from bench.show.runs_shown import runs_shown
from bench.show.wording import ended

CPU = "cpu"
KINDS_IN: Mapping[str, tuple[str, ...]] = {
    "loaded": ("quantized_weights", "quantization_metadata", "unquantized_weights"),
    "attached": ("quantized_weights", "quantization_metadata", "unquantized_weights", "lora"),
}
"""Phase -> the kinds of tensors that exist in it; every kind in a phase of a step."""
ON_CARD = (
    "On a card, a peak is what the allocator reserved from the driver in the fullest phase. The CUDA context "
    "comes on top, and so does whatever else runs there: the driver's figure has both in it."
)
ON_CPU = (
    "Runs on a CPU: their figures are resident memory of a whole process, interpreter and libraries "
    "included, against the memory of the machine. They say nothing of a card."
)
SHARED_MEMORY = "Processes and logical devices of one machine share its memory: their figures add up."


@dataclass(frozen=True)
class CardUse:
    """One device of one process of a run, in its fullest phase."""

    name: str
    """Such as cuda:3, with the rank of its process where there are several."""
    hardware: str | None
    capacity_bytes: int | None
    """Memory of the card, or of the machine; None: not recorded."""
    peak_bytes: int
    phase: str
    parts: Mapping[str, int]
    """Kind of tensor -> exact bytes, of the kinds that exist in that phase; empty: not counted."""
    driver_bytes: int | None
    """In use as the driver saw it, other processes included."""

    @property
    def counted_bytes(self) -> int | None:
        """Of all counted tensors."""
        return sum(self.parts.values()) if self.parts else None

    @property
    def rest_bytes(self) -> int | None:
        """The peak above the counted tensors. None: they were not counted, or the peak is not above them, as
        happens where pages of a process were not resident."""
        counted = self.counted_bytes
        return None if counted is None or counted > self.peak_bytes else self.peak_bytes - counted

    @property
    def room(self) -> str:
        """What the device has left, in GiB and of its size."""
        return room_in_words(self.peak_bytes, self.capacity_bytes)


@dataclass(frozen=True)
class RunUse:
    """The devices of one run."""

    row: Row
    name: str
    """The run's label, with its outcome where it did not complete."""
    on_card: bool
    cards: tuple[CardUse, ...]

    @property
    def fullest(self) -> CardUse:
        """The device with least room, or with the highest peak where sizes are not known."""
        return max(self.cards, key=lambda card: card.peak_bytes - (card.capacity_bytes or 0))


def uses_of(comparison: Comparison) -> tuple[RunUse, ...]:
    """One run of each label, in the order of the labels: of its repeats that completed, the fullest."""
    chosen: dict[str, RunUse] = {}
    for row in runs_shown(comparison):
        found = _use(row)
        if found is None:
            continue
        before = chosen.get(row.label)
        if before is None or _rank(found) > _rank(before):
            chosen[row.label] = found
    return tuple(chosen.values())


def room_in_words(peak_bytes: int, capacity_bytes: int | None) -> str:
    """What is left of a card's memory: 15.4 GiB, 64 %."""
    if not capacity_bytes:
        return MISSING
    left = capacity_bytes - peak_bytes
    if left < 0:
        return f"{gib(-left)} GiB too little"
    return f"{gib(left)} GiB, {100 * left / capacity_bytes:.0f} %"


def notes_on(uses: Sequence[RunUse]) -> tuple[str, ...]:
    """What must be said of the figures before they are read."""
    shared = any(not use.on_card and len(use.cards) > 1 for use in uses)
    return (
        *((ON_CARD,) if any(use.on_card for use in uses) else ()),
        *((ON_CPU,) if any(not use.on_card for use in uses) else ()),
        *((SHARED_MEMORY,) if shared else ()),
    )


def fullest_in_words(use: RunUse) -> str:
    """The fullest device of a run in one clause."""
    card = use.fullest
    size = "" if card.capacity_bytes is None else f" of {gib(card.capacity_bytes)}"
    left = "" if card.capacity_bytes is None else f", room: {card.room}"
    place = f" on {card.name}" if len(use.cards) > 1 else ""
    return f"{use.name}: {gib(card.peak_bytes)}{size} GiB{place}{left}"


# ---- from the record -----------------------------------------------------------------------------


def _rank(use: RunUse) -> tuple[bool, int]:
    return use.row.completed, use.fullest.peak_bytes


def _use(row: Row) -> RunUse | None:
    record = row.record
    on_card = any(reading.peak_reserved_bytes is not None for reading in record.memory.readings)
    readings: dict[tuple[int | None, str], list[MemoryReading]] = {}
    for reading in record.memory.readings:
        # A host that fed a card reports resident memory too; that is no card's.
        if _peak(reading, on_card=on_card) is not None:
            readings.setdefault(_place(reading), []).append(reading)
    if not readings:
        return None
    cards = tuple(_card(record, place, of_place, on_card=on_card) for place, of_place in readings.items())
    return RunUse(row, ended(row.label, row), on_card, cards)


def _card(
    record: Record, place: tuple[int | None, str], readings: Sequence[MemoryReading], *, on_card: bool
) -> CardUse:
    rank, device = place
    fullest = max(readings, key=lambda reading: _peak(reading, on_card=on_card) or 0)
    kinds = [kind for kind in record.memory.bytes_by_kind if _place(kind) == place]
    environment = record.environment
    known = (
        next((d for d in environment.devices if _device(d.device) == device), None) if environment else None
    )
    return CardUse(
        name=device if rank is None else f"rank {rank}, {device}",
        hardware=known.name if known else None,
        capacity_bytes=known.total_memory_bytes if known else None,
        peak_bytes=_peak(fullest, on_card=on_card) or 0,
        phase=fullest.phase,
        parts=_parts(kinds, fullest.phase),
        driver_bytes=largest(reading.nvml_used_bytes for reading in readings),
    )


def _parts(kinds: Sequence[BytesByKind], phase: str) -> dict[str, int]:
    """Kind -> bytes; a kind that was not counted is left out."""
    found = {}
    for name in KINDS_IN.get(phase, tuple(KINDS)):
        sizes = [size for kind in kinds if (size := getattr(kind, name)) is not None]
        if sizes:
            found[name] = sum(sizes)
    return found


def _place(item: MemoryReading | BytesByKind) -> tuple[int | None, str]:
    return item.rank, _device(item.device)


def _device(name: str) -> str:
    """Logical devices of a CPU are one process and one memory."""
    return CPU if name.partition(":")[0] == CPU else name


def _peak(reading: MemoryReading, *, on_card: bool) -> int | None:
    return reading.peak_reserved_bytes if on_card else reading.peak_resident_bytes
