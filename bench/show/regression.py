"""A comparison of BASE with NEW in the terminal and as plain values, and how each of its findings is written.

``regression_table(regression)`` is for a rich console, ``regression_values(regression)`` for ``--json``;
``regression_markdown`` writes the same lines for a pull request.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from bench.judge.regression import Regression
from bench.judge.regression_findings import Finding, Result
from bench.judge.rows import median
from bench.show.columns import GIB, MISSING, gib, number

if TYPE_CHECKING:
    from rich.console import RenderableType

TITLES = ("Backend", "Figure", "BASE", "NEW", "Change", "Allowed", "Result", "Why")
WORDS: Mapping[Result, str] = {
    "worse": "regression",
    "incomparable": "not comparable",
    "better": "improvement",
    "changed": "changed",
    "untold": "cannot be told",
    "same": "unchanged",
}
"""What a result is called, in the order in which it is shown."""
PLURALS: Mapping[Result, str] = {"worse": "regressions", "better": "improvements"}
STYLES: Mapping[Result, str] = {"worse": "bold red", "incomparable": "bold red", "better": "green"}
MIB = 2**20
SMALL_BYTES = GIB // 10
"""Less than this is written in MiB."""
LEGEND = (
    "BASE and NEW: medians over the runs of a side. Change: the ratio of their geometric means, with its "
    "95 % interval where both sides have several runs; it is a regression where the whole interval lies "
    "beyond what is allowed. Counted figures need no interval."
)


# ---- one finding in words ------------------------------------------------------------------------


def cells(finding: Finding) -> tuple[str, ...]:
    """The cells of one line, under `TITLES`."""
    return (
        finding.label,
        finding.title,
        _side(finding, finding.base, finding.base_words),
        _side(finding, finding.new, finding.new_words),
        _change(finding),
        _allowed(finding),
        WORDS[finding.result],
        finding.note,
    )


def _side(finding: Finding, values: Sequence[float], in_words: str) -> str:
    if finding.unit is None:
        return in_words
    middle = median(values)
    if middle is None:
        return MISSING
    if finding.unit == "bytes":
        return f"{gib(middle)} GiB" if middle >= SMALL_BYTES else f"{number(middle / MIB)} MiB"
    unit = "" if finding.unit == "ratio" else f" {finding.unit}"
    return number(middle, 4 if finding.unit == "nats" else 3) + unit


def _change(finding: Finding) -> str:
    if finding.difference is not None:
        return _signed(finding.difference)
    if finding.factor is None:
        return MISSING
    interval = finding.interval
    ends = f" ({_percent(interval.low)} to {_percent(interval.high)})" if interval else ""
    return f"{_percent(finding.factor)} %{ends}"


def _allowed(finding: Finding) -> str:
    if finding.limit is None:
        return MISSING
    if finding.difference is not None:
        return _signed(finding.limit)
    # In either direction a change of the first loss is one for the worse.
    sign = "+/- " if finding.figure == "first_loss" else ""
    return f"{sign}{_percent(finding.limit).lstrip('+' if sign else '')} %"


def _percent(factor: float) -> str:
    """A factor as a change in percent, without the unit; what is small is not written as nothing."""
    percent = 100 * (factor - 1)
    if not math.isfinite(percent):
        return number(percent)
    if percent == 0:
        return "0"
    return f"{percent:+.1f}" if abs(percent) >= 0.05 else f"{percent:+.1e}"


def _signed(value: float) -> str:
    return number(value) if not math.isfinite(value) else f"{value:+.3g}" if value else "0"


# ---- the whole in words --------------------------------------------------------------------------


def headline(regression: Regression) -> str:
    """How many findings there are of each kind: regressions first, also where there is none."""
    counts = {result: len(regression.of(result)) for result in WORDS}
    parts = [
        f"{count or 'no'} {WORDS[result] if count == 1 else PLURALS.get(result, WORDS[result])}"
        for result, count in counts.items()
        if count or result == "worse"
    ]
    runs = f"{regression.new_runs} run(s) of NEW beside {regression.base_runs} of BASE"
    return f"{', '.join(parts)}; {runs}"


def changed_surroundings(regression: Regression) -> tuple[str, ...]:
    """What differs between the sides as a whole, a sentence each."""
    return tuple(f"{one.name}: {one.base} -> {one.new}" for one in regression.changes)


def telling(regression: Regression) -> tuple[Finding, ...]:
    """The findings that are shown without being asked for: all but what is unchanged, or cannot be told and
    does not look worse than is allowed either."""
    shown = [one for one in regression.findings if one.result not in ("same", "untold") or one.beyond]
    rank = list(WORDS)
    return tuple(sorted(shown, key=lambda one: rank.index(one.result)))


# ---- terminal ------------------------------------------------------------------------------------


def regression_table(regression: Regression, *, everything: bool = False) -> RenderableType:
    """What changed, what it means, and what to keep in mind; ``everything``: unchanged figures too."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    findings = regression.findings if everything else telling(regression)
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    # Reasons are sentences, and stand below.
    for title in TITLES[:-1]:
        table.add_column(title, overflow="fold", no_wrap=title == "Allowed")
    for finding in findings:
        # Text, never str: rich would read square brackets in a value as markup.
        style = STYLES.get(finding.result, "")
        table.add_row(*(Text(cell, style=style) for cell in cells(finding)[:-1]))
    above = [Text(f"Changed: {text}") for text in changed_surroundings(regression)]
    hidden = len(regression.findings) - len(findings)
    below = [
        f"{finding.label}, {finding.title}: {finding.note}"
        for finding in findings
        if finding.note and finding.result not in ("same", "untold")
    ]
    if hidden:
        below.append(f"{hidden} figures without a telling change are not shown (--all shows them).")
    notes = [Text(f"Note: {note}", style="yellow") for note in regression.notes]
    body: list[RenderableType] = [table, Text("")] if findings else []
    summary = Text(headline(regression), style="bold red" if regression.failed else "bold")
    return Group(*above, *body, *(Text(text) for text in (*below, LEGEND)), *notes, summary)


# ---- plain values --------------------------------------------------------------------------------


def regression_values(regression: Regression) -> dict[str, Any]:
    """Everything as plain values; numbers that are not finite are words, as in a record."""
    found: dict[str, Any] = {
        "failed": regression.failed,
        "summary": headline(regression),
        "base_runs": regression.base_runs,
        "new_runs": regression.new_runs,
        "changes": [dataclasses.asdict(change) for change in regression.changes],
        "findings": [dataclasses.asdict(finding) for finding in regression.findings],
        "notes": list(regression.notes),
    }
    plain: dict[str, Any] = _plain(found)
    return plain


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _plain(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(part) for part in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
