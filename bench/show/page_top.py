"""What the page says first: what was measured and where, and the few answers that matter, as tiles.

``headline(comparison)`` is the same in sentences, for who reads no more than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.judge.comparison import Comparison
from bench.judge.conditions import counted
from bench.judge.groups import FIGURES, Summary
from bench.judge.rows import Row
from bench.judge.scaler import failing_steps
from bench.judge.stability import BAD, VerdictName
from bench.show.columns import gib, number, outcome, words
from bench.show.differences import notes_on
from bench.show.runs_shown import runs_shown

VERDICTS: Mapping[VerdictName, str] = {
    "poisoned": "the trained weights are no longer finite",
    "non_finite": "NaN or infinity in a loss or a gradient",
    "dead": "adapters that no gradient moves",
    "spiking": "a norm or loss far beyond the run's others",
    "not_judged": "nothing can be concluded",
}
"""Verdict -> half a sentence; healthy speaks for itself."""


@dataclass(frozen=True)
class Tile:
    """One of the few answers that stand at the top."""

    title: str
    answer: str
    details: tuple[str, ...]


def headline(comparison: Comparison) -> str:
    """What was measured, where and on what, how many completed, and the answers of the top, in sentences."""
    answers = [f"{tile.title}: {'; '.join((tile.answer, *tile.details))}." for tile in make_tiles(comparison)]
    return " ".join([setting(comparison.rows), *answers, *notes_on(comparison)])


def setting(rows: Sequence[Row]) -> str:
    """What was measured, where and on what, and how many runs completed."""
    if not rows:
        return "There are no records here, so there is nothing to show."
    done = sum(row.completed for row in rows)
    backends = len({row.record.request.backend for row in rows})
    ended = "all" if done == len(rows) else done or "none"
    cpu = any(row.record.request.device == "cpu" for row in rows)
    return (
        f"{count(len(rows), 'short QLoRA run')} with {count(backends, 'backend')} "
        f"on {_where(rows)}, {_weights(rows)}: {ended} completed."
        + (" These are figures of a CPU, not of a GPU." if cpu else "")
    )


def make_tiles(comparison: Comparison) -> list[Tile]:
    """Who needed least memory, who was fastest, and what went wrong."""
    tiles = []
    if comparison.groups:
        summaries = comparison.groups[0].summaries
        several = len(comparison.groups) > 1
        of = ("in the largest group of alike runs",) if several else ()
        memory = _extreme(
            summaries, "peak_memory_bytes", ("Lowest memory measured", "Memory"), "GiB at the peak", gib
        )
        speed = _extreme(
            summaries, "tokens_per_second", ("Highest speed measured", "Speed"), "tokens/s", number
        )
        tiles = [Tile(t.title, t.answer, (*t.details, *of)) for t in (memory, speed) if t]
    if comparison.rows:
        tiles.append(_wrong(runs_shown(comparison)))
    return tiles


def _extreme(
    summaries: Sequence[Summary],
    field: str,
    titles: tuple[str, str],
    unit: str,
    form: Callable[[float | None], str],
) -> Tile | None:
    """The better end of a figure and the next after it; the second title where there is no next."""
    known = [
        (spread, summary)
        for summary in summaries
        if (spread := summary.figures.get(field)) and math.isfinite(spread.median)
    ]
    if not known:
        return None
    known.sort(key=lambda pair: pair[0].median, reverse=FIGURES[field] == "highest")
    best = known[0][0]
    leaders = [summary for spread, summary in known if spread.median == best.median]
    value, names = f"{form(best.median)} {unit}", " and ".join(_with_verdict(leader) for leader in leaders)
    if len(leaders) == len(known):
        return Tile(titles[1], names, (value, "nothing to compare it with" if len(known) == 1 else "equal"))
    following, runner_up = known[len(leaders)]
    overlap = best.low <= following.high and following.low <= best.high
    doubt = ", but the ranges overlap" if overlap else ""
    return Tile(
        titles[0], names, (value, f"next: {_with_verdict(runner_up)}, {form(following.median)}{doubt}")
    )


def _with_verdict(summary: Summary) -> str:
    """A backend whose training broke is no choice, however small or fast: its name never stands alone."""
    verdict = summary.verdict.verdict
    return f"{summary.label} ({words(verdict)})" if verdict in BAD else summary.label


def _wrong(rows: Sequence[Row]) -> Tile:
    found = [f"{row.label}: {fault}" for row in rows if (fault := _fault(row))]
    if found:
        return Tile(
            "What went wrong", f"{len(found)} of {count(len(rows), 'run')}", tuple(dict.fromkeys(found))
        )
    finite = "every loss and gradient stayed finite"
    skipped = sum(row.skipped_updates or 0 for row in rows)
    if skipped:
        finite = f"every loss stayed finite; the loss scaler skipped {count(skipped, 'update')}, its work"
    caution = "; on synthetic weights that proves nothing" if is_synthetic(rows) else ""
    return Tile("What went wrong", "Nothing", ("every run completed", finite + caution))


def _fault(row: Row) -> str | None:
    if not row.completed:
        return outcome(row)
    if row.verdict.verdict in BAD:
        return f"{words(row.verdict.verdict)}: {VERDICTS[row.verdict.verdict]}"
    # Not judged, and still something went wrong.
    failing = failing_steps(row.record.steps)
    if failing:
        return f"{len(failing)} of {len(row.record.steps)} steps not finite"
    beyond = [item.measure.short for item in row.verdict.evidence if item.exceeded]
    return f"beyond its threshold: {', '.join(beyond)}" if beyond else None


def is_synthetic(rows: Sequence[Row]) -> bool:
    """Whether any run had synthetic weights."""
    return any(row.record.request.model.weights == "synthetic" for row in rows)


def models_of(rows: Sequence[Row]) -> str:
    """The models' names."""
    return " and ".join(dict.fromkeys(row.record.request.model.name for row in rows))


def _weights(rows: Sequence[Row]) -> str:
    models = [row.record.request.model for row in rows]
    parts = (
        f"{model.weights} weights, "
        + ("all layers" if model.layers is None else f"the first {count(model.layers, 'layer')}")
        for model in models
    )
    return " and ".join(dict.fromkeys(parts))


def _where(rows: Sequence[Row]) -> str:
    places = []
    for row in rows:
        environment, device = row.record.environment, row.record.request.device
        if environment is not None:
            threads = f" (CPU, {count(environment.cpu_threads, 'thread')})" if device == "cpu" else ""
            places.append(counted(item.name for item in environment.devices) + threads)
    # Runs that never reached a device have no environment; the request still names its kind.
    return " and ".join(dict.fromkeys(places or [row.record.request.device for row in rows]))


def count(number_of: int, noun: str) -> str:
    """A number with its noun, in the plural where it needs one."""
    return f"{number_of} {noun}" if number_of == 1 else f"{number_of} {noun}s"
