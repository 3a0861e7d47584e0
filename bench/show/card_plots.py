"""Figures of cards against their size: what the runs held on each, and what a forecast says of each.

``bench.show.fit_plots`` draws them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from bench.record.forecast import BackendForecast, CardOutlook
from bench.show.columns import GIB, gib
from bench.show.drawing import (
    INK,
    LONGEST_IN_LEGEND,
    LONGEST_OF_LINES,
    Plot,
    box,
    elided,
    finish,
    legend_below,
    new_figure,
    shading,
)
from bench.show.fit_view import CardUse, RunUse, fullest_in_words, room_in_words
from bench.show.memory_plots import KINDS
from bench.show.owners import owner_id
from bench.show.styles import assign_styles

if TYPE_CHECKING:
    from matplotlib.axes import Axes

MEASURED_CARDS, FORECAST_CARDS = "memory-per-card", "forecast-cards-"
"""Names of the figures; each set of cards of a forecast has a number after the latter."""
REST = ("activations and workspace", 0.0, "....")
REST_ON_CPU = ("process and activations", 0.0, "....")
NOT_COUNTED = ("peak, not broken down", 0.12, "")
HEADER_INCHES, BAR_INCHES, ALONE_INCHES, GAP_INCHES = 0.25, 0.175, 0.3, 0.14
"""Of a group's name above its bars, of one of its bars, of a group that is one bar, and between groups."""
BAR_LABEL_POINTS = 9.0


@dataclass(frozen=True)
class Bar:
    """One card: what it holds, piece by piece, against its size."""

    name: str
    pieces: Sequence[tuple[int, Mapping[str, Any]]]
    """Bytes and look, from the left."""
    peak_bytes: int
    capacity_bytes: int | None
    whose: str
    """The backend's, as `owner_id` gives it."""


@dataclass
class Lines:
    """Where the next bar of a figure goes: inches from the top."""

    top: float = 0.0
    ticks: list[float] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    owners: list[str] = field(default_factory=list)


def _height(groups: Mapping[str, Sequence[Bar]]) -> float:
    """Inches of all lines of `_draw_groups`."""
    return sum(
        GAP_INCHES + (ALONE_INCHES if len(bars) == 1 else HEADER_INCHES + len(bars) * BAR_INCHES)
        for bars in groups.values()
    )


def _draw_groups(axes: Axes, groups: Mapping[str, Sequence[Bar]]) -> None:
    """The bars of each group under its name; a group of one bar has its name beside it."""
    lines = Lines()
    for name, bars in groups.items():
        if len(bars) == 1:
            _draw_bar(axes, bars[0], lines, ALONE_INCHES, elided(name, LONGEST_OF_LINES))
        else:
            lines.top += HEADER_INCHES
            at: Any = {"va": "bottom", "ha": "left", "gid": bars[0].whose}
            axes.annotate(elided(name, LONGEST_IN_LEGEND), (0, lines.top - 0.04), **at)
            for bar in bars:
                _draw_bar(axes, bar, lines, BAR_INCHES, elided(bar.name, LONGEST_OF_LINES))
        lines.top += GAP_INCHES
    every = [bar for bars in groups.values() for bar in bars]
    longest = max(1, *(max(bar.peak_bytes, bar.capacity_bytes or 0) for bar in every))
    axes.set_yticks(lines.ticks, lines.names)
    for text, whose in zip(axes.get_yticklabels(), lines.owners, strict=True):
        text.set_gid(whose)
    small = any(len(bars) > 1 for bars in groups.values())
    axes.tick_params(axis="y", length=0, labelsize=BAR_LABEL_POINTS if small else None)
    axes.set_ylim(lines.top, 0)
    axes.set_xlim(0, 1.03 * longest / GIB)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")
    axes.annotate("room", (1.015, 1.0), xycoords="axes fraction", va="bottom", fontsize=BAR_LABEL_POINTS)


def _draw_bar(axes: Axes, bar: Bar, lines: Lines, inches: float, name: str) -> None:
    middle, left = lines.top + inches / 2, 0.0
    for size, look in bar.pieces:
        axes.barh(middle, size / GIB, 0.78 * inches, left, gid=bar.whose, **look)
        left += size / GIB
    if bar.capacity_bytes is not None:
        place = bar.capacity_bytes / GIB
        # As far as the next group, so that cards of one size have one line.
        ends = [lines.top - GAP_INCHES / 2, lines.top + inches + GAP_INCHES / 2]
        axes.plot([place, place], ends, color=INK, lw=2, solid_capstyle="butt")
    room = room_in_words(bar.peak_bytes, bar.capacity_bytes)
    at: Any = {"xycoords": ("axes fraction", "data"), "va": "center", "gid": bar.whose}
    axes.annotate(room, (1.015, middle), fontsize=BAR_LABEL_POINTS, **at)
    lines.ticks.append(middle)
    lines.names.append(name)
    lines.owners.append(bar.whose)
    lines.top += inches


def measured_cards(uses: Sequence[RunUse]) -> Plot:
    """Exact tensor bytes by kind and the rest of the peak, stacked, for each device of each run."""
    groups = {use.name: [_measured_bar(card, use.row.label) for card in use.cards] for use in uses}
    cards = [card for use in uses for card in use.cards]
    handles: dict[str, Any] = {
        label: box(**shading(shade, hatch))
        for kind, (label, shade, hatch) in KINDS.items()
        if any(card.parts.get(kind) for card in cards)
    }
    on_card, on_cpu = any(use.on_card for use in uses), any(not use.on_card for use in uses)
    for (label, shade, hatch), there in (
        (REST if on_card else REST_ON_CPU, any(card.rest_bytes for card in cards)),
        (NOT_COUNTED, any(not card.parts for card in cards)),
    ):
        if there:
            handles[label] = box(**shading(shade, hatch))
    sizes = " or ".join(("the card's",) * on_card + ("the machine's",) * on_cpu)
    with new_figure(1.0 + 0.22 * len(handles) / 2 + _height(groups)) as (figure, axes):
        _draw_groups(axes, groups)
        axes.set_xlabel(f"memory at the fullest moment (GiB; line: {sizes} memory)")
        legend_below(figure, handles)
        text = f"Peak memory against {sizes} memory. {'; '.join(fullest_in_words(use) for use in uses)}."
        title = (
            "Memory of each card against its size"
            if on_card
            else "Memory of the process against the machine's"
        )
        return finish(figure, MEASURED_CARDS, title, text)


def _measured_bar(card: CardUse, label: str) -> Bar:
    pieces = [(size, shading(*KINDS[kind][1:])) for kind, size in card.parts.items()]
    if not card.parts:
        pieces.append((card.peak_bytes, shading(*NOT_COUNTED[1:])))
    elif card.rest_bytes:
        pieces.append((card.rest_bytes, shading(*REST[1:])))
    return Bar(card.name, pieces, card.peak_bytes, card.capacity_bytes, owner_id(label))


def forecast_cards(
    place: int, label: str, outlooks: Sequence[tuple[BackendForecast, CardOutlook]]
) -> Plot | None:
    """The forecast peak of each card of one set for each backend; None: no backend has one.

    ``place``: of the set among those that were asked about, from 1.
    """
    styles = assign_styles([backend.backend for backend, _ in outlooks])
    groups = {
        backend.backend: [
            Bar(
                f"card {count}",
                [(peak, {"color": styles[backend.backend].color})],
                peak,
                outlook.capacity_bytes,
                owner_id(backend.backend),
            )
            for count, peak in enumerate(outlook.peak_bytes, start=1)
        ]
        for backend, outlook in outlooks
        if outlook.peak_bytes
    }
    if not groups:
        return None
    with new_figure(0.8 + _height(groups)) as (figure, axes):
        _draw_groups(axes, groups)
        axes.set_xlabel("forecast peak (GiB; line: the card's memory)")
        said = (
            f"{backend.backend}: {gib(max(outlook.peak_bytes))} of {gib(outlook.capacity_bytes)} GiB, room: "
            f"{room_in_words(max(outlook.peak_bytes), outlook.capacity_bytes)}"
            for backend, outlook in outlooks
            if outlook.peak_bytes
        )
        text = f"Forecast peak of the fullest of the cards {label}. {'; '.join(said)}."
        return finish(figure, f"{FORECAST_CARDS}{place}", f"On {label}: forecast of the fullest moment", text)
