"""The forecast of one backend: from what its slices measured to the full depth.

    backend_forecast(question, repeats, planned, outlooks)

The lines themselves are in ``bench.judge.forecast_lines``.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Literal

from bench.judge.forecast_lines import HIGHEST, Planned, Question, lines_of, peaks, tables_of, typical
from bench.judge.forecast_notes import failures_of, notes_of
from bench.judge.rows import TRAINING_PHASES
from bench.judge.straight_line import Straight, through
from bench.record.depths import Repeat
from bench.record.forecast import BackendForecast, CardOutlook, Check, Line, StepSeconds
from bench.record.schema import Record

__all__ = ["HIGHEST", "backend_forecast", "excess", "peak_memory", "whole"]


def backend_forecast(
    question: Question,
    repeats: Sequence[Repeat],
    planned: Planned | None,
    outlooks: Sequence[CardOutlook] = (),
) -> BackendForecast:
    """Everything that the repeats say of the full depth.

    ``planned``: None where the shapes of the model are not known to the arithmetic; peaks are then straight
    lines. Repeats in which a slice did not complete give no value; where that is all of them, the forecast is
    a message.
    """
    complete = whole(question, repeats)
    failed = tuple(failures_of(repeats))
    records = [record for repeat in repeats for record in repeat.records.values()]
    full = [repeat.records[question.full_layers] for repeat in complete if _has_full(question, repeat)]
    common = BackendForecast(
        backend=question.backend,
        effective_dtype=next((r.quantization.effective_dtype for r in records if r.quantization), None),
        slices=question.slices,
        slice_keys=tuple(
            record.key
            for repeat in repeats
            for depth, record in repeat.records.items()
            if depth in question.slices
        ),
        outlooks=tuple(outlooks),
        failures=failed,
    )
    if not complete:
        message = failed[0] if failed else "no slice was run"
        return common.model_copy(update={"message": message, "lines": _no_lines(question, repeats)})
    return common.model_copy(
        update={
            "full_key": full[0].key if full else None,
            "full_keys": tuple(record.key for record in full),
            "lines": lines_of(question, complete, planned),
            "tokens_per_step": next((r.times.tokens_per_step for r in complete if r.times), None),
            "notes": tuple(dict.fromkeys([*notes_of(question, complete), *_without_plan(planned)])),
            "step_seconds": tuple(
                StepSeconds(
                    repeat=repeat.index,
                    warmup_rounds=repeat.times.turns.warmup_rounds,
                    seconds=repeat.times.seconds,
                )
                for repeat in complete
                if repeat.times
            ),
            "checks": tuple(_checks(question, complete, planned)),
        }
    )


def whole(question: Question, repeats: Iterable[Repeat]) -> list[Repeat]:
    """The repeats in which every slice completed."""
    return [
        repeat
        for repeat in repeats
        if all(d in repeat.records and repeat.records[d].status == "completed" for d in question.slices)
    ]


def excess(question: Question, repeats: Sequence[Repeat], planned: Planned | None) -> dict[str, Straight]:
    """For each phase of a step, by how many bytes the measured peak lies above the planned one, as a line
    over the depth: what ``bench.run.outlooks`` adds to each card's plan. Empty where either is not known."""
    found = {}
    complete = whole(question, repeats)
    for phase in TRAINING_PHASES if planned else ():
        assert planned is not None
        values = typical(tables_of(complete, peaks, phase), question.slices)
        if set(values) == set(question.slices):
            line = through({depth: value - planned[depth][phase] for depth, value in values.items()})
            if line:
                found[phase] = line
    return found


def peak_memory(records: Iterable[Record]) -> Literal["peak_resident_bytes", "peak_allocated_bytes"] | None:
    """What the peak lines are made of."""
    readings = [reading for record in records for reading in record.memory.readings]
    if any(reading.peak_allocated_bytes is not None for reading in readings):
        return "peak_allocated_bytes"
    return "peak_resident_bytes" if readings else None


def _has_full(question: Question, repeat: Repeat) -> bool:
    record = repeat.records.get(question.full_layers)
    return record is not None and record.status == "completed"


def _checks(question: Question, repeats: Sequence[Repeat], planned: Planned | None) -> Iterable[Check]:
    for slices in question.subsets:
        for repeat in repeats:
            if _has_full(question, repeat):
                lines = lines_of(replace(question, slices=slices), [repeat], planned)
                yield Check(slices=slices, repeat=repeat.index, lines=lines)


def _no_lines(question: Question, repeats: Sequence[Repeat]) -> tuple[Line, ...]:
    """What the slices that did complete measured, without a line through it."""
    observed = lines_of(question, repeats, None)
    nothing = dict.fromkeys(("per_layer", "fixed", "predicted", "low", "high"))
    return tuple(line.model_copy(update=nothing) for line in observed)


def _without_plan(planned: Planned | None) -> Iterable[str]:
    if planned is None:
        yield "the arithmetic does not know this model's shapes: peaks are straight lines without correction"
