"""Lists of facts on the page: the environments of the runs, and the cells of the main table."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from bench.judge.checks import NOT_RECORDED
from bench.judge.conditions import ConditionValue
from bench.judge.groups import FIGURES
from bench.judge.rows import Row
from bench.show.columns import Column, Line, gib
from bench.show.page_top import count
from bench.show.preflight import preflight_facts


@dataclass(frozen=True)
class Cell:
    """One cell of the main table."""

    text: str
    range: str
    """Lowest and highest run beside a median, empty where there is one run."""
    value: str
    """What it is sorted by, empty where there is nothing to sort by."""
    mark: str
    """Where it is first: its rank, or "lowest" or "highest" where nothing is ranked; else empty."""


@dataclass(frozen=True)
class Fact:
    """One entry of a list of facts: a name, and what was found, with who where it differs."""

    name: str
    values: tuple[ConditionValue, ...]


def make_cell(column: Column, line: Line) -> Cell:
    """The cell of one line in one column."""
    value = column.number(line)
    # A value that is not finite has no place in an order: it is sorted last, like a missing one.
    sortable = repr(value) if value is not None and math.isfinite(value) else ""
    field = column.field
    rank = line.ranks.get(field) if field else None
    mark = (f"rank {rank}" if rank else FIGURES[field]) if field and field in line.best else None
    text, _, beside = column.text(line).partition(" (") if column.numeric else (column.text(line), "", "")
    return Cell(text, beside.rstrip(")"), sortable, mark or "")


def environment_facts(rows: Sequence[Row]) -> list[Fact]:
    """Every fact of the environments, with the runs it holds for where they are not one."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for name, value in _environment_of(row):
            found.setdefault(name, {}).setdefault(value, []).append(row.label)
    return [
        Fact(
            name,
            tuple(ConditionValue(text, tuple(dict.fromkeys(labels))) for text, labels in values.items()),
        )
        for name, values in found.items()
    ]


def _environment_of(row: Row) -> Iterable[tuple[str, str]]:
    yield from preflight_facts(row.record.preflight)
    environment = row.record.environment
    if environment is None:
        return
    yield "system", environment.platform
    yield "Python", environment.python
    yield "processor", f"{environment.cpu}, {count(environment.cpu_cores, 'core')}"
    yield "CPU threads used", str(environment.cpu_threads)
    yield "memory", f"{gib(environment.total_memory_bytes)} GiB"
    yield "CUDA", environment.cuda or "none"
    for device in environment.devices:
        details = [
            device.name,
            None if device.total_memory_bytes is None else f"{gib(device.total_memory_bytes)} GiB",
            device.compute_capability and f"compute capability {device.compute_capability}",
            device.driver and f"driver {device.driver}",
            None if device.power_limit_watts is None else f"limited to {device.power_limit_watts:g} W",
        ]
        yield f"device {device.device}", ", ".join(detail for detail in details if detail)
    yield "allocator settings", environment.allocator_settings or "default"
    for name, value in environment.changed_variables.items():
        yield f"{name}, as a library wanted it", "removed" if value is None else value
    imported = environment.quantization_libraries_imported
    yield "quantization libraries in memory", ", ".join(imported) or "none"
    yield "harness commit", environment.commit or "outside a checkout"
    dirty = {True: "yes", False: "no", None: NOT_RECORDED}
    yield "uncommitted changes", dirty[environment.dirty]
    for library, version in environment.versions.items():
        yield library, version or "not installed"
