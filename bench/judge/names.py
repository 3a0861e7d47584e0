"""Names of runs of one backend that differ in what was observed, and not in what was asked for.

``tell_apart(rows)`` gives them; what differs in what was asked for has its name from ``bench.judge.labels``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from bench.judge.checks import Check, checks_of
from bench.judge.families import BY_NAME
from bench.judge.labels import telling_apart
from bench.judge.rows import Row, names_of
from bench.judge.values import short


def tell_apart(rows: Sequence[Row]) -> tuple[Row, ...]:
    """``rows`` under names that tell apart runs of one label that differ in what was observed.

    Two cards, two attention kernels: each is a line of its own wherever the runs are shown, so that nothing
    is averaged over both. Another commit or library is no reason while every repeat is there once: that is
    a sweep that was gone on with later.
    """
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        if row.completed:
            by_label.setdefault(row.label, []).append(row)
    checks = [check for check in checks_of(rows) if check.family and check.of_every_repeat]
    labels = {row: row.label for row in rows}
    for own in by_label.values():
        if len(own) > 1:
            labels |= _told_apart(own, checks)
    names = names_of([labels[row] for row in rows], [row.repeat for row in rows])
    return tuple(
        row if labels[row] == row.label else replace(row, label=labels[row], name=name)
        for row, name in zip(rows, names, strict=True)
    )


def _told_apart(rows: Sequence[Row], checks: Sequence[Check]) -> dict[Row, str]:
    """Row -> its label, with as few of its conditions as tell it apart."""
    twice = len({row.repeat for row in rows}) < len(rows)
    telling = [check for check in checks if twice or not BY_NAME[check.family or ""].repeatable]
    seen = [
        {check.name: short(text) for check in telling if (text := check.read_if_used(row)) is not None}
        for row in rows
    ]
    names = telling_apart(seen)
    return {
        row: _with(row.label, [f"{name}={own[name]}" for name in names if name in own])
        for row, own in zip(rows, seen, strict=True)
    }


def _with(label: str, settings: Sequence[str]) -> str:
    if not settings:
        return label
    head, bracket, rest = label.partition(" (")
    inside = [rest.removesuffix(")"), *settings] if bracket else settings
    return f"{head} ({', '.join(inside)})"
