"""Records side by side: derived figures, who did the same work as whom, and what must be said beside it.

``compare(records)`` gives a `Comparison`, from which every table, plot and page is made.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.judge.conditions import Condition, find_conditions
from bench.judge.doubts import caveat, warnings
from bench.judge.groups import Group, find_groups
from bench.judge.ranking import check_baseline
from bench.judge.rows import Row, make_rows
from bench.record.schema import Record


@dataclass(frozen=True)
class Comparison:
    """Everything that a person is shown about a set of records."""

    rows: tuple[Row, ...]
    """One for each record; a run that failed is a row too."""
    groups: tuple[Group, ...]
    """Completed runs that did the same work, largest group first."""
    conditions: tuple[Condition, ...]
    caveat: str
    """What may and may not be concluded from so many runs."""
    warnings: tuple[str, ...]

    @property
    def differences(self) -> tuple[Condition, ...]:
        """The conditions whose values differ."""
        return tuple(condition for condition in self.conditions if condition.differs)

    @property
    def failures(self) -> tuple[Row, ...]:
        """The runs that did not complete."""
        return tuple(row for row in self.rows if not row.completed)


def compare(records: Iterable[Record], baseline: str | None = None) -> Comparison:
    """Derive every figure from ``records`` and find out which of them may stand side by side.

    ``baseline``: the label that ratios are to; the unquantized backend, else the first, where it is None or
    not in a group. Raises UserError where no completed run has it.
    """
    rows = make_rows(list(records))
    completed = [row for row in rows if row.completed]
    if baseline is not None:
        check_baseline(baseline, [row.label for row in completed], [row.label for row in rows])
    groups = find_groups(completed, baseline)
    conditions = find_conditions(completed)
    return Comparison(rows, groups, conditions, caveat(groups), warnings(rows, groups, conditions))
