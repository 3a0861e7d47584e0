"""A comparison of BASE with NEW as a comment on a pull request.

One line says whether anything got worse; regressions stand below it, and the rest is folded away. GitHub
takes comments of at most 65,536 characters, so long tables are cut, and say so.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.judge.regression import Regression
from bench.judge.regression_findings import Finding
from bench.show.escaping import escaped
from bench.show.regression import LEGEND, TITLES, cells, changed_surroundings, headline, telling

MOST_CHARACTERS = 60_000
"""Of the whole comment; GitHub refuses more than 65,536."""


def regression_markdown(regression: Regression) -> str:
    """The whole comment."""
    lead = "**Worse**" if regression.failed else "**Not worse**"
    blocks = [f"{lead}: {_safe(headline(regression))}."]
    blocks += ["\n".join(f"- {_safe(text)}" for text in changed_surroundings(regression))]
    failing = [finding for finding in regression.findings if finding.fails]
    others = [finding for finding in telling(regression) if not finding.fails]
    shown = {id(finding) for finding in (*failing, *others)}
    rest = [finding for finding in regression.findings if id(finding) not in shown]
    notes = "\n".join(f"- {_safe(note)}" for note in (LEGEND, *regression.notes))
    room = MOST_CHARACTERS - sum(len(block) for block in (*blocks, notes))
    for block in _tables(failing, others, rest, room):
        blocks.append(block)
    blocks.append(_folded("How to read this", notes))
    return "\n\n".join(block for block in blocks if block) + "\n"


def _tables(
    failing: Sequence[Finding], others: Sequence[Finding], rest: Sequence[Finding], room: int
) -> Iterator[str]:
    for title, findings in (
        ("", failing),
        (f"Improvements and other changes ({len(others)})", others),
        (f"Everything else ({len(rest)})", rest),
    ):
        if findings:
            block = _table(findings, room)
            room -= len(block)
            yield _folded(title, block) if title else block


def _table(findings: Sequence[Finding], room: int) -> str:
    """As many lines as there is room for."""
    head = [_line(TITLES), _line(["---"] * len(TITLES))]
    room -= sum(len(line) + 1 for line in head)
    lines: list[str] = []
    for finding in findings:
        line = _line([_safe(cell) for cell in cells(finding)])
        room -= len(line) + 1
        if room < 0:
            break
        lines.append(line)
    left = len(findings) - len(lines)
    table = "\n".join([*head, *lines]) if lines else ""
    if not left:
        return table
    cut = f"{left} more do not fit into a comment; `qlora-bench compare --json` has all of them."
    return f"{table}\n\n{cut}" if table else cut


def _line(texts: Sequence[str]) -> str:
    return f"| {' | '.join(texts)} |"


def _folded(title: str, body: str) -> str:
    return f"<details><summary>{title}</summary>\n\n{body}\n\n</details>"


def _safe(text: str) -> str:
    """As it is: no markup, and nobody is called by a name that stands in a record."""
    return escaped(text).replace("@", "&#64;")
