"""Headroom: how near the numbers of a run came to the end of what its compute dtype can hold, in bits.

Derived from the probe of every step (``bench.record.stability.StepProbe``): ``find_headroom(record)`` gives
the grid that the page draws as a heat map, and `Headroom.lowest` its lowest cell. Pure functions of a record;
a value that is not finite has no headroom and is flagged, never averaged away, and a zero has none either.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

from bench.record.schema import Record

Direction = Literal["forward", "backward"]

LARGEST: Mapping[str, float] = {
    "float16": 65504.0,
    "bfloat16": 3.3895313892515355e38,
    "float32": 3.4028234663852886e38,
}
"""Dtype -> its largest finite number: (2 - 2**-10) * 2**15, (2 - 2**-7) * 2**127, (2 - 2**-23) * 2**127."""


@dataclass(frozen=True, slots=True)
class Cell:
    """One layer in one step and one direction."""

    bits: float | None
    """log2 of the dtype's largest number over ``abs_max``: how many doublings are left. Below zero where a
    wider dtype held the value. None: no gradient passed, the maximum was zero, or it was not finite."""
    abs_max: float | None
    """As the probe read it. None: nothing passed there."""

    @property
    def non_finite(self) -> bool:
        """Whether a NaN or an infinity was seen there."""
        return self.abs_max is not None and not math.isfinite(self.abs_max)


@dataclass(frozen=True)
class Place:
    """Where a cell stands."""

    direction: Direction
    layer: int
    """Decoder layer, from 0."""
    step: int
    """Index of the optimizer step, from 0."""
    cell: Cell


@dataclass(frozen=True)
class Headroom:
    """The headroom of one run, in bits, by step and by decoder layer."""

    dtype: str
    """The compute dtype whose range is meant."""
    steps: tuple[int, ...]
    """Indices of the steps that were probed."""
    forward_abs_max: tuple[Sequence[float | None], ...]
    """Of activations, as the probe read them: a row for each of ``steps``, a value for each decoder layer."""
    backward_abs_max: tuple[Sequence[float | None], ...]
    """Of the gradients at the layers' outputs, the loss scale included."""

    # Made when they are drawn: of thousands of runs a page draws a few.
    @cached_property
    def forward(self) -> tuple[tuple[Cell, ...], ...]:
        """The cells of activations: a row for each of ``steps``, a cell for each decoder layer."""
        return tuple(_cells(maxima, self.dtype) for maxima in self.forward_abs_max)

    @cached_property
    def backward(self) -> tuple[tuple[Cell, ...], ...]:
        """The cells of gradients."""
        return tuple(_cells(maxima, self.dtype) for maxima in self.backward_abs_max)

    @cached_property
    def lowest(self) -> Place | None:
        """The finite cell with the fewest bits, the first of several; None: no cell has any."""
        rows = [row for pair in zip(self.forward_abs_max, self.backward_abs_max, strict=True) for row in pair]
        # The fewest bits are where the largest value is, so that only its cell need be made.
        largest = [
            max((value for value in row if value is not None and 0 < value < math.inf), default=0.0)
            for row in rows
        ]
        top = max(largest, default=0.0)
        if top == 0:
            return None
        place = largest.index(top)
        step, backward = divmod(place, 2)
        cell = Cell(headroom_bits(top, self.dtype), top)
        return Place("backward" if backward else "forward", rows[place].index(top), self.steps[step], cell)

    @property
    def non_finite(self) -> tuple[Place, ...]:
        """Every cell in which something was not finite, in the order of the steps, forward first."""
        return tuple(place for place in self.places() if place.cell.non_finite)

    @property
    def layers(self) -> int:
        """How many decoder layers were probed."""
        return max((len(row) for row in (*self.forward_abs_max, *self.backward_abs_max)), default=0)

    def places(self) -> Iterator[Place]:
        """Every cell with its place: step by step, forward before backward, by layer."""
        directions: tuple[Direction, ...] = ("forward", "backward")
        for row, step in enumerate(self.steps):
            for direction, grid in zip(directions, (self.forward, self.backward), strict=True):
                for layer, cell in enumerate(grid[row]):
                    yield Place(direction, layer, step, cell)


def find_headroom(record: Record) -> Headroom | None:
    """The headroom of every probed step; None where none was probed or the dtype is unknown here."""
    dtype = compute_dtype(record)
    probed = [(step.index, step.probe) for step in record.steps if step.probe is not None]
    if not probed or dtype not in LARGEST:
        return None
    return Headroom(
        dtype,
        tuple(index for index, _ in probed),
        tuple(probe.activation_abs_max for _, probe in probed),
        tuple(probe.gradient_abs_max for _, probe in probed),
    )


def compute_dtype(record: Record) -> str:
    """What the layers really computed in; where that was not recorded, what was asked for."""
    return record.quantization.effective_dtype if record.quantization else record.request.dtype


def headroom_bits(abs_max: float | None, dtype: str) -> float | None:
    """log2(largest number of ``dtype`` / ``abs_max``); None where that is no number, and for a dtype whose
    range is not known here."""
    if dtype not in LARGEST or abs_max is None or not math.isfinite(abs_max) or abs_max <= 0:
        return None
    # Of logarithms: the quotient itself would overflow for a subnormal maximum.
    return math.log2(LARGEST[dtype]) - math.log2(abs_max)


def _cells(maxima: Sequence[float | None], dtype: str) -> tuple[Cell, ...]:
    return tuple(Cell(headroom_bits(value, dtype), value) for value in maxima)
