"""Whether the step times of one run fall into two groups with nothing between them.

``find_modes(seconds)`` gives the two groups, or None. A median over two groups is the time of one of them,
and which one may be chance.

The test is Hartigan's dip test (Hartigan and Hartigan 1985, "The Dip Test of Unimodality", Annals of
Statistics 13(1)): the largest distance between the distribution of the values and the nearest one with a
single mode. It assumes no shape of the noise. Among those with a single mode the uniform distribution has
the largest dips, so the critical values are those of uniform values.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.judge.rows import median

CRITICAL_DIPS = {
    6: 0.219519, 7: 0.202341, 8: 0.194484, 9: 0.188659, 10: 0.180611, 15: 0.155456, 20: 0.138570,
    30: 0.117164, 50: 0.094093, 100: 0.068448, 200: 0.049720, 500: 0.032017, 1000: 0.022869,
}  # fmt: skip
"""Number of values -> the dip that one in a thousand samples of as many uniform values exceeds: the table
qDiptab of the R package diptest (Maechler). So few, because a session has dozens of runs, each of which is
tested."""
SMALLEST_STEP = 1.05
"""Slower over faster group, below which it is no matter: this project's own. It is the smallest effect that
the benchmark claims to see (5 %)."""


@dataclass(frozen=True)
class Modes:
    """Two groups of steps."""

    fast_seconds: float
    """Median of the faster group."""
    slow_seconds: float
    fast: int
    """Number of steps."""
    slow: int
    since: int | None
    """Place of the first slow step, from 0, where all steps after it are slow and all before it fast; None:
    they alternate."""


def find_modes(seconds: Sequence[float]) -> Modes | None:
    """The two groups that step times fall into; None where they do not, or where there are too few."""
    if len(seconds) < min(CRITICAL_DIPS) or not all(math.isfinite(value) for value in seconds):
        return None
    ordered = sorted(seconds)
    # Looked at first, for it is cheap: without a wide range there is no wide step.
    if ordered[0] <= 0 or ordered[-1] / ordered[0] < SMALLEST_STEP:
        return None
    if dip(ordered) <= critical_dip(len(ordered)):
        return None
    cut = max(range(1, len(ordered)), key=lambda place: ordered[place] - ordered[place - 1])
    fast, slow = median(ordered[:cut]), median(ordered[cut:])
    assert fast is not None
    assert slow is not None
    if slow / fast < SMALLEST_STEP:
        return None
    slows = [place for place, value in enumerate(seconds) if value >= ordered[cut]]
    since = slows[0] if slows == list(range(cut, len(seconds))) else None
    return Modes(fast, slow, cut, len(slows), since)


def critical_dip(count: int) -> float:
    """Of ``count`` values; between two rows of the table, sqrt(count) times the dip is taken as linear."""
    rows = sorted(CRITICAL_DIPS)
    if count >= rows[-1]:
        return CRITICAL_DIPS[rows[-1]] * math.sqrt(rows[-1] / count)
    above = next(row for row in rows if row > count)
    below = rows[rows.index(above) - 1]
    low, high = (CRITICAL_DIPS[row] * math.sqrt(row) for row in (below, above))
    return (low + (high - low) * (count - below) / (above - below)) / math.sqrt(count)


# ---- the dip -------------------------------------------------------------------------------------


def dip(values: Sequence[float]) -> float:
    """Hartigan's dip of two values or more, between 1 / (2 n) and 1/4.

    By the way of Hartigan 1985 (Applied Statistics 34(3), AS 217): the convex curve below and the concave
    curve above the distribution are drawn again and again, each time between the places where they last were
    farthest apart.
    """
    count = len(values)
    places = sorted(set(values))
    upto = [sum(value <= place for value in values) / count for place in places]
    below = [sum(value < place for value in values) / count for place in places]
    low, high, widest = 0, len(places) - 1, 1 / count
    while True:
        part = slice(low, high + 1)
        convex, convex_corners = _convex(places[part], below[part])
        flipped, concave_corners = _convex(places[part], [-value for value in upto[part]])
        concave = [-value for value in flipped]
        corners = sorted(convex_corners | concave_corners)
        apart = max(corners, key=lambda i: concave[i] - convex[i])
        if concave[apart] - convex[apart] <= widest:
            return widest / 2
        if apart in convex_corners:
            left, right = apart, min(i for i in concave_corners if i >= apart)
        else:
            left, right = max(i for i in convex_corners if i <= apart), apart
        outside = [
            *(upto[part][i] - convex[i] for i in range(left)),
            *(concave[i] - below[part][i] for i in range(right + 1, high - low + 1)),
        ]
        widest = max(widest, *outside) if outside else widest
        if (left, right) == (0, high - low):
            return widest / 2
        low, high = low + left, low + right


def _convex(places: Sequence[float], heights: Sequence[float]) -> tuple[list[float], set[int]]:
    """The highest convex curve that is nowhere above the points, at each of them; and its corners."""
    corners: list[int] = []
    for i in range(len(places)):
        while len(corners) > 1 and _above(places, heights, corners[-2], corners[-1], i):
            corners.pop()
        corners.append(i)
    curve = [heights[0]]
    for one, other in itertools.pairwise(corners):
        slope = (heights[other] - heights[one]) / (places[other] - places[one])
        curve += [heights[one] + slope * (places[i] - places[one]) for i in range(one + 1, other + 1)]
    return curve, set(corners)


def _above(places: Sequence[float], heights: Sequence[float], one: int, middle: int, other: int) -> bool:
    """Whether the middle point lies on or above the line between the two others."""
    rise, run = heights[other] - heights[one], places[other] - places[one]
    return (heights[middle] - heights[one]) * run >= rise * (places[middle] - places[one])
