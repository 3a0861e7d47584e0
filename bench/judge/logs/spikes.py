"""Spikes of a logged loss or gradient norm: values far above those of the windows before them.

A value is a spike if it lies at least SPIKE_DEVIATIONS robust standard deviations above the median of the
windows before it, and is at least SPIKE_FACTOR times that median.
"""

from __future__ import annotations

import bisect
import math
import statistics
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.record.logs.logged_values import LoggedWindow

SPIKE_DEVIATIONS = 7
"""Source: the spike score of OLMo 2 (arXiv 2501.00656), which counts values seven standard deviations off a
rolling mean of 1000. A log has far fewer, so median and median absolute deviation stand in for them."""
SPIKE_FACTOR = 2
"""Chosen, from no source: in a very quiet log seven deviations are a matter of digits."""
HISTORY = 100
"""Windows before a value that it is compared with, at most."""
LEAST_HISTORY = 5
"""Chosen: with fewer windows before it no value is called a spike."""
NORMAL_MAD = 0.6745
"""Median absolute deviation over standard deviation, of a normal distribution."""


@dataclass(frozen=True, slots=True)
class Spike:
    """One value that stands out."""

    window: LoggedWindow
    quantity: str
    """"loss" or "gradient norm"."""
    value: float
    median: float
    """Of the windows before it."""

    @property
    def factor(self) -> float:
        """How many times the median it is."""
        return self.value / self.median


def spikes(windows: Sequence[LoggedWindow]) -> tuple[Spike, ...]:
    """Spikes of loss and gradient norm, in the order of the log. Values that are not finite are no spikes."""
    found = [
        *_of("loss", [(window, window.loss) for window in windows]),
        *_of("gradient norm", [(window, window.gradient_norm) for window in windows]),
    ]
    place = {id(window): number for number, window in enumerate(windows)}
    return tuple(sorted(found, key=lambda spike: place[id(spike.window)]))


def _of(quantity: str, values: Sequence[tuple[LoggedWindow, float | None]]) -> Iterator[Spike]:
    before: deque[float] = deque()
    ordered: list[float] = []
    for window, value in values:
        if value is None or not math.isfinite(value):
            continue
        if len(ordered) >= LEAST_HISTORY:
            median = ordered[len(ordered) // 2]
            # The cheap condition first: a log may hold a million windows.
            if median > 0 and value >= SPIKE_FACTOR * median:
                deviation = statistics.median(abs(other - median) for other in ordered) / NORMAL_MAD
                if value >= median + SPIKE_DEVIATIONS * deviation:
                    yield Spike(window, quantity, value, median)
        before.append(value)
        bisect.insort(ordered, value)
        if len(before) > HISTORY:
            ordered.pop(bisect.bisect_left(ordered, before.popleft()))
