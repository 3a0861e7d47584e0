"""What got slower, bigger or less stable from one set of records to another.

``find_regressions(base, new, limits)`` pairs the runs that were asked the same and did the same work
(``regression_asks``, ``regression_pairs``) and holds every change against its limit (``regression_limits``).
BASE and NEW may differ in the harness and in the versions of libraries: that is what they are compared for.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass

from bench.errors import UserError
from bench.judge.regression_asks import Ask, Difference, sort_by_ask
from bench.judge.regression_changes import changes_between, notes_about
from bench.judge.regression_computed import computed_findings
from bench.judge.regression_counted import counted_findings
from bench.judge.regression_findings import Finding, Result
from bench.judge.regression_limits import Limits
from bench.judge.regression_measured import measured_findings
from bench.judge.regression_outcomes import (
    one_sided_finding,
    outcome_findings,
    stability_finding,
    unlike_finding,
)
from bench.judge.regression_pairs import Match, OneSided, Unlike, match
from bench.judge.regression_runs import SILENT, Run


@dataclass(frozen=True)
class Regression:
    """Everything that is to be said of NEW beside BASE."""

    base_runs: int
    new_runs: int
    changes: tuple[Difference, ...]
    """What differs between the two sides as a whole: harness, libraries, system, and what was allowed."""
    findings: tuple[Finding, ...]
    """Ask by ask: outcome, stability, measured, counted, computed."""
    notes: tuple[str, ...]
    """What to keep in mind."""

    @property
    def failed(self) -> bool:
        """Whether there is a regression, or a run of BASE that cannot be judged any more."""
        return any(finding.fails for finding in self.findings)

    def of(self, *results: Result) -> tuple[Finding, ...]:
        """The findings with one of these results."""
        return tuple(finding for finding in self.findings if finding.result in results)


def find_regressions(
    base: Sequence[Run], new: Sequence[Run], limits: Limits, allow: Collection[str] = ()
) -> Regression:
    """Compare NEW with BASE; ``allow``: families of conditions that may differ beside versions and commit.

    Raises UserError, naming what differs, where no run of NEW can be held against any of BASE.
    """
    told = [run for run in base if run.record.status not in SILENT]
    seen = [run for run in new if run.record.status not in SILENT]
    asks, options = sort_by_ask(told, seen, allow)
    findings: list[Finding] = []
    matches: list[Match] = []
    unlike: list[Unlike] = []
    for ask in asks:
        findings += outcome_findings(ask, limits)
        if not (ask.base and ask.new):
            continue
        for part in match(ask, allow):
            if isinstance(part, Match):
                matches.append(part)
                findings += [stability_finding(part, limits), *measured_findings(part, limits)]
                findings += [*counted_findings(part, limits), *computed_findings(part, limits)]
            elif isinstance(part, OneSided):
                # Where one side completed none of them, the outcome says so.
                if any(run.completed for run in ask.base) and any(run.completed for run in ask.new):
                    findings.append(one_sided_finding(part, limits))
            else:
                unlike.append(part)
                findings.append(unlike_finding(part, limits))
    shared = [ask for ask in asks if ask.base and ask.new]
    if not shared or (unlike and not matches):
        raise _nothing_comparable(asks, unlike)
    allowed = dict.fromkeys(difference for part in matches for difference in part.allowed)
    both = [run for ask in shared for run in ask.base], [run for ask in shared for run in ask.new]
    return Regression(
        base_runs=len(base),
        new_runs=len(new),
        changes=(*changes_between(*both), *options, *allowed),
        findings=tuple(findings),
        notes=tuple(notes_about(base, new, matches)),
    )


def _nothing_comparable(asks: Sequence[Ask], unlike: Sequence[Unlike]) -> UserError:
    if unlike:
        told = dict.fromkeys(
            f"{difference.name}: {difference.base} -> {difference.new}"
            for part in unlike
            for difference in part.differences
        )
        return UserError(f"no run of NEW did the same work as one of BASE ({'; '.join(list(told)[:3])})")
    base, new = [ask.label for ask in asks if ask.base], [ask.label for ask in asks if ask.new]
    return UserError(
        f"no run of NEW was asked the same as one of BASE (BASE: {_few(base)}; NEW: {_few(new)})",
        "make both with the same flags",
    )


def _few(labels: Sequence[str]) -> str:
    shown = ", ".join(labels[:3]) or "nothing"
    return f"{shown} and {len(labels) - 3} more" if len(labels) > 3 else shown
