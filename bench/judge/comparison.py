"""Records side by side: derived figures, who did the same work as whom, and what must be said beside it.

``compare(records, allow)`` gives a `Comparison`, from which every table, plot and page is made.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass

from bench.judge.conditions import Condition, find_conditions
from bench.judge.doubts import caveat, warnings
from bench.judge.groups import Group, find_groups
from bench.judge.names import tell_apart
from bench.judge.ranking import check_baseline
from bench.judge.rows import Row, make_rows
from bench.record.collector import collector_paused
from bench.record.schema import Record


@dataclass(frozen=True)
class Comparison:
    """Everything that a person is shown about a set of records."""

    rows: tuple[Row, ...]
    """One for each record; a run that failed is a row too."""
    groups: tuple[Group, ...]
    """Completed runs that are alike, largest group first."""
    conditions: tuple[Condition, ...]
    caveat: str
    """What may and may not be concluded from so many runs."""
    warnings: tuple[str, ...]

    @property
    def differences(self) -> tuple[Condition, ...]:
        """The conditions whose values differ."""
        return tuple(condition for condition in self.conditions if condition.differs)

    @property
    def allowed(self) -> tuple[Condition, ...]:
        """The differences that a person allowed: they are printed at every figure."""
        return tuple(condition for condition in self.differences if condition.kind == "allowed")

    @property
    def failures(self) -> tuple[Row, ...]:
        """The runs that did not complete."""
        return tuple(row for row in self.rows if not row.completed)


def compare(
    records: Iterable[Record],
    allow: Collection[str] = (),
    baseline: str | None = None,
    notes: Sequence[str] = (),
) -> Comparison:
    """Derive every figure from ``records`` and find out which of them may stand side by side.

    ``allow``: families of conditions (``bench.judge.families``) in which alike runs may differ. ``baseline``:
    the label that ratios are to; the unquantized backend, else the first, where it is None or not in a group.
    ``notes``: what is known of the set itself, to stand before all other warnings.
    Raises UserError where no completed run has it.
    """
    # From the reading on, where ``records`` are read one after another.
    with collector_paused():
        return _compared(list(records), allow, baseline, notes)


def _compared(
    records: Sequence[Record], allow: Collection[str], baseline: str | None, notes: Sequence[str]
) -> Comparison:
    rows = tell_apart(make_rows(records))
    completed = [row for row in rows if row.completed]
    if baseline is not None:
        check_baseline(baseline, [row.label for row in completed], [row.label for row in rows])
    groups = find_groups(completed, allow, baseline)
    conditions = find_conditions(completed, allow)
    doubts = (*notes, *warnings(rows, groups, conditions))
    return Comparison(rows, groups, conditions, caveat(groups), doubts)
