"""Sentences that several figures are said in."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping

from bench.judge.rows import Row
from bench.show.columns import words


def ended(name: str, row: Row) -> str:
    """A name, with the outcome where the run did not complete."""
    return name if row.completed else f"{name} ({words(row.record.status)})"


def extremes(values: Mapping[str, float], form: Callable[[float | None], str], unit: str) -> str:
    """Who has the lowest and who the highest of ``values``; ``form`` writes a number, ``unit`` follows it."""
    finite = {name: value for name, value in values.items() if math.isfinite(value)}
    if not finite:
        return "No value was measured."
    low, high = min(finite, key=finite.__getitem__), max(finite, key=finite.__getitem__)
    if finite[low] == finite[high]:
        return f"{', '.join(finite)}: {form(finite[low])} {unit}."
    return f"Lowest: {low}, {form(finite[low])} {unit}; highest: {high}, {form(finite[high])}."
