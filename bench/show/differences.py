"""What every figure says of runs that are not alike: the differences that were allowed, and who stands apart.

``notes_on(comparison)`` gives the sentences; tables have them in their captions, and ``noted(plot, notes)``
puts them into a figure, so that it cannot be shown without.
"""

from __future__ import annotations

import html
import re
import textwrap
from collections.abc import Sequence
from dataclasses import replace

from bench.errors import printable
from bench.judge.comparison import Comparison
from bench.judge.groups import Group
from bench.judge.rows import Row
from bench.judge.unlike import in_words, listed
from bench.show.drawing import FONTS, Plot
from bench.show.runs_shown import runs_shown

GROUPS_NAMED = 3
"""Groups besides the largest that a figure names; of more it says how many there are."""
NAMED = 4
"""Runs and conditions that it names of each."""
LINE_CHARACTERS, LINE_HEIGHT, FONT_SIZE = 84, 12.0, 9
"""Of the note in a figure, which is as wide as all figures are."""


def notes_on(comparison: Comparison) -> tuple[str, ...]:
    """The allowed differences, and which of the runs that are shown stand apart; empty: all are alike."""
    return tuple(filter(None, (allowed_in_words(comparison), _apart_in_words(comparison))))


def allowed_in_words(comparison: Comparison) -> str:
    """One sentence; empty where nothing that was allowed differs."""
    allowed = comparison.allowed
    if not allowed:
        return ""
    head = "Allowed difference" if len(allowed) == 1 else "Allowed differences"
    return f"{head}: {'; '.join(in_words(condition) for condition in allowed)}."


def allowed_values(row: Row, comparison: Comparison) -> str | None:
    """What a run had of every allowed difference; None: there is none, or it did not complete."""
    had = (
        f"{condition.name}={value.text}"
        for condition in comparison.allowed
        for value in condition.values
        if row.label in value.names or row.name in value.names
    )
    return "; ".join(had) or None


def group_titles(comparison: Comparison) -> tuple[str, ...]:
    """The heading of each group's lines in a table."""
    groups = comparison.groups
    if not groups:
        return ()
    if len(groups) == 1:
        but_for = listed([condition.name for condition in comparison.allowed], NAMED)
        return (f"Completed, alike but for {but_for}" if but_for else "Completed, all with the same work",)
    told = ("the largest group of alike runs", *(f"apart by {_why(group)}" for group in groups[1:]))
    return tuple(f"Group {place} of {len(groups)}: {text}" for place, text in enumerate(told, start=1))


def _apart_in_words(comparison: Comparison) -> str:
    shown = set(runs_shown(comparison))
    groups = [
        (place, group)
        for place, group in enumerate(comparison.groups, start=1)
        if not shown.isdisjoint(group.rows)
    ]
    if len(groups) < 2:
        return ""
    if len(groups) > GROUPS_NAMED + 1:
        return f"The runs stand in {len(groups)} groups that are not alike: compare within a group only."
    parts = (f"group {place}: {_labels(group)} (apart by {_why(group)})" for place, group in groups[1:])
    return f"Not all alike, compare within a group only; {'; '.join(parts)}."


def _why(group: Group) -> str:
    """The conditions that set a group apart; the seeds where there are none, for it shares no repeat."""
    return listed([one.name for one in group.differences], NAMED) or "their seeds"


def _labels(group: Group) -> str:
    return listed([summary.label for summary in group.summaries], NAMED)


# ---- in a figure ---------------------------------------------------------------------------------


def noted(plot: Plot, notes: Sequence[str]) -> Plot:
    """``plot`` with ``notes`` written below it, and told to who does not see it."""
    if not notes:
        return plot
    lines = [line for note in notes for line in textwrap.wrap(note, LINE_CHARACTERS)]
    box = re.search(r'viewBox="0 0 ([\d.]+) ([\d.]+)"', plot.svg)
    assert box is not None, "every figure begins with its size"
    width, height = float(box.group(1)), float(box.group(2))
    written = "".join(
        f'<text x="4" y="{height + (place + 0.9) * LINE_HEIGHT:g}" font-size="{FONT_SIZE}px" '
        f'font-family="{FONTS}" fill="currentColor">{html.escape(printable(line))}</text>'
        for place, line in enumerate(lines)
    )
    words = " ".join((plot.alternative, *notes))
    taller = f'viewBox="0 0 {width:g} {height + (len(lines) + 0.5) * LINE_HEIGHT:g}"'
    svg = plot.svg.replace(box.group(0), taller, 1)
    svg = svg.replace(
        f'aria-label="{html.escape(printable(plot.alternative))}"',
        f'aria-label="{html.escape(printable(words))}"',
        1,
    )
    return replace(plot, svg=svg.removesuffix("</svg>") + written + "</svg>", alternative=words)
