"""What the page says first: what was measured and where, and the few answers that matter, as tiles.

``headline(comparison)`` is the same in sentences, for who reads no more than that.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from bench.judge.comparison import Comparison
from bench.judge.groups import FIGURES, Group, Summary
from bench.judge.rows import Row
from bench.judge.scaler import failing_steps
from bench.judge.stability import BAD, VerdictName
from bench.judge.values import counted
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
        group = comparison.groups[0]
        several = len(comparison.groups) > 1
        of = ("in the largest group of alike runs",) if several else ()
        memory = _extreme(
            group, "peak_memory_bytes", ("Lowest memory measured", "Memory"), "GiB at the peak", gib
        )
        speed = _extreme(
            group, "tokens_per_second", ("Highest speed measured", "Speed"), "tokens/s", number
        )
        tiles = [Tile(t.title, t.answer, (*t.details, *of)) for t in (memory, speed) if t]
    if comparison.rows:
        tiles.append(went_wrong(comparison))
    return tiles


def _extreme(
    group: Group,
    field: str,
    titles: tuple[str, str],
    unit: str,
    form: Callable[[float | None], str],
) -> Tile | None:
    """The better end of a figure and the next after it; the second title where there is no next. Whoever
    cannot be told apart from the first is named with it."""
    known = [
        (spread, summary)
        for summary in group.summaries
        if (spread := summary.figures.get(field)) and math.isfinite(spread.median)
    ]
    if not known:
        return None
    known.sort(key=lambda pair: pair[0].median, reverse=FIGURES[field] == "highest")
    first = group.rankings[field].best
    leading = {s.label for spread, s in known if spread.median == known[0][0].median}
    if first is not None:
        # Everyone ranked is first where nobody is surely better than anybody.
        leading = set(first or group.rankings[field].standings)
    leaders = [(spread, summary) for spread, summary in known if summary.label in leading]
    others = [(spread, summary) for spread, summary in known if summary.label not in leading]
    ends = list(dict.fromkeys(form(spread.median) for spread, _ in (leaders[0], leaders[-1])))
    value = f"{' to '.join(ends)} {unit}"
    names = " and ".join(_with_verdict(summary) for _, summary in leaders)
    tie = "cannot be told apart" if len(ends) > 1 else "equal"
    if not others:
        return Tile(titles[1], names, (value, "nothing to compare it with" if len(known) == 1 else tie))
    following, runner_up = others[0]
    doubt = _doubt(group, field, leaders[0][1].label, runner_up.label)
    told = (value, tie) if len(ends) > 1 else (value,)
    following_in_words = f"next: {_with_verdict(runner_up)}, {form(following.median)}{doubt}"
    return Tile(titles[0], names, (*told, following_in_words))


def _doubt(group: Group, field: str, leader: str, runner_up: str) -> str:
    """Why the next after the first may not be behind it at all."""
    if group.rankings[field].best is not None:
        standing = group.standing(field, runner_up)
        return "" if standing and standing.rank is not None else ", not ranked: too few runs"
    spreads = {summary.label: summary.figures.get(field) for summary in group.summaries}
    one, other = spreads[leader], spreads[runner_up]
    assert one is not None
    assert other is not None
    return ", but the ranges overlap" if one.low <= other.high and other.low <= one.high else ""


def _with_verdict(summary: Summary) -> str:
    """A backend whose training broke is no choice, however small or fast: its name never stands alone."""
    return summary.label if summary.sound else f"{summary.label} ({fault_in_words(summary)})"


def fault_in_words(summary: Summary) -> str:
    """What broke a training that is not sound, in a word or two."""
    verdict = summary.verdict.verdict
    return words(verdict) if verdict in BAD else words("non_finite")


def went_wrong(comparison: Comparison) -> Tile:
    """What failed or broke; that nothing did is an answer too."""
    rows = runs_shown(comparison)
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
