"""Spreading decoder layers over cards so that the fullest card is as empty as it can be.

``spread(80, peaks)`` gives the number of consecutive layers for each card. ``peaks[card][n]`` is the bytes
of that card with n layers on it, whatever else it holds included; it must not fall as n grows. `most_layers`
asks only how much room a card has, with far fewer questions.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable, Sequence


def spread(layers: int, peaks: Sequence[Sequence[int]]) -> list[int]:
    """Layers of each card, in order, ``layers`` in all: the smallest highest peak, and of the ways to reach
    it one that leaves no card much fuller than it must be."""
    limits = sorted({size for card in peaks for size in card})
    low, high = 0, len(limits) - 1
    while low < high:
        middle = (low + high) // 2
        if sum(_held(card, limits[middle]) for card in peaks) >= layers:
            high = middle
        else:
            low = middle + 1
    counts = [_held(card, limits[low]) for card in peaks]
    while sum(counts) > layers:
        # Off the card that is fullest: the rest then stand as evenly as they can.
        place = max((c for c in range(len(counts)) if counts[c]), key=lambda c: peaks[c][counts[c]])
        counts[place] -= 1
    return counts


def most_layers(peak: Callable[[int], int], layers: int, limit: int) -> int | None:
    """The most of ``layers`` with which a card stays within ``limit``; None: not even without any.

    ``peak``: bytes of the card with so many layers, not falling.
    """
    held = bisect_right(range(layers + 1), limit, key=peak) - 1
    return None if held < 0 else held


def _held(peaks: Sequence[int], limit: int) -> int:
    """The most layers with which a card stays within ``limit``; 0 where not even none do."""
    return max(0, bisect_right(peaks, limit) - 1)
