"""The comparison as a table: in the terminal, as Markdown, as CSV.

``columns`` says what stands in the first two. The CSV has every field of every run instead, raw: missing
is empty, and NaN and Infinity are written out.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Literal

from bench.judge.comparison import Comparison
from bench.judge.rows import Row, largest
from bench.judge.scaler import spelt
from bench.record.forecast import Forecast
from bench.record.triage import Triage
from bench.show.columns import COLUMNS, MISSING, Column, Line, changed_dtype, outcome, sections
from bench.show.decision import decision_of
from bench.show.differences import allowed_in_words, allowed_values, notes_on
from bench.show.escaping import cell_text, escaped
from bench.show.fit_markdown import card_blocks, forecast_blocks
from bench.show.marks import best_legend
from bench.show.ratios import ratio_blocks, ratio_tables, terminal_ratios
from bench.show.stability_markdown import stability_blocks, triage_blocks

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table


# ---- terminal ------------------------------------------------------------------------------------


def terminal_table(comparison: Comparison) -> RenderableType:
    """The table, the failures' reasons, the caveat and the warnings, for a rich console."""
    from rich.console import Group
    from rich.text import Text

    lines = [line for part in sections(comparison) for line in part.lines]
    reasons = [f"{row.name}: {outcome(row)}: {row.record.message or MISSING}" for row in comparison.failures]
    marked = best_legend(comparison)
    legends = [
        f"Bold: {marked}." if marked else "",
        "*: another dtype than asked for." if any(changed_dtype(line.first) for line in lines) else "",
        comparison.caveat,
    ]
    allowed = filter(None, [allowed_in_words(comparison)])
    below = [Text(text) for text in (*allowed, *reasons, " ".join(text for text in legends if text))]
    warned = [Text(f"Note: {warning}", style="yellow") for warning in comparison.warnings]
    ratios: list[RenderableType] = []
    for table in ratio_tables(comparison):
        ratios += [terminal_ratios(table), Text(table.said), Text("")]
    decision = decision_of(comparison)
    choice = [Text(decision.sentence, style="bold"), Text("")] if decision else []
    return Group(_grid(comparison), Text(""), *ratios, *choice, *below, *warned)


def _grid(comparison: Comparison) -> Table:
    from rich.table import Table
    from rich.text import Text

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0), collapse_padding=True)
    many = len(comparison.groups) > 1
    if many:
        table.add_column("group", justify="right")
    for column in COLUMNS:
        # Only words may wrap: a number broken in two is misread.
        fixed = column.numeric or column.title == "Backend"
        narrowest = {"Outcome": len("completed"), "Stability": len("healthy")}.get(column.title)
        side: Literal["left", "right"] = "right" if column.numeric else "left"
        table.add_column(column.short, justify=side, no_wrap=fixed, min_width=narrowest)
    for place, section in enumerate(sections(comparison), start=1):
        for line in section.lines:
            # Text, never str: rich would read square brackets in a value as markup.
            cells = [
                Text((column.brief or column.text)(line), style=_style(column, line)) for column in COLUMNS
            ]
            lead = [Text(str(place) if line.first.completed else MISSING)] if many else []
            table.add_row(*lead, *cells)
    return table


def _style(column: Column, line: Line) -> str:
    if column.field in line.best:
        return "bold"
    return "red" if column.title == "Outcome" and not line.first.completed else ""


# ---- Markdown ------------------------------------------------------------------------------------


def markdown(comparison: Comparison, triage: Triage | None = None, forecast: Forecast | None = None) -> str:
    """The report as Markdown: one table for each section, then failures, stability, what fits, warnings.

    Below every table of the runs stands in what they are not alike.
    """
    import pandas

    decision = decision_of(comparison)
    blocks = [f"**{escaped(decision.sentence)}**"] if decision else []
    parts = sections(comparison)
    for section in parts:
        cells = [[_marked(column, line) for column in COLUMNS] for line in section.lines]
        frame = pandas.DataFrame(cells, columns=[column.title for column in COLUMNS], dtype=object)
        align = ["right" if column.numeric else "left" for column in COLUMNS]
        table = frame.to_markdown(index=False, disable_numparse=True, colalign=align)
        blocks.append(f"**{section.title}**\n\n{table}" if len(parts) > 1 else table)
    # Who stands apart is in the titles of these.
    blocks = _with_notes(blocks, filter(None, [allowed_in_words(comparison)]))
    marked = best_legend(comparison)
    if marked:
        blocks.append(f"Bold: {marked}.")
    blocks += _with_notes(ratio_blocks(comparison, escaped), notes_on(comparison))
    blocks.append(escaped(comparison.caveat))
    failed = [f"{row.name}: {outcome(row)}: {row.record.message or MISSING}" for row in comparison.failures]
    blocks += _bullets("Why they did not complete", failed)
    notes = notes_on(comparison)
    blocks += _with_notes(stability_blocks(comparison, escaped), notes)
    blocks += triage_blocks(triage, escaped)
    blocks += _with_notes(card_blocks(comparison, escaped), notes)
    blocks += forecast_blocks(forecast, escaped)
    blocks += _bullets("To keep in mind", comparison.warnings)
    return "\n\n".join(blocks) + "\n"


def _with_notes(blocks: Iterable[str], notes: Iterable[str]) -> list[str]:
    """``blocks``, with ``notes`` below each that is a table."""
    below = "".join(f"\n\n*{escaped(note)}*" for note in notes)
    return [block + below if "\n|" in block else block for block in blocks]


def _bullets(title: str, items: Sequence[str]) -> list[str]:
    return [f"**{title}**\n\n" + "\n".join(f"- {escaped(item)}" for item in items)] if items else []


def _marked(column: Column, line: Line) -> str:
    text = escaped(column.text(line))
    return f"**{text}**" if column.field in line.best else text


# ---- CSV -----------------------------------------------------------------------------------------

DERIVED = (
    "measured_steps", "step_seconds_median", "step_seconds_min", "step_seconds_max", "tokens_per_second",
    "first_loss", "last_loss", "gradient_norm_median", "gradient_norm_max", "non_finite_steps",
    "skipped_updates", "peak_memory_bytes", "steps_peak_reserved_bytes", "lowest_headroom_bits",
    "gradient_cosine",
)  # fmt: skip
RECORDED: Mapping[str, tuple[str, ...]] = {
    "load": (
        "import_seconds",
        "prepare_seconds",
        "kernel_seconds",
        "load_seconds",
        "from_cache",
        "quantize_seconds",
        "reload_seconds",
        "cache_write_seconds",
        "cache_bytes",
        "attach_seconds",
        "host_peak_bytes",
    ),
    "quantization": ("storage_bits_per_weight", "expected_bits_per_weight", "kernel", "effective_dtype"),
}
"""Part of the record -> its fields that have a column."""


def csv(comparison: Comparison) -> str:
    """Every field of every run, raw, one run a line.

    A spreadsheet takes a cell that begins with one of `FORMULA` for a formula, which can send what stands in
    other cells elsewhere. A text that does so has an apostrophe before it, the spreadsheets' own sign for
    text; numbers are left alone, -9 included.
    """
    import pandas

    lines = [{name: _raw(value) for name, value in run_fields(row, comparison)} for row in comparison.rows]
    frame = pandas.DataFrame(lines, columns=list(lines[0]) if lines else [], dtype=object)
    return frame.to_csv(index=False, lineterminator="\n", na_rep="")


def run_fields(row: Row, comparison: Comparison) -> Iterator[tuple[str, object]]:
    """Name (with its unit) and raw value of everything known of a run."""
    record, request = row.record, row.record.request
    groups = (n for n, group in enumerate(comparison.groups, start=1) if row in group.rows)
    yield "label", row.label
    yield "backend", request.backend
    yield "repeat", row.repeat
    yield "seed", request.seed
    yield "group", next(groups, None)
    yield "allowed_differences", allowed_values(row, comparison)
    for name in ("status", "stage", "message"):
        yield name, getattr(record, name)
    yield "model", request.model.name
    yield "weights", request.model.weights
    yield "device", request.device
    yield "requested_dtype", request.dtype
    for name in DERIVED:
        yield name, getattr(row, name)
    for part, names in RECORDED.items():
        for name in names:
            yield name, getattr(getattr(record, part), name, None)
    for kind, size in row.tensor_bytes.items():
        yield f"{kind}_bytes", size
    yield "nvml_used_bytes", largest(peak.nvml_used_bytes for peak in row.peak_by_device)
    yield "peak_memory_measure", row.peak_by_device[0].measure if row.peak_by_device else None
    peaks = [f"{peak.device}={peak.peak_bytes}" for peak in row.peak_by_device]
    yield "peak_memory_bytes_by_device", ";".join(peaks) or None
    devices = record.environment.devices if record.environment else ()
    sizes = [
        f"{one.device}={one.total_memory_bytes}" for one in devices if one.total_memory_bytes is not None
    ]
    yield "total_memory_bytes_by_device", ";".join(sizes) or None
    yield "stability", row.verdict.verdict
    yield "stability_reason", row.verdict.reason
    failure = record.first_failure
    for name in ("kind", "step", "phase", "module"):
        yield f"first_failure_{name}", getattr(failure, name, None)
    yield "notes", " ".join(record.quantization.notes) or None if record.quantization else None
    for name in ("wall_seconds", "exit_code", "started_at", "key", "command"):
        yield name, getattr(record, name)


def _raw(value: object) -> str | None:
    if value is None:
        return None
    if isinstance(value, float):
        # pandas would write NaN as an empty cell, as if it were missing.
        return repr(value) if math.isfinite(value) else spelt(value)
    return cell_text(value) if isinstance(value, str) else str(value)
