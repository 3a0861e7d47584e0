"""What stands in the comparison table, said once: its lines, its columns, and how a number is written.

``tables`` draws it in the terminal and as Markdown, ``page`` as HTML. A missing value is a dash, never 0;
a value that is not finite is written out.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from bench.judge.comparison import Comparison
from bench.judge.groups import Spread, Summary, summarize
from bench.judge.rows import Row
from bench.judge.scaler import spelt
from bench.show.differences import group_titles

MISSING = "–"  # noqa: RUF001  (an en dash is meant)
GIB = 2**30
SHORT_DTYPES = {"bfloat16": "bf16", "float16": "fp16", "float32": "fp32"}


@dataclass(frozen=True)
class Line:
    """One line of the table."""

    summary: Summary
    best: frozenset[str]
    """Fields in which this line has the lowest (or highest) value measured in its group."""

    @property
    def first(self) -> Row:
        """The run that stands for what all runs of the line share."""
        return self.summary.rows[0]


@dataclass(frozen=True)
class Section:
    """Lines whose figures may be compared with one another; failures form a section without marks."""

    title: str
    lines: tuple[Line, ...]


def sections(comparison: Comparison) -> tuple[Section, ...]:
    """The lines in order: each group of alike runs, then the runs that did not complete."""
    found = []
    for title, group in zip(group_titles(comparison), comparison.groups, strict=True):
        lines = tuple(
            Line(summary, frozenset(field for field, labels in group.best.items() if summary.label in labels))
            for summary in group.summaries
        )
        found.append(Section(title, lines))
    failed = tuple(Line(summarize(row.name, [row]), frozenset()) for row in comparison.failures)
    if failed:
        found.append(Section("Did not complete", failed))
    return tuple(found)


# ---- values in words -----------------------------------------------------------------------------


def number(value: float | None, digits: int = 3) -> str:
    """A number with so many significant digits, never in powers of ten unless it is tiny or huge."""
    if value is None:
        return MISSING
    if not math.isfinite(value):
        return spelt(value)
    if value == 0:
        return "0"
    size = abs(value)
    if size >= 1e7 or size < 1e-4:
        return f"{value:.{digits - 1}e}"
    # Of the rounded value: 9.996 becomes 10.0, not 10.00.
    decimals = max(0, digits - 1 - math.floor(math.log10(float(f"{size:.{digits - 1}e}"))))
    return f"{value:,.{decimals}f}"


def gib(value: float | None) -> str:
    """Bytes as GiB, without the unit."""
    return number(None if value is None else value / GIB)


def words(name: str) -> str:
    """A status or a verdict as a person writes it."""
    return name.replace("_", " ")


def outcome(row: Row) -> str:
    """How a run ended, and where."""
    status = words(row.record.status)
    return status if row.record.stage is None else f"{status} ({row.record.stage})"


def changed_dtype(row: Row) -> bool:
    """Whether the run computed in another dtype than was asked for."""
    return row.effective_dtype not in {None, row.requested_dtype}


# ---- the columns ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Column:
    """One column: its titles with the unit, half a sentence on what it means, and its cells."""

    title: str
    short: str
    """The title where room is scarce."""
    meaning: str
    text: Callable[[Line], str]
    field: str | None = None
    """The figure that it is sorted by; None: a column of words."""
    brief: Callable[[Line], str] | None = None
    """The cell where room is scarce; None: ``text`` is short enough."""

    @property
    def numeric(self) -> bool:
        """Whether its cells are numbers."""
        return self.field is not None

    def number(self, line: Line) -> float | None:
        """What the cell is sorted by; None: there is no value."""
        figure = line.summary.figures.get(self.field or "")
        return figure.median if figure else None


def _figure(
    title: str, short: str, meaning: str, field: str, form: Callable[[float | None], str] = number
) -> Column:
    def text(line: Line) -> str:
        return _spread(line.summary.figures.get(field), form)

    def brief(line: Line) -> str:
        # The range goes below the median: a column must not become three times as wide.
        return text(line).replace(" (", "\n").replace(")", "").replace(" to ", "–")  # noqa: RUF001

    return Column(title, short, meaning, text, field, brief)


def _spread(figure: Spread | None, form: Callable[[float | None], str]) -> str:
    """The median, with the lowest and highest run where there are several."""
    if figure is None:
        return MISSING
    if figure.runs == 1 or figure.low == figure.high:
        return form(figure.median)
    return f"{form(figure.median)} ({form(figure.low)} to {form(figure.high)})"


def _median(line: Line, field: str, digits: int = 3) -> str:
    figure = line.summary.figures.get(field)
    return number(figure.median if figure else None, digits)


def _pair(line: Line, left: str, sign: str, right: str, digits: int = 3) -> str:
    if left not in line.summary.figures:
        return MISSING
    return f"{_median(line, left, digits)}{sign}{_median(line, right, digits)}"


def _outcome(line: Line) -> str:
    runs = len(line.summary.rows)
    return outcome(line.first) if runs == 1 else f"{outcome(line.first)}, {runs} runs"


def _dtype(line: Line) -> str:
    row = line.first
    asked = f" (asked: {row.requested_dtype})" if changed_dtype(row) else ""
    return (row.effective_dtype or MISSING) + asked


def _brief_dtype(line: Line) -> str:
    row = line.first
    effective = row.effective_dtype or MISSING
    return SHORT_DTYPES.get(effective, effective) + ("*" if changed_dtype(row) else "")


def _load(line: Line) -> str:
    """Loads that quantized; beside them those from the cache, which did less."""
    made, read = (line.summary.figures.get(name) for name in ("load_seconds", "reload_seconds"))
    if read is None:
        return _spread(made, number)
    again, _, its_range = _spread(read, number).rstrip(")").partition(" (")
    if made is None:
        return f"{again} (from cache{its_range and f', {its_range}'})"
    first, _, range_of_it = _spread(made, number).rstrip(")").partition(" (")
    beside = f"from cache {again}{its_range and f', {its_range}'}"
    return f"{first} ({range_of_it and f'{range_of_it}; '}{beside})"


def _brief_load(line: Line) -> str:
    text = _load(line).replace("from cache", "cached").replace(")", "").replace(" to ", "–")  # noqa: RUF001
    for sign in (" (", "; ", ", "):
        text = text.replace(sign, "\n")
    return text


COLUMNS: tuple[Column, ...] = (
    Column("Backend", "backend", "how the base weights are stored", lambda line: line.summary.label),
    Column("Outcome", "outcome", "how the run ended, and in which stage", _outcome),
    Column("Dtype", "dtype", "what the layers really computed in", _dtype, brief=_brief_dtype),
    _figure(
        "Bits/weight", "bits", "storage of the quantized layers, scales included", "storage_bits_per_weight"
    ),
    Column(
        "Load (s)",
        "load\ns",
        "reading, quantizing and placing all weights; from cache: reading them quantized",
        _load,
        "load_seconds",
        _brief_load,
    ),
    _figure("Step (s)", "step\ns", "median of the measured optimizer steps", "step_seconds_median"),
    _figure("Tokens/s", "tok/s", "non-padding tokens trained on in a second", "tokens_per_second"),
    _figure(
        "Peak memory (GiB)", "peak\nGiB", "highest of forward, backward, update", "peak_memory_bytes", gib
    ),
    Column(
        "Loss, first → last",
        "loss",
        "mean over the micro-batches of a step",
        lambda line: _pair(line, "first_loss", " → ", "last_loss", 4),
        "last_loss",
        lambda line: _pair(line, "first_loss", "→", "last_loss", 4),
    ),
    Column(
        "Gradient norm, median / max",
        "max\nnorm",
        "length of the whole LoRA gradient before clipping",
        lambda line: _pair(line, "gradient_norm_median", " / ", "gradient_norm_max"),
        "gradient_norm_median",
        lambda line: _median(line, "gradient_norm_max"),
    ),
    Column(
        "Stability",
        "verdict",
        "whether losses and gradients survived",
        lambda line: words(line.summary.verdict.verdict),
    ),
)
