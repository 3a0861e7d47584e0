"""Memory against speed, the two things that a card limits, with stability as the third. ``bench.show.plots``
draws it for the largest group of alike runs.

A backend recedes where another one is at least level in both and better in one. What broke is crossed out,
for no speed makes up for it; what was not judged is hollow. Whiskers span the runs of a backend.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.judge.comparison import Comparison
from bench.judge.decision import MEMORY, SPEED, dominated
from bench.judge.groups import Group, Spread
from bench.judge.stability import VerdictName
from bench.show.columns import GIB, gib, number
from bench.show.drawing import INK, Plot, finish, height_with_legend, legend_below, new_figure
from bench.show.owners import owner_id
from bench.show.page_top import fault_in_words
from bench.show.selection import KINDS_DRAWN
from bench.show.styles import Style, assign_styles

RECEDED = 0.35
"""Opacity of what another backend dominates."""


@dataclass(frozen=True)
class Point:
    """One backend."""

    label: str
    memory: Spread
    speed: Spread
    verdict: VerdictName
    beaten_by: str | None
    fault: str | None
    """What broke its training; None: it is sound."""

    @property
    def place(self) -> tuple[float, float]:
        """In the units of the axes."""
        return self.memory.median / GIB, self.speed.median

    @property
    def leads(self) -> bool:
        """Whether nothing is better in both, and the training is sound."""
        return self.beaten_by is None and self.fault is None


def pareto(comparison: Comparison, styles: Mapping[str, Style]) -> Plot | None:
    """One mark for each backend; None where fewer than two have both figures.

    Of more than there is room for, those that lead first, then those that other figures draw too.
    """
    points = _points(comparison.groups[0]) if comparison.groups else []
    if len(points) < 2:
        return None
    if len(points) > KINDS_DRAWN:
        points = sorted(points, key=lambda point: (not point.leads, point.label not in styles))[:KINDS_DRAWN]
        styles = assign_styles([point.label for point in points])
    with new_figure(height_with_legend([point.label for point in points]) + 0.4) as (figure, axes):
        front = sorted(point.place for point in points if point.leads)
        if front:
            axes.step(*zip(*front, strict=True), where="post", color=INK, alpha=0.35, lw=1, ls=":")
        handles = {}
        for point in points:
            style, whose = styles[point.label], owner_id(point.label)
            ink: Any = {"color": style.color, "alpha": RECEDED if point.beaten_by else 1.0, "gid": whose}
            fill = style.color if point.verdict != "not_judged" else "none"
            reach: Any = {"xerr": _reach(point.memory, GIB), "yerr": _reach(point.speed, 1)}
            x, y = point.place
            whiskers = axes.errorbar(x, y, **reach, **ink, lw=1.2)
            for part in whiskers.get_children():
                part.set_gid(whose)
            mark: Any = {"ls": "", "marker": style.marker, "ms": 10, "mew": 1.6, "mfc": fill}
            (handles[point.label],) = axes.plot(*point.place, **mark, **ink)
            if point.fault:
                axes.plot(*point.place, ls="", marker="x", ms=15, mew=2, color=INK, gid=whose)
        axes.margins(0.12)
        axes.set_xlabel("peak memory of the fullest device (GiB): less is better")
        axes.set_ylabel("tokens per second: more is better")
        legend_below(figure, handles)
        return finish(figure, "pareto", "Memory against speed", " ".join(_words(points)))


def _points(group: Group) -> list[Point]:
    """Of every backend that has both figures, finite."""
    beaten, points = dominated(group), []
    for one in group.summaries:
        memory, speed = one.figures.get(MEMORY), one.figures.get(SPEED)
        if memory and speed and math.isfinite(memory.median) and math.isfinite(speed.median):
            fault = None if one.sound else fault_in_words(one)
            points.append(Point(one.label, memory, speed, one.verdict.verdict, beaten.get(one.label), fault))
    return points


def _reach(spread: Spread, unit: float) -> list[list[float]]:
    return [[(spread.median - spread.low) / unit], [(spread.high - spread.median) / unit]]


def _words(points: Sequence[Point]) -> Iterator[str]:
    leading = [
        f"{point.label} ({gib(point.memory.median)} GiB, {number(point.speed.median)} tokens/s)"
        for point in points
        if point.leads
    ]
    yield f"Nothing is better in both than {', '.join(leading)}." if leading else "No training was sound."
    receded = [f"{point.label} (by {point.beaten_by})" for point in points if point.beaten_by]
    if receded:
        yield f"Dominated, and drawn pale: {', '.join(receded)}."
    broken = [f"{point.label} ({point.fault})" for point in points if point.fault]
    if broken:
        yield f"Crossed out, because their training broke: {', '.join(broken)}."
    if any(point.verdict == "not_judged" for point in points):
        yield "Hollow: the stability was not judged."
    if any(point.memory.runs > 1 for point in points):
        yield "Whiskers: lowest and highest run."
