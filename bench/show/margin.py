"""The stability margins as a table in the terminal, and as plain values for ``--json``."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from bench.judge.finiteness import STATUSES
from bench.judge.ladder import SYNTHETIC
from bench.judge.margin import Margin
from bench.show.columns import MISSING, SHORT_DTYPES, words

if TYPE_CHECKING:
    from rich.console import RenderableType

TITLES = ("Backend", "Dtype", "Bits", "Finite at", "Fails at", "How it ends")
LEGEND = (
    "Bits: log2 of the largest power of two by which the pair can be rescaled while every loss, gradient "
    "and trained weight stays finite. The unquantized function is the same at every factor; what a backend "
    "makes of the rescaled weights need not be, where its scales are float16 or clamped."
)


def margin_table(margins: Sequence[Margin]) -> RenderableType:
    """One line a margin, and what the columns mean, for a rich console."""
    from rich.console import Group
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for title in TITLES:
        numeric = title in ("Bits", "Finite at", "Fails at")
        # Folded, not cut: half of a module's name names nothing.
        table.add_column(title, justify="right" if numeric else "left", no_wrap=numeric, overflow="fold")
    for margin in margins:
        # Text, never str: rich would read square brackets in a value as markup.
        table.add_row(*(Text(cell) for cell in _cells(margin)))
    notes = [f"Scaled: {', '.join(dict.fromkeys(margin.module for margin in margins))}.", LEGEND]
    if any(margin.weights == "synthetic" for margin in margins):
        notes.append(f"Note: {SYNTHETIC}.")
    return Group(table, Text(""), *(Text(note) for note in notes))


def _cells(margin: Margin) -> list[str]:
    return [
        margin.label,
        dtype_in_words(margin),
        bits_in_words(margin),
        _power(margin.largest_finite_factor),
        _power(margin.smallest_failing_factor),
        ending_in_words(margin),
    ]


def dtype_in_words(margin: Margin) -> str:
    """The dtype that was asked for, and the one that was computed in where that is another."""
    asked = SHORT_DTYPES.get(margin.requested_dtype, margin.requested_dtype)
    if margin.effective_dtype in (None, margin.requested_dtype):
        return asked
    return f"{asked} (computed in {SHORT_DTYPES.get(margin.effective_dtype, margin.effective_dtype)})"


def bits_in_words(margin: Margin) -> str:
    """The margin; with a sign where it is a bound only, a dash where there is none."""
    if margin.bits is None:
        return MISSING
    number = f"{margin.bits:g}" if margin.bits == int(margin.bits) else f"{margin.bits:.1f}"
    return number if margin.exact else f"≥ {number}"


def ending_in_words(margin: Margin) -> str:
    """What stood above the largest finite factor."""
    if margin.ended_by is not None:
        kind = "did not complete" if margin.ended_by in STATUSES else "was not decided"
        return f"a run {kind}: {words(margin.ended_by)}"
    failing = next((p for p in margin.probes if p.factor == margin.smallest_failing_factor), None)
    if failing is None:
        return "no factor failed" if margin.censored else MISSING
    where = f", first in {failing.module}" if failing.module else ""
    unstressed = "unstressed already: " if failing.factor == 1 else ""
    return f"{unstressed}{words(failing.verdict)}{where}"


def _power(factor: float | None) -> str:
    if factor is None:
        return MISSING
    bits = math.log2(factor)
    return f"2^{bits:g}" if bits == int(bits) else f"{factor:g}"


def margin_values(margins: Sequence[Margin]) -> list[dict[str, Any]]:
    """The margins as plain values, every probe among them."""
    return [{**dataclasses.asdict(margin), "exact": margin.exact} for margin in margins]
