"""The stability section of the Markdown report: verdicts with their measures, failures, margins, the triage.

``stability_blocks`` and ``triage_blocks`` give blocks of Markdown text; every string of a record in
them is escaped.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from bench.judge.comparison import Comparison
from bench.judge.margin import Margin
from bench.judge.rows import Row
from bench.record.triage import Triage
from bench.show.columns import MISSING, number, words
from bench.show.ladder import HEALS, evidence_in_words, rung_in_words
from bench.show.margin import bits_in_words, dtype_in_words, ending_in_words
from bench.show.runs_shown import margins_of, runs_shown
from bench.show.stability_view import (
    changes_of,
    compared,
    factor_in_words,
    failures_of,
    limit_in_words,
    measured,
    measures_of,
    threshold_in_words,
    value_in_words,
)

Escape = Callable[[str], str]


def stability_blocks(comparison: Comparison, escape: Escape) -> Iterator[str]:
    """What there is to say of the runs, a block each; nothing of what no run has."""
    rows = runs_shown(comparison)
    yield from _verdicts(rows, escape)
    yield from _measures(rows, escape)
    yield from _failures(rows, escape)
    yield from _fidelity(rows, escape)
    yield from _margins(margins_of(comparison), escape)


def _verdicts(rows: Sequence[Row], escape: Escape) -> Iterator[str]:
    judged = [row for row in rows if row.completed or row.record.steps or row.record.first_failure]
    if judged:
        lines = [f"{row.name}: {words(row.verdict.verdict)}: {row.verdict.reason}" for row in judged]
        yield _list("Stability", lines, escape)


def _measures(rows: Sequence[Row], escape: Escape) -> Iterator[str]:
    measures = measures_of(rows)
    if not measures:
        return
    heads = ["Run", *(f"{measure.short} (at most {threshold_in_words(measure)})" for measure in measures)]
    lines = []
    for row in rows:
        cells = [row.name]
        for measure in measures:
            item = measured(row, measure)
            if item is None:
                cells.append(MISSING)
                continue
            own = item.limit != measure.value
            limit = f" (here at most {limit_in_words(item)})" if own else ""
            cells.append(f"{value_in_words(item)}{limit}{' beyond' if item.exceeded else ''}")
        lines.append(cells)
    yield _table("Measures beside their thresholds", heads, lines, escape)
    yield _list(
        "Where the thresholds come from",
        [f"{m.name}: {m.meaning} Source: {m.source}." for m in measures],
        escape,
    )


def _failures(rows: Sequence[Row], escape: Escape) -> Iterator[str]:
    found = failures_of(rows)
    if found:
        heads = ["Run", "What", "Where", "When", "Largest values before", "Operation in the replay"]
        parts = [(f.what, f.where, f.when, f.before, f.operation) for f in found]
        lines = [
            [failure.name, *("; ".join(part) for part in of_run)]
            for failure, of_run in zip(found, parts, strict=True)
        ]
        yield _table("Where each run failed first", heads, lines, escape)
    changes = changes_of(rows)
    if changes:
        heads = ["Run", "Change", "Heals", "Loss", "Gradient norm", "Largest value there"]
        lines = [
            [
                row.name,
                f"{one.change}: {one.detail}",
                f"{one.heals_in_words} ({one.error})" if one.error else one.heals_in_words,
                one.loss,
                one.gradient_norm,
                one.abs_max_there,
            ]
            for row, tried in changes
            for one in tried
        ]
        yield _table("What healed the failing micro-batch", heads, lines, escape)


def _fidelity(rows: Sequence[Row], escape: Escape) -> Iterator[str]:
    lines = [
        [
            row.name,
            found.reference_dtype or MISSING,
            number(found.overall.cosine if found.overall else None, 5),
            number(found.overall.norm_ratio if found.overall else None, 4),
            number(found.overall.relative_error if found.overall else None),
            found.note or "",
        ]
        for row, found in compared(rows)
    ]
    if lines:
        heads = ["Run", "Reference", "Cosine", "Norm ratio", "Relative error", "Note"]
        yield _table("LoRA gradient beside the unquantized model's, on one fixed batch", heads, lines, escape)


def _margins(margins: Sequence[Margin], escape: Escape) -> Iterator[str]:
    lines = [
        [
            margin.label,
            dtype_in_words(margin),
            margin.module,
            bits_in_words(margin),
            factor_in_words(margin.largest_finite_factor),
            factor_in_words(margin.smallest_failing_factor),
            ending_in_words(margin),
        ]
        for margin in margins
    ]
    if lines:
        heads = [
            "Backend",
            "Dtype",
            "Rescaled layer",
            "Margin (bits)",
            "Finite at",
            "Fails at",
            "How it ends",
        ]
        yield _table("Stability margin: log2 of the largest factor that stays finite", heads, lines, escape)


def triage_blocks(triage: Triage | None, escape: Escape) -> Iterator[str]:
    """What a triage found; nothing where there was none."""
    if triage is None:
        return
    told = [f"As asked: {evidence_in_words(triage.base)}"]
    if triage.cause:
        told.append(f"Cause: {triage.cause}")
    yield _list(f"Triage of {triage.backend}", [*told, f"Result: {triage.conclusion}"], escape)
    lines = [
        [
            f"{rung.change} (chosen)" if rung.name == triage.chosen else rung.change,
            rung.kind,
            HEALS[rung.heals],
            rung_in_words(rung),
        ]
        for rung in triage.rungs
    ]
    if lines:
        yield _table("The ladder of changes", ["Change", "Kind", "Heals", "Evidence"], lines, escape)


def _list(title: str, items: Sequence[str], escape: Escape) -> str:
    return f"**{escape(title)}**\n\n" + "\n".join(f"- {escape(item)}" for item in items)


def _table(title: str, heads: Sequence[str], lines: Sequence[Sequence[str]], escape: Escape) -> str:
    import pandas

    frame = pandas.DataFrame(
        [[escape(cell) for cell in line] for line in lines],
        columns=[escape(head) for head in heads],
        dtype=object,
    )
    return f"**{escape(title)}**\n\n{frame.to_markdown(index=False, disable_numparse=True)}"
