"""The section "Will it fit, how fast" of the Markdown report.

``card_blocks`` and ``forecast_blocks`` give blocks of Markdown text; every string of a record or
a forecast in them is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bench.judge.comparison import Comparison
from bench.record.forecast import Forecast
from bench.show.columns import gib, words
from bench.show.fit_forecast import (
    CardSet,
    card_sets,
    check_rows,
    figures_of,
    setting_in_words,
    what_it_shows,
)
from bench.show.fit_view import RunUse, notes_on, uses_of
from bench.show.forecast import heading

Escape = Callable[[str], str]


def card_blocks(comparison: Comparison, escape: Escape) -> Iterator[str]:
    """What the runs held, a block each; nothing where no run tells."""
    uses = uses_of(comparison)
    if uses:
        yield _cards(uses, escape)
        yield from (escape(note) for note in notes_on(uses))


def _cards(uses: Sequence[RunUse], escape: Escape) -> str:
    heads = [
        "Run",
        "Device",
        "Size (GiB)",
        "Peak (GiB)",
        "Counted (GiB)",
        "Rest (GiB)",
        "Room",
        "Fullest phase",
    ]
    lines = [
        [
            use.name,
            card.name,
            *(
                gib(size)
                for size in (card.capacity_bytes, card.peak_bytes, card.counted_bytes, card.rest_bytes)
            ),
            card.room,
            words(card.phase),
        ]
        for use in uses
        for card in use.cards
    ]
    return _table("Peak memory against what there is", heads, lines, escape, numeric=range(2, 7))


def forecast_blocks(forecast: Forecast | None, escape: Escape) -> Iterator[str]:
    """What was forecast, a block each; nothing where nothing was."""
    if forecast is None:
        return
    rows = figures_of(forecast)
    heads = ["Backend", "Dtype", "Weights (GiB)", "Peak (GiB)", "Load (s)", "Step (s)", "Tokens/s"]
    lines = [
        [
            row.backend,
            row.dtype,
            *(f.text for f in (row.weights, row.peak, row.load, row.step)),
            row.tokens_per_second,
        ]
        for row in rows
    ]
    yield _table("Forecast of the whole model", heads, lines, escape, numeric=range(2, 7))
    told = [f"{heading(forecast)}.", setting_in_words(forecast.asked), what_it_shows(forecast)]
    yield escape(" ".join(part if part.endswith(".") else f"{part}." for part in told if part))
    remarks = [f"{row.backend}: {remark}" for row in rows for remark in row.remarks]
    if remarks:
        yield "\n".join(f"- {escape(remark)}" for remark in remarks)
    checks = check_rows(forecast)
    if checks:
        heads = ["Backend", "From layers", "Weights (%)", "Peak (%)", "Load (%)", "Step (%)"]
        title = "Error of the forecast made again from fewer slices, one for each repeat"
        yield _table(title, heads, checks, escape, numeric=range(2, 6))
    yield from (_on_cards(one, escape) for one in card_sets(forecast))
    if forecast.assumptions:
        listed = "\n".join(f"- {escape(assumption)}" for assumption in forecast.assumptions)
        yield f"**What the forecast assumes**\n\n{listed}"


def _on_cards(cards: CardSet, escape: Escape) -> str:
    heads = ["Backend", "Fits", "Peak (GiB)", "Room", "Longest (tokens)", "Basis", "Each card (GiB)"]
    lines = [
        [row.backend, row.fits, row.peak, row.room, row.longest, row.basis, row.reason or row.each]
        for row in cards.rows
    ]
    title = f"On {cards.label}, {cards.capacity} GiB each, at {cards.sequence_length} tokens a row"
    return _table(title, heads, lines, escape, numeric=range(2, 5))


def _table(
    title: str, heads: Sequence[str], lines: Sequence[Sequence[str]], escape: Escape, *, numeric: range
) -> str:
    import pandas

    frame = pandas.DataFrame(
        [[escape(cell) for cell in line] for line in lines],
        columns=[escape(head) for head in heads],
        dtype=object,
    )
    align = ["right" if place in numeric else "left" for place in range(len(heads))]
    table = frame.to_markdown(index=False, disable_numparse=True, colalign=align)
    return f"**{escape(title)}**\n\n{table}"
