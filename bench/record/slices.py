"""What a slice of a plan was cut from: every run of the whole plan, and whose it is.

``qlora-bench run --shard I/N`` writes it as ``slice.json`` beside its records before the first run;
``bench.record.joining`` finds with it what is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import Field

from bench.ask.plan import RunRequest
from bench.ask.slices import Slice, deal
from bench.record.recorded import Recorded
from bench.record.store import read_document
from bench.record.writing import write_atomically

SLICE_VERSION: Final = 1
FILE_NAME = "slice.json"


class PlannedRun(Recorded):
    """One run of the plan."""

    key: str
    """Of its record."""
    command: str
    """The command line that makes it."""


class PlanSlice(Recorded):
    """One slice, and the plan that it is of."""

    slice_version: Literal[1] = SLICE_VERSION
    place: Annotated[int, Field(ge=1)]
    """Which slice, from 1."""
    slices: tuple[tuple[PlannedRun, ...], ...]
    """Every slice of the plan, this one included."""

    @property
    def count(self) -> int:
        """How many slices the plan has."""
        return len(self.slices)

    @property
    def keys(self) -> frozenset[str]:
        """Of every run of the plan."""
        return frozenset(run.key for part in self.slices for run in part)


def save_slice(folder: Path, own: Slice, plan: Sequence[RunRequest]) -> Path:
    """Write ``slice.json`` into ``folder``, whole or not at all; ``plan``: of all slices."""
    slices = tuple(
        tuple(PlannedRun(key=request.key, command=request.command) for request in part)
        for part in deal(plan, own.count)
    )
    document = PlanSlice(place=own.place, slices=slices)
    return write_atomically(folder / FILE_NAME, document.model_dump_json(indent=1) + "\n")


def slices_below(folder: Path) -> list[PlanSlice]:
    """Every slice in the folder and below it. Raises BrokenFile, naming the first thing wrong."""
    found = (read_document(path, PlanSlice, "a slice of a plan") for path in sorted(folder.rglob(FILE_NAME)))
    return [document for document in found if document is not None]
