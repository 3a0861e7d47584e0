"""The heat map of headroom: how many bits were left in each layer and step, one panel a run.

``headroom_maps(rows)`` gives a figure of the activations and one of the gradients. Written as SVG by hand:
a model of 80 layers has thousands of cells, and all cells of one shade in a panel are a single path here, in
which equal neighbours are one rectangle. Shades are opacities of one colour, so the map is legible on light
and on dark paper and without colour vision; what was not finite is hatched, never coloured.
"""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from itertools import zip_longest

from bench.judge.headroom import Direction, Headroom
from bench.judge.rows import Row
from bench.show.columns import number
from bench.show.drawing import FONTS, LONGEST_IN_LEGEND, Plot, elided, hand_drawn
from bench.show.heat_map_cells import EDGES, Panel, boxes_of, make_panel
from bench.show.owners import owned

OPACITIES = (1.0, 0.8, 0.62, 0.46, 0.33, 0.22, 0.13, 0.06)
"""Of each shade, the least headroom first."""
COLOR = "#d1495b"
"""Has a contrast of 3 or more on both papers, and is no backend's."""
PANELS = 12
"""Runs that are drawn at most."""

WIDTH = 460.0
LEFT = 30.0
ROW_HEIGHT = 8.0
NAME_HEIGHT = 22.0
AXIS_HEIGHT = 36.0
TITLES: Mapping[Direction, str] = {
    "forward": "Headroom of activations, forward",
    "backward": "Headroom of gradients, backward",
}


def headroom_maps(rows: Sequence[Row]) -> tuple[Plot, ...]:
    """A figure for each direction in which something was probed."""
    probed = [row for row in _first_runs_first(rows) if row.headroom is not None]
    maps = []
    for direction in TITLES:
        panels = [panel for row in probed[:PANELS] if (panel := make_panel(row, direction)) is not None]
        if panels:
            maps.append(_figure(direction, panels, _words(probed, direction)))
    return tuple(maps)


def _first_runs_first(rows: Sequence[Row]) -> list[Row]:
    """One run of every label before any second one, so that the limit leaves out repeats only."""
    firsts = {row.label: row for row in reversed(rows)}
    return sorted(rows, key=lambda row: firsts[row.label] is not row)


# ---- drawing -------------------------------------------------------------------------------------


def _figure(direction: Direction, panels: Sequence[Panel], words: str) -> Plot:
    name = f"headroom-{direction}"
    parts = [
        f'<defs><pattern id="{name}-hatch" width="4" height="4" patternUnits="userSpaceOnUse" '
        'patternTransform="rotate(45)"><path d="M1 0v4" stroke="currentColor" stroke-width="1.4"/></pattern>'
        "</defs>"
    ]
    top = 0.0
    for panel, following in zip_longest(panels, panels[1:]):
        top += NAME_HEIGHT
        parts.append(f"<g {owned(panel.label)}>")
        parts.append(_text(LEFT, top - 6, elided(panel.name, LONGEST_IN_LEGEND), size=11))
        parts += _map(panel, top, name)
        parts.append("</g>")
        top += ROW_HEIGHT * len(panel.rows)
        # Each is as wide as the figure, whatever its depth: one axis is true of those of one depth.
        if following is None or following.layers != panel.layers:
            parts += _axis(panel, top)
            top += 0 if following is None else AXIS_HEIGHT
    parts += _legend(top + 46, name)
    return hand_drawn("".join(parts), (WIDTH, top + 88), name, TITLES[direction], words)


def _map(panel: Panel, top: float, name: str) -> Iterator[str]:
    """The cells of one panel, its frame, and the numbers of its first and last step."""
    width = (WIDTH - LEFT) / panel.layers
    frame = f'x="{LEFT:g}" y="{top:g}" width="{WIDTH - LEFT:g}" height="{ROW_HEIGHT * len(panel.rows):g}"'
    for shade, boxes in boxes_of(panel).items():
        path = "".join(
            f"M{LEFT + box.layer * width:.2f} {top + box.row * ROW_HEIGHT:g}h{box.width * width:.2f}"
            f"v{box.height * ROW_HEIGHT:g}h-{box.width * width:.2f}z"
            for box in boxes
        )
        fill = (
            f'fill="url(#{name}-hatch)"'
            if isinstance(shade, str)
            else f'fill="{COLOR}" fill-opacity="{OPACITIES[shade]:g}" shape-rendering="crispEdges"'
        )
        yield f'<path {fill} d="{path}"/>'
    yield f'<rect {frame} fill="none" stroke="currentColor" stroke-opacity=".45" stroke-width=".8"/>'
    ends = {0: panel.steps[0], len(panel.rows) - 1: panel.steps[-1]}
    for row, step in ends.items():
        yield _text(LEFT - 5, top + row * ROW_HEIGHT + 7.5, str(step), size=9, anchor="end")


def _axis(panel: Panel, top: float) -> Iterator[str]:
    width = (WIDTH - LEFT) / panel.layers
    spacing = next((s for s in (1, 2, 5, 10, 20, 50, 100) if panel.layers / s <= 12), panel.layers)
    for layer in range(0, panel.layers, spacing):
        yield _text(LEFT + (layer + 0.5) * width, top + 13, str(layer), size=9, anchor="middle")
    yield _text(LEFT - 5, top + 13, "step", size=9, anchor="end")
    yield _text((LEFT + WIDTH) / 2, top + 29, "decoder layer", size=11, anchor="middle")


def _legend(top: float, name: str) -> Iterator[str]:
    """The shades with the bits between them, and the hatching."""
    width, left = 34.0, LEFT
    for place, opacity in enumerate(OPACITIES):
        yield (
            f'<rect x="{left + place * width:g}" y="{top:g}" width="{width:g}" height="12" fill="{COLOR}" '
            f'fill-opacity="{opacity:g}" shape-rendering="crispEdges"/>'
        )
    whole = width * len(OPACITIES)
    yield (
        f'<rect x="{left:g}" y="{top:g}" width="{whole:g}" height="12" fill="none" stroke="currentColor" '
        'stroke-opacity=".45" stroke-width=".8"/>'
    )
    for place, edge in enumerate(EDGES, start=1):
        yield _text(left + place * width, top + 24, str(edge), size=9, anchor="middle")
    yield _text(left, top + 38, "bits of headroom (strongest: under 1)", size=10)
    box = f'x="{left + whole + 24:g}" y="{top:g}" width="26" height="12"'
    yield f'<rect {box} fill="url(#{name}-hatch)" stroke="currentColor" stroke-width=".8"/>'
    yield _text(left + whole + 56, top + 10, "not finite", size=10)


def _text(x: float, y: float, text: str, *, size: int, anchor: str = "start") -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}px" font-family="{FONTS}" fill="currentColor" '
        f'text-anchor="{anchor}">{html.escape(text)}</text>'
    )


# ---- words ---------------------------------------------------------------------------------------


def _words(probed: Sequence[Row], direction: Direction) -> str:
    parts = [f"{row.name}: {_lowest(row.headroom, direction)}" for row in probed[:PANELS] if row.headroom]
    rest = len(probed) - PANELS
    more = f" {rest} more runs are not drawn." if rest > 0 else ""
    return f"{TITLES[direction]}, in bits by decoder layer and step. {'; '.join(parts)}.{more}"


def _lowest(found: Headroom, direction: Direction) -> str:
    own = [place for place in found.places() if place.direction == direction]
    known = [place for place in own if place.cell.bits is not None]
    broken = [place for place in own if place.cell.non_finite]
    parts = []
    if known:
        low = min(known, key=lambda place: place.cell.bits or 0.0)
        parts.append(
            f"lowest {number(low.cell.bits)} bits of {found.dtype} at layer {low.layer}, step {low.step}"
        )
    if broken:
        parts.append(
            f"not finite in {len(broken)} of {len(own)} cells, first at layer {broken[0].layer}, "
            f"step {broken[0].step}"
        )
    return ", ".join(parts) or "no value"
