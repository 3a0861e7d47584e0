"""The triage in the terminal: what was tried, what helped, what failed first, what to change."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.judge.ladder import ORDER_IN_WORDS, SYNTHETIC
from bench.record.triage import Confirmation, Evidence, Rung, Triage
from bench.show.columns import MISSING, number, words

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

HEALS = {True: "yes", False: "no", None: MISSING}


def ladder_text(triage: Triage) -> RenderableType:
    """Everything of a triage but the configurations, for a rich console."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = [Text(f"As asked: {evidence_in_words(triage.base)}.")]
    if triage.cause is not None:
        parts.append(Text(f"Cause: {triage.cause}."))
    if triage.rungs:
        parts += [Text(""), _rungs(triage), Text(""), Text(f"Order, {ORDER_IN_WORDS}.")]
    for seed in triage.confirmations:
        parts.append(Text(f"{confirmation_in_words(seed, triage)}."))
    if triage.weights == "synthetic":
        parts.append(Text(f"Note: {SYNTHETIC}.", style="yellow"))
    return Group(*parts, Text(""), Text(f"Result: {triage.conclusion}.", style="bold"))


def _rungs(triage: Triage) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for title in ("Change", "Kind", "Heals", "Evidence"):
        # Folded, not cut: half of a module's name names nothing.
        table.add_column(title, overflow="fold", min_width=24 if title == "Change" else None)
    for rung in triage.rungs:
        # Text, never str: rich would read square brackets in a value as markup.
        style = "bold" if rung.name == triage.chosen else ""
        cells = (rung.change, rung.kind, HEALS[rung.heals], rung_in_words(rung))
        table.add_row(*(Text(cell, style=style) for cell in cells))
    return table


def rung_in_words(rung: Rung) -> str:
    """What a rung showed, or why it was not run."""
    if rung.evidence is None:
        return f"not applicable: {rung.note}" if rung.note else "not applicable"
    return evidence_in_words(rung.evidence) + (f" ({rung.note})" if rung.note else "")


def evidence_in_words(evidence: Evidence) -> str:
    """How a run ended, where it failed, its loss and its verdict."""
    parts = [
        evidence.reason
        if evidence.outcome == "completed"
        else f"{words(evidence.outcome)}: {evidence.reason}"
    ]
    if evidence.failing_module is not None:
        parts.append(f"first in {evidence.failing_module}")
    if evidence.finite and evidence.steps > 1:
        parts.append(f"loss {number(evidence.first_loss, 4)} to {number(evidence.last_loss, 4)}")
    if evidence.outcome == "completed":
        parts.append(f"verdict {words(evidence.verdict)}")
    return "; ".join(parts)


def confirmation_in_words(seed: Confirmation, triage: Triage) -> str:
    """One seed as asked and with the change."""
    changes = {rung.name: rung.change for rung in triage.rungs}
    change = changes.get(seed.rung, seed.rung)
    return f"Seed {seed.seed}: as asked, {seed.unhealed.reason}; with {change}, {seed.healed.reason}"
