"""What is no figure: which runs are there, how they ended, and what their stability was judged to be."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence

from bench.judge.regression_asks import Ask
from bench.judge.regression_findings import Finding, Result
from bench.judge.regression_limits import Gate, Limits
from bench.judge.regression_pairs import Match, OneSided, Unlike
from bench.judge.regression_runs import Run
from bench.judge.stability import GRAVITY
from bench.judge.thresholds import Evidence

NO_RUN = "no run"
TOLD_REASONS = 2
"""Messages of failed runs that are quoted."""


def outcome_findings(ask: Ask, limits: Limits) -> Iterator[Finding]:
    """How the runs of one ask ended, where both sides have some; else which side has them."""
    base, new = _words(ask.base), _words(ask.new)
    if not ask.new:
        yield _lost(ask.label, base, limits, had=any(run.completed for run in ask.base))
    elif not ask.base:
        yield Finding(ask.label, "missing", "runs", "changed", base_words=NO_RUN, new_words=new)
    else:
        result = _changed_outcome(ask.base, ask.new, limits.gate.failures)
        note = _reasons(ask.new) if result != "same" else ""
        yield Finding(ask.label, "failures", "outcome", result, base_words=base, new_words=new, note=note)


def one_sided_finding(part: OneSided, limits: Limits) -> Finding:
    """Completed runs of which the other side has none that did the same work, though it has others."""
    if part.base:
        return _lost(part.label, _words(part.base), limits, had=True)
    return Finding(part.label, "missing", "runs", "changed", base_words=NO_RUN, new_words=_words(part.new))


def unlike_finding(part: Unlike, limits: Limits) -> Finding:
    """Runs that were asked the same and did other work."""
    told = "; ".join(f"{one.name}: {one.base} -> {one.new}" for one in part.differences)
    return Finding(
        part.label,
        "unlike",
        "work",
        "incomparable" if limits.gate.unlike == "fail" else "changed",
        base_words=_words(part.base),
        new_words=_words(part.new),
        note=f"they did not do the same work: {told}",
    )


def _lost(label: str, base: str, limits: Limits, *, had: bool) -> Finding:
    """A run that BASE did not complete either is no loss."""
    result: Result = "worse" if had and limits.gate.missing == "fail" else "changed"
    note = "BASE completed it and NEW has no run of it" if had else ""
    return Finding(label, "missing", "runs", result, base_words=base, new_words=NO_RUN, note=note)


# ---- how runs ended ------------------------------------------------------------------------------


def _changed_outcome(base: Sequence[Run], new: Sequence[Run], gate: Gate) -> Result:
    """Worse: fewer runs that complete, and a way to end that BASE does not know or none that completes."""
    old, now = _statuses(base), _statuses(new)
    before, after = old["completed"] / old.total(), now["completed"] / now.total()
    if after > before:
        return "better"
    if after < before and (now.keys() - old.keys() or not now["completed"]):
        return "worse" if gate == "fail" else "changed"
    return "same" if old.keys() == now.keys() and after == before else "changed"


def _statuses(runs: Sequence[Run]) -> Counter[str]:
    return Counter(run.record.status for run in runs)


def _words(runs: Sequence[Run]) -> str:
    """How many ended how; where they ended, if not at the end."""
    counts = Counter(
        run.record.status.replace("_", " ") + (f" ({run.record.stage})" if run.record.stage else "")
        for run in runs
    )
    return ", ".join(f"{count} x {text}" for text, count in counts.items()) or NO_RUN


def _reasons(runs: Sequence[Run]) -> str:
    told = dict.fromkeys(run.record.message for run in runs if not run.completed and run.record.message)
    quoted = list(told)[:TOLD_REASONS]
    more = f"; and {len(told) - len(quoted)} more reasons" if len(told) > len(quoted) else ""
    return "; ".join(quoted) + more


# ---- stability -----------------------------------------------------------------------------------


def stability_finding(match: Match, limits: Limits) -> Finding:
    """The gravest verdict of either side, and the measures that are newly beyond their thresholds."""
    base, new = _gravest(match.base), _gravest(match.new)
    old, now = (GRAVITY.index(run.row.verdict.verdict) for run in (base, new))
    newly = _newly_exceeded(match)
    if now < old or (now == old and newly):
        result: Result = "worse" if limits.gate.stability == "fail" else "changed"
        note = "; ".join((new.row.verdict.reason, *newly))
    elif now > old:
        result, note = "better", f"BASE: {base.row.verdict.reason}"
    else:
        result, note = "same", ""
    return Finding(
        match.label,
        "stability",
        "stability",
        result,
        base_words=_shares(match.base, base),
        new_words=_shares(match.new, new),
        note=note,
    )


def _gravest(runs: Sequence[Run]) -> Run:
    return min(runs, key=lambda run: GRAVITY.index(run.row.verdict.verdict))


def _shares(runs: Sequence[Run], gravest: Run) -> str:
    word = gravest.row.verdict.verdict
    share = sum(run.row.verdict.verdict == word for run in runs)
    told = word.replace("_", " ")
    return told if len(runs) == 1 else f"{told} ({share} of {len(runs)} runs)"


def _newly_exceeded(match: Match) -> tuple[str, ...]:
    """Measures beyond their thresholds in a run of NEW and in no run of BASE, also where synthetic weights
    leave the verdict open: the same work on the same numbers went well in BASE."""
    before = {one.measure.name for run in match.base for one in run.row.verdict.evidence if one.exceeded}
    found: dict[str, str] = {}
    for run in match.new:
        for one in run.row.verdict.evidence:
            if one.exceeded and one.measure.name not in before:
                found.setdefault(one.measure.name, _evidence(one))
    return tuple(found.values())


def _evidence(one: Evidence) -> str:
    value = "no value" if one.value is None else f"{one.value:.4g}"
    note = f" ({one.note})" if one.note else ""
    return f"{one.measure.name}: {value}{note}, allowed {one.limit:.4g}"
