"""The cells of the heat map of headroom: which shade each has, and which equal neighbours are one rectangle.

``make_panel(row, direction)`` gives the map of one run, ``boxes_of(panel)`` its rectangles by shade;
``bench.show.heat_map`` draws them.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Literal

from bench.judge.headroom import Cell, Direction
from bench.judge.rows import Row

EDGES = (1, 2, 4, 8, 16, 32, 64)
"""Bits at which a new shade begins: between 1 and 2 bits there is a world, between 90 and 100 none."""
ROWS = 16
"""Rows of a panel at most: of more steps, several share a row that shows the worst of them."""

Shade = int | Literal["hatched"]
"""How many of `EDGES` the headroom has reached, or hatched: not finite."""


@dataclass(frozen=True)
class Panel:
    """The map of one run: a row of cells for each step or few steps, the worst cell of those."""

    label: str
    name: str
    steps: tuple[int, ...]
    rows: tuple[tuple[Cell, ...], ...]

    @property
    def layers(self) -> int:
        """Cells in a row."""
        return max(len(row) for row in self.rows)


@dataclass(frozen=True)
class Box:
    """A rectangle of cells of one shade, in layers and rows."""

    layer: int
    row: int
    width: int
    height: int


def make_panel(row: Row, direction: Direction) -> Panel | None:
    """The map of a run that was probed; None: nothing passed in that direction."""
    assert row.headroom is not None, "the caller has chosen runs with a probe"
    grid = row.headroom.forward if direction == "forward" else row.headroom.backward
    if not any(cell.abs_max is not None for cells in grid for cell in cells):
        return None
    share = math.ceil(len(grid) / ROWS)
    merged = [_worst(grid[first : first + share]) for first in range(0, len(grid), share)]
    return Panel(row.label, f"{row.name}, {row.headroom.dtype}", row.headroom.steps, tuple(merged))


def _worst(rows: Sequence[Sequence[Cell]]) -> tuple[Cell, ...]:
    """Of each layer the cell that leaves least: not finite before any number, any number before none."""

    def gravity(cell: Cell) -> tuple[bool, bool, float]:
        return not cell.non_finite, cell.bits is None, cell.bits or 0.0

    # A step that tells of fewer layers than another has no value in the rest.
    return tuple(min(cells, key=gravity) for cells in zip_longest(*rows, fillvalue=Cell(None, None)))


def boxes_of(panel: Panel) -> dict[Shade, list[Box]]:
    """Shade -> rectangles. Equal neighbours in a row are one, and so are equal ones in rows that follow."""
    found: dict[Shade, list[Box]] = {}
    for row, cells in enumerate(panel.rows):
        for shade, first, width in _stretches([_shade(cell) for cell in cells]):
            boxes = found.setdefault(shade, [])
            above = next(
                (
                    place
                    for place, box in enumerate(boxes)
                    if (box.layer, box.width, box.row + box.height) == (first, width, row)
                ),
                None,
            )
            if above is None:
                boxes.append(Box(first, row, width, 1))
            else:
                boxes[above] = Box(first, boxes[above].row, width, boxes[above].height + 1)
    return dict(sorted(found.items(), key=lambda item: str(item[0])))


def _stretches(shades: Sequence[Shade | None]) -> Iterator[tuple[Shade, int, int]]:
    """Shade, first place and length of each stretch of equal shades; where there is none, nothing."""
    first = 0
    for place in range(1, len(shades) + 1):
        if place == len(shades) or shades[place] != shades[first]:
            shade = shades[first]
            if shade is not None:
                yield shade, first, place - first
            first = place


def _shade(cell: Cell) -> Shade | None:
    """None: the cell has no value, so nothing is drawn."""
    if cell.non_finite:
        return "hatched"
    return None if cell.bits is None else bisect.bisect_right(EDGES, cell.bits)
