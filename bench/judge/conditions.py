"""What should be the same for all completed runs, and who had which value.

Runs that differ in a condition with a family (``bench.judge.families``) are not alike: ``breaking``, or
``allowed`` where a person said so. Without a family it is ``declared``: said beside the figures, which may
stand side by side all the same. Where they stand in a record is in ``bench.judge.checks``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.judge.checks import NOT_RECORDED, Check, checks_of
from bench.judge.rows import Row

Kind = Literal["breaking", "allowed", "declared"]


@dataclass(frozen=True)
class ConditionValue:
    """One value of a condition, and the names of the runs that had it."""

    text: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Condition:
    """One thing that should be the same for all completed runs."""

    name: str
    kind: Kind
    values: tuple[ConditionValue, ...]
    differs: bool
    """Some values differ where they must agree; seeded values must agree within a repeat only."""
    family: str | None = None
    """What allows it (``--allow``); None: it splits nothing."""

    @property
    def shown_identical(self) -> bool:
        """Whether the records prove that all runs agree: what none recorded, none shares."""
        recorded = all(value.text != NOT_RECORDED for value in self.values)
        return bool(self.values) and recorded and not self.differs


def find_conditions(completed: Sequence[Row], allow: Collection[str] = ()) -> tuple[Condition, ...]:
    """Every condition, with the values that the completed runs had; ``allow``: families that may differ."""
    total = Counter(row.label for row in completed)
    return tuple(_condition(check, completed, allow, total) for check in checks_of(completed))


def _condition(check: Check, rows: Sequence[Row], allow: Collection[str], total: Counter[str]) -> Condition:
    by_text: dict[str, list[Row]] = {}
    for row in rows:
        text = check.read_if_used(row)
        if text is not None:
            by_text.setdefault(text, []).append(row)
    values = tuple(ConditionValue(text, _who(members, total)) for text, members in by_text.items())
    kind: Kind = "declared" if check.family is None else "allowed" if check.family in allow else "breaking"
    return Condition(check.name, kind, values, _differs(check, by_text), check.family)


def _differs(check: Check, by_text: Mapping[str, Sequence[Row]]) -> bool:
    """Whether one scope has several of the values."""
    if len(by_text) < 2 or check.of_every_repeat:
        return len(by_text) > 1
    scopes = [{check.scope(row) for row in members} for members in by_text.values()]
    return sum(map(len, scopes)) > len(set().union(*scopes))


def _who(members: Sequence[Row], total: Counter[str]) -> tuple[str, ...]:
    """Labels of ``members``; the repeat is named where only some of a label's ``total`` are among them."""
    if len(members) == total.total():
        return tuple(total)
    own = Counter(row.label for row in members)
    names = (row.label if own[row.label] == total[row.label] else row.name for row in members)
    return tuple(dict.fromkeys(names))
