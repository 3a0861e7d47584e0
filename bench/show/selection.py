"""What is shown of many runs: which kinds the figures draw, and which runs the tables of single runs list.

Up to `KINDS_DRAWN` kinds of run (labels) and `RUNS_LISTED` runs, everything is shown. Of more, a fixed rule
chooses, and ``Selection`` says in words what was left out and where it is. The main table has a line for
every kind whatever their number; figures of a sweep summarize every run.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.judge.comparison import Comparison
from bench.judge.rows import Row
from bench.judge.stability import BAD
from bench.show.runs_shown import runs_shown

KINDS_DRAWN = 16
"""Kinds of run in a figure: more lines, bars or colours than these are not told apart by eye."""
RUNS_LISTED = 100
"""Runs in a table that has a line for each run."""


@dataclass(frozen=True)
class Selection:
    """The part of the runs that is shown one by one."""

    drawn: tuple[str, ...]
    """Labels that figures show."""
    listed: tuple[Row, ...]
    """Runs that tables of stability show, in the order of the comparison."""
    every: tuple[Row, ...]
    """Runs that the other tables of single runs show: those that only narrow down a margin too."""
    drawn_note: str
    """What the figures leave out; empty: nothing."""
    listed_note: str
    """What the tables of stability leave out; empty: nothing."""
    every_note: str
    """What the other tables of single runs leave out; empty: nothing."""


def select(comparison: Comparison) -> Selection:
    """Choose by the rule that the notes tell."""
    shown = runs_shown(comparison)
    kinds = tuple(dict.fromkeys(row.label for row in shown))
    drawn = kinds
    if len(kinds) > KINDS_DRAWN:
        drawn = tuple(_in_turn(_kinds_in_order(comparison, shown)))[:KINDS_DRAWN]
    listed, every = _listed(shown), _listed(comparison.rows)
    return Selection(
        drawn,
        listed,
        every,
        _drawn_note(len(drawn), len(kinds)),
        _listed_note(listed, shown),
        _listed_note(every, comparison.rows),
    )


def _kinds_in_order(comparison: Comparison, shown: Sequence[Row]) -> list[Row]:
    """One run of each kind: those of the largest group first, those that did not complete last."""
    group_of = {row: place for place, group in enumerate(comparison.groups) for row in group.rows}
    last = len(comparison.groups)
    firsts: dict[str, Row] = {}
    for row in sorted(shown, key=lambda row: group_of.get(row, last)):
        firsts.setdefault(row.label, row)
    return list(firsts.values())


def _in_turn(firsts: Sequence[Row]) -> Iterator[str]:
    """Their labels, one of each backend before a second of any."""
    by_backend: dict[str, list[str]] = {}
    for row in firsts:
        by_backend.setdefault(row.record.request.backend, []).append(row.label)
    for turn in range(max(map(len, by_backend.values()), default=0)):
        yield from (labels[turn] for labels in by_backend.values() if turn < len(labels))


def _listed(shown: Sequence[Row]) -> tuple[Row, ...]:
    """Every kind before any second run of one, and what went wrong before what did not."""
    firsts: Mapping[str, Row] = {row.label: row for row in reversed(shown)}
    by_weight = sorted(shown, key=lambda row: (firsts[row.label] is not row, not _went_wrong(row)))
    kept = set(by_weight[:RUNS_LISTED])
    return tuple(row for row in shown if row in kept)


def _went_wrong(row: Row) -> bool:
    return not row.completed or row.verdict.verdict in BAD


def _drawn_note(drawn: int, kinds: int) -> str:
    if drawn == kinds:
        return ""
    return (
        f"{drawn} of {kinds} kinds of run are drawn: of the largest group of alike runs first, and of each "
        "backend one before a second. The main table has them all."
    )


def _listed_note(listed: Sequence[Row], shown: Sequence[Row]) -> str:
    if len(listed) == len(shown):
        return ""
    return (
        f"{len(listed)} of {len(shown):,} runs are listed: of each kind one before a second, and what went "
        "wrong first. The others are in report.csv, a line for each run (qlora-bench report --format csv)."
    )
