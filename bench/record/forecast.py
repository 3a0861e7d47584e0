"""The forecast of a whole model from a few of its layers: what was measured, the line through it, the answer.

Written by ``qlora-bench forecast`` as ``forecast.json`` beside the records of the slices, so that the report
can show it from the folder alone. Every slice in it is an ordinary record, named by its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import field_validator

from bench.record.recorded import Bytes, Recorded, Seconds
from bench.record.store import read_document
from bench.record.writing import write_atomically

FORECAST_VERSION: Final = 1
FILE_NAME = "forecast.json"

Group = Literal["weights", "peak", "load", "step"]
"""``weights``: bytes of tensors by kind; ``peak``: memory of a phase; ``load`` and ``step``: seconds."""


class Line(Recorded):
    """One quantity over the number of decoder layers: what the slices gave, and what it comes to."""

    name: str
    """Such as "quantized_weights", "backward" or "step"; unique within its group."""
    group: Group
    unit: Literal["bytes", "seconds"]
    at_slices: tuple[float | None, ...]
    """Measured, in the order of `BackendForecast.slices`; the median where there are repeats; null: not
    observed."""
    per_layer: float | None
    """Slope of the line; null: too few slices were measured to draw one."""
    fixed: float | None
    """The line at no layers at all."""
    correction: float = 0.0
    """What arithmetic says the quantity departs from a straight line at the full depth, already in
    ``predicted``: the fullest moment of a phase may be another one in a deep model."""
    predicted: float | None
    """At the full depth."""
    low: float | None = None
    high: float | None = None
    """A 95 % interval of ``predicted``, from the spread of the measured steps and runs; null: one value at
    each slice gives none."""
    measured: float | None = None
    """At the full depth, where that was run too."""

    @property
    def error(self) -> float | None:
        """predicted / measured - 1; None where the full depth was not run."""
        if self.predicted is None or not self.measured:
            return None
        return self.predicted / self.measured - 1


class StepSeconds(Recorded):
    """The optimizer steps that one process timed, depth by depth in turns."""

    repeat: int
    warmup_rounds: int
    """Leading rounds, which no statistic takes in."""
    seconds: Mapping[int, tuple[float | None, ...]]
    """Decoder layers -> seconds of the step in each round, the warm-up's first; null: not its turn (the full
    depth is timed in every second round only)."""


class Check(Recorded):
    """The forecast made again from some of the slices of one repeat, beside what that repeat measured."""

    slices: tuple[int, ...]
    repeat: int
    lines: tuple[Line, ...]


class CardOutlook(Recorded):
    """One backend at the full depth on one set of cards."""

    cards: str
    """As a person reads it: 7x24GB."""
    card_count: int
    capacity_bytes: Bytes
    """Of one card."""
    sequence_length: int
    fits: bool | None
    """Null: the backend cannot train this model, see ``reason``."""
    longest_sequence: int | None
    peak_bytes: tuple[Bytes, ...] = ()
    """Of each card, in order."""
    basis: Literal["measured", "arithmetic"]
    """``measured``: peaks of a CUDA card at the slices, carried to the full depth; ``arithmetic``: the slices
    ran where there is no CUDA memory to measure, so the peaks are those of ``qlora-bench plan``."""
    reason: str | None = None


class BackendForecast(Recorded):
    """One backend."""

    backend: str
    effective_dtype: str | None
    slices: tuple[int, ...]
    """Numbers of decoder layers that were run."""
    slice_keys: tuple[str, ...]
    """Keys of their records, repeats included."""
    full_key: str | None = None
    """Key of the record of the full depth, where that was run too."""
    lines: tuple[Line, ...] = ()
    outlooks: tuple[CardOutlook, ...] = ()
    tokens_per_step: int | None = None
    message: str | None = None
    """Why there is no forecast, where there is none: what a slice ended with."""
    notes: tuple[str, ...] = ()
    full_keys: tuple[str, ...] = ()
    """Keys of all records of the full depth, ``full_key`` the first of them."""
    step_seconds: tuple[StepSeconds, ...] = ()
    """Raw, one entry for each repeat; the step line is derived from them."""
    checks: tuple[Check, ...] = ()
    """With ``--verify``: for each set of slices and each repeat by itself."""
    failures: tuple[str, ...] = ()
    """Runs that did not complete, a sentence each. There may be a forecast from the others."""

    def line(self, group: Group, name: str) -> Line | None:
        """One line by its name."""
        return next((line for line in self.lines if (line.group, line.name) == (group, name)), None)


class Forecast(Recorded):
    """Every backend of one forecast."""

    forecast_version: Literal[1] = FORECAST_VERSION
    command: str
    """The command line that repeats it."""
    model: str
    weights: Literal["real", "synthetic"]
    full_layers: int
    """Decoder layers of the whole model."""
    asked: Mapping[str, Any]
    """What all slices share: preset, dtype, attention, checkpointing, workload, lora."""
    device: str
    """Name of the device that was measured."""
    repeats: int
    backends: tuple[BackendForecast, ...]
    assumptions: tuple[str, ...]
    """What the answer rests on, a sentence or two each."""
    ended_at: str
    """UTC, ISO 8601."""
    wall_seconds: Seconds
    peak_memory: Literal["peak_resident_bytes", "peak_allocated_bytes"] | None = None
    """What the lines of the group "peak" are, by its name in a record's memory readings: resident memory of
    the process on a CPU; tensors in torch's allocator on CUDA, where lines named "..._reserved" hold what the
    allocator took. Null: nothing was measured."""

    @field_validator("asked")
    @classmethod
    def _of_known_shape(cls, asked: Mapping[str, Any]) -> Mapping[str, Any]:
        """Free in what it holds, but for the parts that are looked into when it is told in words."""
        for name in ("workload", "lora"):
            if not isinstance(asked.get(name, {}), Mapping):
                raise ValueError(f"'{name}' must be a mapping of settings")
        if not isinstance(asked.get("lora", {}).get("target_modules", []), list | tuple):
            raise ValueError("'lora.target_modules' must be a list")
        return asked

    @property
    def slice_keys(self) -> frozenset[str]:
        """Keys of the runs that only the forecast is about; the full depth's run stands for itself."""
        return frozenset(key for backend in self.backends for key in backend.slice_keys)


def save_forecast(folder: Path, forecast: Forecast) -> Path:
    """Write ``forecast.json`` into ``folder``, whole or not at all."""
    return write_atomically(folder / FILE_NAME, forecast.model_dump_json(indent=1) + "\n")


def forecasts_below(folder: Path) -> list[Forecast]:
    """Every forecast in the folder and below it. Raises BrokenFile as `read_forecast` does."""
    found = (read_forecast(path.parent) for path in sorted(folder.rglob(FILE_NAME)))
    return [forecast for forecast in found if forecast is not None]


def read_forecast(folder: Path) -> Forecast | None:
    """The forecast in ``folder``; None: there is none. Raises BrokenFile, naming the first thing wrong."""
    return read_document(folder / FILE_NAME, Forecast, "a forecast")
