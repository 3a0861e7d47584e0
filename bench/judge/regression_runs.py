"""The runs of one side of a comparison of two sets of records, each condensed as it is read.

``condense(records)`` keeps what BASE and NEW are compared by and lets go of the steps and their probes, which
are nearly all of a record: 5,000 of them fit into memory this way.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

from bench.judge.checks import WATCHING
from bench.judge.rows import Row, make_row
from bench.record.schema import Record

SILENT = frozenset({"interrupted"})
"""Outcomes that say nothing about the run."""
HEAVY = {"steps": (), "replay": None, "fidelity": None, "stderr_tail": None, "preflight": None}
"""Parts of a record that no figure is read from once its row is made, and what takes their place. The one
condition that stands in the steps (`WATCHING`) is read before they go."""


@dataclass(frozen=True, eq=False)
class Run:
    """One record, condensed."""

    row: Row
    """Its figures; the record in it has no steps any more, and the row no headroom but its lowest value."""
    last_step_bytes: int | None
    """Device memory of the last step: reserved at most on CUDA, resident on a CPU. A leak shows here, for the
    phases are read in one early step."""
    weight_error: float | None
    """Mean of the relative Frobenius errors of the projections' weights; None: there was no reference."""

    @property
    def record(self) -> Record:
        """The record without its steps."""
        return self.row.record

    @property
    def completed(self) -> bool:
        """Whether the run came to its end."""
        return self.row.completed


def condense(records: Iterable[Record]) -> tuple[Run, ...]:
    """A run for each record, in the order of their start; ``records`` may come one at a time."""
    return tuple(sorted(map(_run, records), key=lambda run: (run.record.started_at, run.record.key)))


def _run(record: Record) -> Run:
    row = make_row(record, "", "")
    last = record.steps[-1] if record.steps else None
    memory = None
    if last is not None:
        reserved = last.peak_reserved_bytes
        memory = last.resident_bytes if reserved is None else reserved
    errors = [error.relative_error for error in record.fidelity.weight_errors] if record.fidelity else []
    watching = WATCHING.read(row)
    lora = record.lora.model_copy(update={"names": ()}) if record.lora else None
    light = record.model_copy(update={**HEAVY, "lora": lora})
    return Run(
        row=replace(row, record=light, headroom=None, words={WATCHING.path: watching}),
        last_step_bytes=memory,
        weight_error=sum(errors) / len(errors) if errors else None,
    )
