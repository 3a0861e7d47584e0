"""The lines of a forecast: what the records of the slices hold, and the straight lines through it.

    lines_of(question, repeats, planned)

Tensor bytes are exactly straight. A peak is not quite: in a deep model the fullest moment of a phase may be
another one. ``planned`` holds every phase by arithmetic at every depth, so the plan's own departure from a
straight line is added:

    forecast(L) = line(measured at the slices)(L) + [planned(L) - line(planned at the slices)(L)]
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.judge.rows import TRAINING_PHASES, largest
from bench.judge.straight_line import Number, Round, medians, resampled, spread, step_line, through
from bench.record.depths import Repeat
from bench.record.forecast import Group, Line
from bench.record.memory import MemoryReading
from bench.record.schema import Record

PHASES = ("loaded", "attached", *TRAINING_PHASES)
HIGHEST = "highest"
"""Name of the peak line over the three phases of a step: what decides whether a training fits."""
RESERVED = "_reserved"
"""Ends the names of the lines of what CUDA's allocator took, beside those of the tensors in it."""
KINDS = (
    "quantized_weights",
    "quantization_metadata",
    "unquantized_weights",
    "lora",
    "gradients",
    "optimizer_state",
)
"""Kinds of tensors, as a record's ``bytes_by_kind`` names them."""

Planned = Mapping[int, Mapping[str, int]]
"""Depth -> peak line -> bytes by arithmetic, the allowance left out."""


@dataclass(frozen=True)
class Question:
    """What is forecast from what."""

    backend: str
    slices: tuple[int, ...]
    full_layers: int
    subsets: tuple[tuple[int, ...], ...] = ()
    """Sets of slices from which the forecast is made once more for each repeat, where the full depth ran."""


def lines_of(question: Question, repeats: Sequence[Repeat], planned: Planned | None) -> tuple[Line, ...]:
    """Every line, in the order of the groups. A line that nothing was observed for is left out."""
    lines = [
        *(_line(question, "weights", kind, tables_of(repeats, _tensor_bytes, kind)) for kind in KINDS),
        *(
            _line(question, "peak", name, tables_of(repeats, peaks, name), _planned_at(planned, name))
            for name in _peak_names(repeats)
        ),
        _line(question, "load", "load", tables_of(repeats, _load_seconds, "load")),
        _step_line(question, repeats),
    ]
    return tuple(line for line in lines if any(value is not None for value in line.at_slices))


Table = Mapping[int, Number]
"""Of one repeat: depth -> what was observed there."""
Read = Mapping[str, Number | None]
"""Of one record: name of a line -> what was observed."""


def tables_of(repeats: Sequence[Repeat], read: Callable[[Record], Read], name: str) -> list[Table]:
    """What ``read`` finds under ``name``, repeat by repeat, in the runs that completed."""
    tables: list[Table] = []
    for repeat in repeats:
        completed = {d: read(r).get(name) for d, r in repeat.records.items() if r.status == "completed"}
        tables.append({depth: value for depth, value in completed.items() if value is not None})
    return tables


def _line(
    question: Question, group: Group, name: str, tables: Sequence[Table], planned: Table | None = None
) -> Line:
    slices, full = question.slices, question.full_layers
    at = typical(tables, slices)
    line = through(at)
    correction = _correction(planned, tuple(at), full)
    predicted = None if line is None else line.at(full) + correction
    low = high = None
    # Tensor bytes have no spread: what every repeat counts is the same.
    if group != "weights" and predicted is not None:
        whole_tables = [table for table in tables if set(slices) <= set(table)]
        lines = [through({depth: table[depth] for depth in slices}) for table in whole_tables]
        half = spread([float(one.at(full)) for one in lines if one])
        if half is not None:
            # A straight line knows nothing of what is measured: seconds and bytes end at zero.
            low, high = max(float(predicted) - half, 0.0), float(predicted) + half
    measured = typical(tables, (full,)).get(full)
    return Line(
        name=name,
        group=group,
        unit="seconds" if group == "load" else "bytes",
        at_slices=tuple(_float(at.get(depth)) for depth in slices),
        per_layer=_float(line.per_layer if line else None),
        fixed=_float(line.fixed if line else None),
        correction=float(correction),
        predicted=_float(predicted),
        low=low,
        high=high,
        measured=_float(measured),
    )


def _step_line(question: Question, repeats: Sequence[Repeat]) -> Line:
    slices, full = question.slices, question.full_layers
    of_repeats = [repeat.times.rounds() for repeat in repeats if repeat.times]
    rounds = [of_round for rounds in of_repeats for of_round in rounds]
    at = medians(rounds, slices)
    line = step_line(rounds, slices)

    def forecast(drawn: Sequence[Round]) -> float | None:
        one = step_line(drawn, slices)
        return None if one is None else float(one.at(full))

    interval = resampled(of_repeats, forecast) if line else None
    return Line(
        name="step",
        group="step",
        unit="seconds",
        at_slices=tuple(at.get(depth) for depth in slices),
        per_layer=_float(line.per_layer if line else None),
        fixed=_float(line.fixed if line else None),
        predicted=_float(line.at(full) if line else None),
        low=interval[0] if interval else None,
        high=interval[1] if interval else None,
        measured=medians(rounds, (full,)).get(full),
    )


def _correction(planned: Table | None, slices: Sequence[int], full: int) -> Number:
    """Planned at the full depth, less the straight line through the plan at the slices."""
    if planned is None:
        return 0
    line = through({depth: planned[depth] for depth in slices})
    return 0 if line is None else planned[full] - line.at(full)


def _planned_at(planned: Planned | None, name: str) -> Table | None:
    """The plan of one peak line over the depth; None: the plan has no such line."""
    name = name.removesuffix(RESERVED)
    if planned is None or any(name not in phases for phases in planned.values()):
        return None
    return {depth: phases[name] for depth, phases in planned.items()}


def typical(tables: Sequence[Table], depths: Sequence[int]) -> dict[int, Number]:
    """The median over the repeats at each depth where something was observed."""
    found: dict[int, Number] = {}
    for depth in depths:
        values = [table[depth] for table in tables if depth in table]
        if values:
            # Equal whole numbers stay whole, which halves of their sum would not.
            found[depth] = values[0] if len(set(values)) == 1 else statistics.median(map(float, values))
    return found


def _float(value: Number | None) -> float | None:
    return None if value is None else float(value)


# ---- what the records hold -----------------------------------------------------------------------


def _tensor_bytes(record: Record) -> Read:
    """Kind of tensor -> bytes over the devices; None as soon as one of them does not tell."""
    found: dict[str, Number | None] = {}
    for kind in KINDS:
        values = [getattr(one, kind) for one in record.memory.bytes_by_kind]
        found[kind] = None if not values or None in values else sum(values)
    return found


def peaks(record: Record) -> Read:
    """Peak line -> bytes of the fullest device."""
    readings = record.memory.readings
    on_card = any(reading.peak_allocated_bytes is not None for reading in readings)
    if not on_card:
        return _phases(readings, "peak_resident_bytes", "")
    return {
        **_phases(readings, "peak_allocated_bytes", ""),
        **_phases(readings, "peak_reserved_bytes", RESERVED),
    }


def _phases(readings: Sequence[MemoryReading], field: str, ending: str) -> dict[str, Number | None]:
    highest = {
        phase: largest(getattr(reading, field) for reading in readings if reading.phase == phase)
        for phase in PHASES
    }
    found: dict[str, Number | None] = {f"{phase}{ending}": peak for phase, peak in highest.items()}
    found[f"{HIGHEST}{ending}"] = largest(highest[phase] for phase in TRAINING_PHASES)
    return found


def _peak_names(repeats: Sequence[Repeat]) -> list[str]:
    records = [record for repeat in repeats for record in repeat.records.values()]
    return list(dict.fromkeys(name for record in records for name in peaks(record)))


def _load_seconds(record: Record) -> Read:
    # A load from the cache is another quantity: nothing was quantized.
    return {"load": record.load.load_seconds if record.load and not record.load.from_cache else None}
