"""A memory plan in the terminal, one table for each set of cards, and as plain values for ``--json``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, Literal

from bench.ask.cards import Cards
from bench.ask.footprint import PHASES, TERMS, CardNeed, Outlook
from bench.show.columns import GIB, MISSING, SHORT_DTYPES, gib

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

NUMERIC = ("loaded", "forward", "backward", "step", "spare", "longest")
TITLES = ("backend", "dtype", *NUMERIC[:4], "card", "spare", "fits", "longest", "largest term")
TERM_COLUMNS: Mapping[str, tuple[str, tuple[str, ...]]] = {
    "packed weights": ("packed\nweights", ("quantized_weights",)),
    "other weights": ("other\nweights", ("unquantized_weights",)),
    "LoRA and gradients": ("LoRA,\ngradients", ("lora", "gradients", "adapter_copies")),
    "optimizer": ("Adam", ("optimizer_state", "optimizer_temporaries")),
    "checkpoints": ("check-\npoints", ("checkpoints",)),
    "activations": ("activ-\nations", ("kept_activations", "moving_activations")),
    "kernel": ("kernel", ("kernel_workspace",)),
    "logits": ("logits", ("logits",)),
    "allowance": ("allow-\nance", ("allowance",)),
}
"""Name -> the title of its column, and the terms that stand there together."""
LEGEND = (
    "GiB on the fullest card at the fullest moment of each phase, the allowance included. Card: which one it "
    "is. Spare: what it has left. Longest: tokens of a row that still fit. Below, the terms of that card's "
    "fullest phase. Activations: kept by the layer that is recomputed, and coming and going. Kernel: "
    "dequantized weights and other temporaries of the training kernel."
)
NOTHING_FITS = "none"


def plan_table(outlooks: Sequence[Outlook], assumptions: Sequence[str]) -> RenderableType:
    """The tables, what their columns mean, and what was assumed, for a rich console."""
    from rich.console import Group
    from rich.text import Text

    parts: list[RenderableType] = []
    for cards in dict.fromkeys(outlook.cards for outlook in outlooks):
        of_these = [outlook for outlook in outlooks if outlook.cards == cards]
        parts += [Text(_heading(cards), style="bold"), _table(of_these), Text("")]
        if any(outlook.footprint for outlook in of_these):
            parts += [_terms(of_these), Text("")]
    reasons = {f"{o.backend}: not possible: {o.reason}." for o in outlooks if o.reason is not None}
    notes = {f"{o.backend}: {note}." for o in outlooks for note in o.notes}
    below = [LEGEND, *sorted(reasons), *sorted(notes), *assumptions]
    return Group(*parts, *(Text(line) for line in below))


def _heading(cards: Cards) -> str:
    return f"{cards.label}, {gib(cards.capacity_bytes)} GiB each as CUDA sees it"


def _grid() -> Table:
    from rich.table import Table

    return Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))


def _table(outlooks: Sequence[Outlook]) -> Table:
    from rich.text import Text

    table = _grid()
    for title in TITLES:
        # Folded, not cut: half of a number is another number.
        side: Literal["left", "right"] = "right" if title in NUMERIC else "left"
        table.add_column(title, justify=side, no_wrap=title != TITLES[-1], overflow="fold")
    for outlook in outlooks:
        # Text, never str: rich would read square brackets in a value as markup.
        style = "red" if not outlook.fits else "yellow" if outlook.tight else ""
        table.add_row(*(Text(cell, style=style) for cell in _cells(outlook)))
    return table


def _cells(outlook: Outlook) -> list[str]:
    dtype = SHORT_DTYPES.get(outlook.dtype, outlook.dtype)
    if outlook.footprint is None:
        return [outlook.backend, dtype, *[MISSING] * 6, fits_in_words(outlook), MISSING, MISSING]
    place = outlook.footprint.fullest
    card = outlook.footprint.cards[place]
    sizes = _sizes(card)
    largest = max(sizes, key=lambda name: sizes[name])
    return [
        outlook.backend,
        dtype,
        *(gib(phase.total_bytes) for phase in card.phases),
        f"{place + 1}/{len(outlook.footprint.cards)}",
        gib(outlook.spare_bytes),
        fits_in_words(outlook),
        longest_in_words(outlook),
        f"{largest}, {100 * sizes[largest] / card.peak.total_bytes:.0f} %",
    ]


def _sizes(card: CardNeed) -> dict[str, int]:
    """Bytes of a card's fullest phase by the name of their column."""
    peak = card.peak
    return {name: sum(peak.terms.get(term, 0) for term in terms) for name, (_, terms) in TERM_COLUMNS.items()}


def _terms(outlooks: Sequence[Outlook]) -> Table:
    """The fullest phase of the fullest card, term by term; the largest in bold."""
    from rich.text import Text

    table = _grid()
    table.add_column("backend", no_wrap=True)
    for title, _ in TERM_COLUMNS.values():
        table.add_column(title, justify="right", no_wrap=True)
    for outlook in outlooks:
        if outlook.footprint is None:
            continue
        sizes = _sizes(outlook.footprint.cards[outlook.footprint.fullest]).values()
        cells = [Text(_small(size), style="bold" if size == max(sizes) else "") for size in sizes]
        table.add_row(Text(outlook.backend), *cells)
    return table


def _small(size: int) -> str:
    """GiB with two decimals, since the terms of a line add up."""
    return "0" if size == 0 else f"{size / GIB:.2f}" if size >= GIB / 200 else "<0.01"


def fits_in_words(outlook: Outlook) -> str:
    """At the length that was asked about."""
    if not outlook.fits:
        return "no"
    return "tight" if outlook.tight else "yes"


def longest_in_words(outlook: Outlook) -> str:
    """The longest sequence that fits; with a sign where the model's own limit ended the search."""
    if outlook.footprint is None:
        return MISSING
    if outlook.longest is None:
        return NOTHING_FITS
    return f"{'≥ ' if outlook.longest_is_limit else ''}{outlook.longest:,}"


def plan_document(
    outlooks: Sequence[Outlook], assumptions: Sequence[str], asked: Mapping[str, Any]
) -> dict[str, Any]:
    """Everything of a plan as plain values; sizes are bytes. ``asked``: what was planned for."""
    return {
        "asked": dict(asked),
        "assumptions": list(assumptions),
        "phases": list(PHASES),
        "terms": dict(TERMS),
        "plans": [_values(outlook) for outlook in outlooks],
    }


def _values(outlook: Outlook) -> Mapping[str, Any]:
    need = outlook.footprint
    return {
        "backend": outlook.backend,
        "dtype": outlook.dtype,
        "cards": outlook.cards.label,
        "card_count": outlook.cards.count,
        "card_capacity_bytes": outlook.cards.capacity_bytes,
        "sequence_length": outlook.length,
        "fits": outlook.fits,
        "tight": outlook.tight,
        "longest_sequence": outlook.longest,
        "longest_is_models_limit": outlook.longest_is_limit,
        "reason": outlook.reason,
        "notes": list(outlook.notes),
        "fullest_card": None if need is None else need.fullest,
        "peak_bytes": None if need is None else need.peak_bytes,
        "spare_bytes": outlook.spare_bytes,
        "on_cards": None if need is None else [_card_values(card) for card in need.cards],
    }


def _card_values(card: CardNeed) -> dict[str, Any]:
    return {
        "decoder_layers": card.layers,
        "phases": {
            phase.phase: {
                "total_bytes": phase.total_bytes,
                "largest_term": phase.largest_term,
                "terms": dict(phase.terms),
            }
            for phase in card.phases
        },
    }
