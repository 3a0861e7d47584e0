"""One row for each record: its name among the others, and the figures derived from it.

A value that was not observed is None. A value that is not finite is data: it is never dropped, and a
median over it is NaN.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

from bench.judge.headroom import Headroom, find_headroom
from bench.judge.labels import labels_of
from bench.judge.scaler import is_finite_step
from bench.judge.stability import Verdict, judge_stability, measured_steps
from bench.record.memory import BytesByKind, MemoryReading
from bench.record.schema import Record, Step

TRAINING_PHASES = ("forward", "backward", "optimizer_step")


@dataclass(frozen=True)
class DevicePeak:
    """Highest memory of one device over the forward, backward and optimizer phases."""

    device: str
    measure: Literal["reserved", "resident"]
    peak_bytes: int
    nvml_used_bytes: int | None


@dataclass(frozen=True, eq=False)
class Row:
    """One record with its derived figures. None: the run did not get that far, or it was not observed.

    A row equals itself only: it stands for one run.
    """

    record: Record
    label: str
    """The backend, told apart where one backend ran with different requests."""
    name: str
    """The label, with the repeat where the label has several runs."""
    verdict: Verdict
    measured_steps: int
    step_seconds_median: float | None
    step_seconds_min: float | None
    step_seconds_max: float | None
    tokens_per_second: float | None
    """Non-padding tokens of all measured steps over the seconds of all measured steps."""
    first_loss: float | None
    last_loss: float | None
    gradient_norm_median: float | None
    gradient_norm_max: float | None
    """The first value that is not finite, where there is one."""
    non_finite_steps: int | None
    skipped_updates: int | None
    load_seconds: float | None
    """None where the quantized model came from the cache: nothing was quantized."""
    reload_seconds: float | None
    """The load of a quantized model from the cache."""
    peak_by_device: tuple[DevicePeak, ...]
    peak_memory_bytes: int | None
    """Of the fullest device: that one decides whether a run fits."""
    steps_peak_reserved_bytes: int | None
    """Highest of all steps, where the phases were read in one step only."""
    tensor_bytes: Mapping[str, int | None]
    """Kind of tensor, as the record names it -> bytes on all devices."""
    storage_bits_per_weight: float | None
    effective_dtype: str | None
    headroom: Headroom | None
    """None: no step was probed."""
    lowest_headroom_bits: float | None
    """Of the finite cells; whether some were not finite, ``headroom.non_finite`` says."""
    gradient_cosine: float | None
    """Between the whole LoRA gradient and the reference's on one fixed batch."""
    words: dict[str, str] = field(default_factory=dict, repr=False)
    """Dotted path -> its value in words, once ``bench.judge.checks`` has read it in the record."""

    @property
    def repeat(self) -> int:
        """Which round of the experiment, from 0."""
        return self.record.request.repeat

    @property
    def requested_dtype(self) -> str:
        """The compute dtype that was asked for."""
        return self.record.request.dtype

    @property
    def completed(self) -> bool:
        """Whether the run came to its end."""
        return self.record.status == "completed"


def make_rows(records: Sequence[Record]) -> tuple[Row, ...]:
    """A row for each record, in the same order."""
    labels = labels_of(records)
    names = names_of(labels, [record.request.repeat for record in records])
    return tuple(make_row(*parts) for parts in zip(records, labels, names, strict=True))


def names_of(labels: Sequence[str], repeats: Sequence[int]) -> list[str]:
    """The label of each run, with its repeat where the label has several runs."""
    runs = Counter(labels)
    return [
        label if runs[label] == 1 else f"{label} (repeat {repeat})"
        for label, repeat in zip(labels, repeats, strict=True)
    ]


# ---- figures -------------------------------------------------------------------------------------


def make_row(record: Record, label: str, name: str) -> Row:
    """The figures of one record, under names that were given to it among the others."""
    measured = measured_steps(record)
    seconds = [step.seconds for step in measured]
    norms = [step.gradient_norm for step in measured]
    losses = [step_loss(step) for step in record.steps if step.losses]
    peaks = _device_peaks(record.memory.readings)
    headroom = find_headroom(record)
    lowest = headroom.lowest if headroom else None
    overall = record.fidelity.overall if record.fidelity else None
    return Row(
        record=record,
        label=label,
        name=name,
        verdict=judge_stability(record),
        measured_steps=len(measured),
        step_seconds_median=median(seconds),
        step_seconds_min=min(seconds, default=None),
        step_seconds_max=max(seconds, default=None),
        tokens_per_second=_tokens_per_second(measured),
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
        gradient_norm_median=median(norms),
        gradient_norm_max=_highest(norms),
        non_finite_steps=sum(not is_finite_step(step) for step in record.steps) if record.steps else None,
        skipped_updates=sum(not step.applied for step in record.steps) if record.steps else None,
        load_seconds=record.load.load_seconds if record.load and not record.load.from_cache else None,
        reload_seconds=record.load.reload_seconds if record.load else None,
        peak_by_device=peaks,
        peak_memory_bytes=largest(peak.peak_bytes for peak in peaks),
        steps_peak_reserved_bytes=largest(step.peak_reserved_bytes for step in record.steps),
        tensor_bytes=_tensor_bytes(record.memory.bytes_by_kind),
        storage_bits_per_weight=record.quantization.storage_bits_per_weight if record.quantization else None,
        effective_dtype=record.quantization.effective_dtype if record.quantization else None,
        headroom=headroom,
        lowest_headroom_bits=lowest.cell.bits if lowest else None,
        gradient_cosine=overall.cosine if overall else None,
    )


def step_loss(step: Step) -> float:
    """Mean over the micro-batches of a step."""
    return sum(step.losses) / len(step.losses)


def _device_peaks(readings: Sequence[MemoryReading]) -> tuple[DevicePeak, ...]:
    training = [reading for reading in readings if reading.phase in TRAINING_PHASES]
    # A host that fed a card reports resident memory too; that is no device's training peak.
    on_card = any(reading.peak_reserved_bytes is not None for reading in training)
    peaks = []
    for device in dict.fromkeys(reading.device for reading in training):
        own = [reading for reading in training if reading.device == device]
        peak = largest(r.peak_reserved_bytes if on_card else r.peak_resident_bytes for r in own)
        if peak is not None:
            measure: Literal["reserved", "resident"] = "reserved" if on_card else "resident"
            peaks.append(DevicePeak(device, measure, peak, largest(r.nvml_used_bytes for r in own)))
    return tuple(peaks)


def _tokens_per_second(steps: Sequence[Step]) -> float | None:
    seconds = sum(step.seconds for step in steps)
    return sum(step.tokens for step in steps) / seconds if seconds > 0 else None


def _tensor_bytes(kinds: Sequence[BytesByKind]) -> dict[str, int | None]:
    """Sum over the devices; None as soon as one device does not tell."""

    def total(name: str) -> int | None:
        known = [value for kind in kinds if (value := getattr(kind, name)) is not None]
        return sum(known) if kinds and len(known) == len(kinds) else None

    return {name: total(name) for name in BytesByKind.model_fields if name not in ("device", "rank")}


def median(values: Sequence[float]) -> float | None:
    """Median in which a NaN makes the whole NaN; ``statistics.median`` would sort it anywhere."""
    if not values:
        return None
    if any(math.isnan(value) for value in values):
        return math.nan
    ordered = sorted(values)
    middle = len(ordered) // 2
    if len(ordered) % 2:
        return ordered[middle]
    return (ordered[middle - 1] + ordered[middle]) / 2


def _highest(values: Sequence[float]) -> float | None:
    """The maximum, or the first value that is not finite: it outranks every number."""
    return next((value for value in values if not math.isfinite(value)), max(values, default=None))


def largest(values: Iterable[int | None]) -> int | None:
    """The largest of those that were observed."""
    return max((value for value in values if value is not None), default=None)
