"""Figures that scatter from run to run: seconds, throughput, memory, as NEW over BASE with an interval.

The two sides are two sessions, so that their runs are not pairs (``bench.judge.intervals.unpaired_ratios``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

from bench.judge.intervals import Ratio, differs, unpaired_ratios
from bench.judge.regression_findings import Finding, Result, Unit
from bench.judge.regression_limits import Limits
from bench.judge.regression_pairs import Match
from bench.judge.regression_runs import Run

ONE_RUN = "one run on a side, and one run gives no interval"


@dataclass(frozen=True)
class Figure:
    """One thing that is measured in every run."""

    key: str
    """Of its limit."""
    title: str
    unit: Unit
    better: Literal["lower", "higher"]
    read: Callable[[Run], Mapping[str, float | None]]
    """Where (a device; empty: the run as a whole) -> value; None: not observed."""


def _of_row(field: str) -> Callable[[Run], Mapping[str, float | None]]:
    return lambda run: {"": getattr(run.row, field)}


def _load_host_peak(run: Run) -> Mapping[str, float | None]:
    return {"": run.record.load.host_peak_bytes if run.record.load else None}


def _peaks(measure: str) -> Callable[[Run], Mapping[str, float | None]]:
    return lambda run: {
        peak.device: peak.peak_bytes for peak in run.row.peak_by_device if peak.measure == measure
    }


def _last_step(measure: str) -> Callable[[Run], Mapping[str, float | None]]:
    """Of the run as a whole: on several devices it is the highest."""

    def read(run: Run) -> Mapping[str, float | None]:
        peaks = run.row.peak_by_device
        return {"": run.last_step_bytes if peaks and peaks[0].measure == measure else None}

    return read


FIGURES = (
    Figure("step_seconds", "step time, median", "s", "lower", _of_row("step_seconds_median")),
    Figure("tokens_per_second", "throughput", "tokens/s", "higher", _of_row("tokens_per_second")),
    Figure("load_seconds", "load time", "s", "lower", _of_row("load_seconds")),
    Figure("load_seconds", "load time from the cache", "s", "lower", _of_row("reload_seconds")),
    Figure("peak_reserved_memory", "peak memory", "bytes", "lower", _peaks("reserved")),
    Figure("peak_resident_memory", "peak memory", "bytes", "lower", _peaks("resident")),
    Figure("peak_reserved_memory", "memory in the last step", "bytes", "lower", _last_step("reserved")),
    Figure("peak_resident_memory", "memory in the last step", "bytes", "lower", _last_step("resident")),
    Figure("load_host_memory", "host memory until loaded", "bytes", "lower", _load_host_peak),
)


def measured_findings(match: Match, limits: Limits) -> Iterator[Finding]:
    """One finding for each measured figure that BASE has, by device where it is one of a device."""
    asked = []
    for figure in FIGURES:
        base, new = _values(figure, match.base), _values(figure, match.new)
        for where, values in base.items():
            title = f"{figure.title}, {where}" if where else figure.title
            asked.append((figure, title, values, new.get(where, ())))
    ratios = iter(unpaired_ratios([(new, base) for _, _, base, new in asked if new]))
    for figure, title, base_values, new_values in asked:
        if new_values:
            found = next(ratios)
            yield _finding(match.label, figure, title, base_values, new_values, found, limits)
        else:
            note = "BASE recorded it and NEW did not"
            yield Finding(match.label, figure.key, title, "untold", figure.unit, base_values, note=note)


def _values(figure: Figure, runs: tuple[Run, ...]) -> dict[str, tuple[float, ...]]:
    found: dict[str, list[float]] = {}
    for run in runs:
        for where, value in figure.read(run).items():
            if value is not None:
                found.setdefault(where, []).append(value)
    return {where: tuple(values) for where, values in found.items()}


def _finding(
    label: str,
    figure: Figure,
    title: str,
    base: tuple[float, ...],
    new: tuple[float, ...],
    ratio: Ratio,
    limits: Limits,
) -> Finding:
    one_run = ratio.pairs < 2
    limit: float | None = getattr(limits.one_run if one_run else limits, figure.key)
    bound = None if limit is None else limit if figure.better == "lower" else 1 / limit
    result, note = _judged(ratio, limit, figure.better)
    return Finding(
        label=label,
        figure=figure.key,
        title=title,
        result=result,
        unit=figure.unit,
        base=base,
        new=new,
        factor=ratio.estimate,
        interval=ratio.interval,
        limit=bound,
        beyond=_times_worse(ratio.estimate, figure.better) > (getattr(limits, figure.key) or math.inf),
        note=note,
    )


def _judged(ratio: Ratio, limit: float | None, better: Literal["lower", "higher"]) -> tuple[Result, str]:
    """What to call a ratio of NEW to BASE; ``limit``: times worse, for so many runs."""
    if math.isnan(ratio.estimate):
        return "untold", "a figure is not finite or not above 0"
    if ratio.interval is None:
        return _of_one_run(ratio.estimate, limit, better)
    if limit is None:
        return "untold", "not judged: its limit is off"
    direction = differs(ratio, limit - 1)
    if direction is not None:
        return ("better" if direction == better else "worse"), ""
    if 1 / limit <= ratio.interval.low and ratio.interval.high <= limit:
        return "same", ""
    return "untold", "the interval reaches from within the limit to beyond it"


def _of_one_run(
    estimate: float, limit: float | None, better: Literal["lower", "higher"]
) -> tuple[Result, str]:
    """Only what goes beyond the limit for single runs is told."""
    worse = _times_worse(estimate, better)
    if limit is not None and worse > limit:
        return "worse", "one run on a side, and beyond the limit for one run"
    if limit is not None and worse < 1 / limit:
        return "better", "one run on a side, and beyond the limit for one run"
    return "untold", ONE_RUN


def _times_worse(estimate: float, better: Literal["lower", "higher"]) -> float:
    if better == "lower":
        return estimate
    return 1 / estimate if estimate else math.inf
