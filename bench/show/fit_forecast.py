"""A forecast for the report, as words: every backend's figures, every set of cards, every check, every line.

``page_fit.html`` and ``fit_markdown`` lay them out. A value that is missing is a dash, and a part of a cell
that is missing is empty.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.judge.forecast_lines import HIGHEST
from bench.record.forecast import BackendForecast, CardOutlook, Check, Forecast, Line
from bench.show.columns import MISSING, gib, number, words
from bench.show.fit_view import room_in_words
from bench.show.forecast import PEAKS, percent, weights, weights_error
from bench.show.page_top import count

Form = Callable[[float | None], str]
FITS = {True: "yes", False: "no", None: "not possible"}
BASES = {
    "measured": "Measured: peaks of the slices on a card, carried to the whole model",
    "arithmetic": "Arithmetic: as qlora-bench plan computes it",
}
WHAT_IT_SHOWS = (
    "Weights: all tensors of the base model. Peak: {peak}; the highest of forward, backward and optimizer "
    "step. A range is a 95 % interval from the spread of what was measured; an error is predicted / measured "
    "- 1."
)


@dataclass(frozen=True)
class Figure:
    """One predicted quantity of one backend."""

    predicted: str
    interval: str
    """Its lowest and highest, empty where one value at each slice gives none."""
    measured: str
    """At the full depth, with the error; empty where that was not run."""

    @property
    def text(self) -> str:
        """All of it in one line."""
        beside = [part for part in (self.interval, self.measured) if part]
        return f"{self.predicted} ({'; '.join(beside)})" if beside else self.predicted


@dataclass(frozen=True)
class BackendFigures:
    """One backend at the full depth."""

    backend: str
    dtype: str
    weights: Figure
    peak: Figure
    load: Figure
    step: Figure
    tokens_per_second: str
    remarks: tuple[str, ...]
    """Why there is no forecast, what did not complete, departures from what was asked."""


@dataclass(frozen=True)
class CardsRow:
    """One backend on one set of cards."""

    backend: str
    fits: str
    peak: str
    """Of the fullest card, in GiB."""
    room: str
    each: str
    """GiB of every card in order."""
    longest: str
    basis: str
    reason: str


@dataclass(frozen=True)
class CardSet:
    """All backends on one set of cards."""

    label: str
    capacity: str
    """Of one card, in GiB."""
    sequence_length: int
    rows: tuple[CardsRow, ...]

    @property
    def bases(self) -> tuple[str, ...]:
        """What the peaks rest on."""
        return tuple(dict.fromkeys(BASES[row.basis] for row in self.rows))


def figures_of(forecast: Forecast) -> tuple[BackendFigures, ...]:
    """A line for each backend, those without a forecast included."""
    return tuple(_backend(backend) for backend in forecast.backends)


def card_sets(forecast: Forecast) -> tuple[CardSet, ...]:
    """Every set of cards that was asked about, with every backend on it."""
    return tuple(
        CardSet(
            label=outlooks[0][1].cards,
            capacity=gib(outlooks[0][1].capacity_bytes),
            sequence_length=outlooks[0][1].sequence_length,
            rows=tuple(_cards_row(backend.backend, outlook) for backend, outlook in outlooks),
        )
        for outlooks in outlooks_by_cards(forecast).values()
    )


def outlooks_by_cards(forecast: Forecast) -> Mapping[str, list[tuple[BackendForecast, CardOutlook]]]:
    """Label of a set of cards -> the backends with their outlook on it."""
    found: dict[str, list[tuple[BackendForecast, CardOutlook]]] = {}
    for backend in forecast.backends:
        for outlook in backend.outlooks:
            found.setdefault(outlook.cards, []).append((backend, outlook))
    return found


def peak_measure(forecast: Forecast) -> str:
    """What the forecast's peaks are."""
    return PEAKS[forecast.peak_memory]


def what_it_shows(forecast: Forecast) -> str:
    """What the columns of its table mean."""
    return WHAT_IT_SHOWS.format(peak=peak_measure(forecast))


def setting_in_words(asked: Mapping[str, Any]) -> str:
    """What all slices shared: batch, length, adapters and the rest, as far as it was recorded."""
    work, lora = asked.get("workload", {}), asked.get("lora", {})
    batch, accumulated = work.get("micro_batch_size"), work.get("gradient_accumulation_steps")
    parts = [
        asked.get("dtype"),
        None if batch is None else f"batch {batch} x {work.get('sequence_length', MISSING)} tokens",
        f"gradient accumulation {accumulated}" if accumulated not in (None, 1) else None,
        f"LoRA rank {lora['rank']}" if "rank" in lora else None,
        f"on {count(len(lora['target_modules']), 'projection')}" if "target_modules" in lora else None,
        f"attention {asked['attention']}" if "attention" in asked else None,
        f"checkpointing {words(str(asked['checkpointing']))}" if "checkpointing" in asked else None,
    ]
    return ", ".join(str(part) for part in parts if part)


# ---- one backend ---------------------------------------------------------------------------------


def _backend(backend: BackendForecast) -> BackendFigures:
    step = backend.line("step", "step")
    sizes = (weights(backend.lines, "predicted"), weights(backend.lines, "measured"))
    remarks = [*([backend.message] if backend.message else []), *backend.failures, *backend.notes]
    seconds = step.predicted if step else None
    return BackendFigures(
        backend=backend.backend,
        dtype=backend.effective_dtype or MISSING,
        weights=Figure(gib(sizes[0]), "", _measured(sizes[1], weights_error(backend.lines), gib)),
        peak=_figure(backend.line("peak", HIGHEST), gib),
        load=_figure(backend.line("load", "load"), number),
        step=_figure(step, number),
        tokens_per_second=number(
            backend.tokens_per_step / seconds if backend.tokens_per_step and seconds else None
        ),
        remarks=tuple(dict.fromkeys(remarks)),
    )


def _figure(line: Line | None, form: Form) -> Figure:
    if line is None:
        return Figure(MISSING, "", "")
    return Figure(form(line.predicted), _interval(line, form), _measured(line.measured, line.error, form))


def _interval(line: Line, form: Form) -> str:
    if line.low is None or line.high is None:
        return ""
    # The interval of a straight line knows nothing of what is measured; seconds and bytes end at zero.
    return f"{form(max(line.low, 0.0))} to {form(line.high)}"


def _measured(value: float | None, error: float | None, form: Form) -> str:
    if value is None:
        return ""
    off = f", error {percent(error)} %" if error is not None else ""
    return f"measured {form(value)}{off}"


def _cards_row(backend: str, outlook: CardOutlook) -> CardsRow:
    fullest = max(outlook.peak_bytes, default=None)
    longest = outlook.longest_sequence
    return CardsRow(
        backend=backend,
        fits=FITS[outlook.fits],
        peak=gib(fullest),
        room=MISSING if fullest is None else room_in_words(fullest, outlook.capacity_bytes),
        each=" ".join(gib(peak) for peak in outlook.peak_bytes) or MISSING,
        longest=MISSING if outlook.fits is None else "none" if longest is None else f"{longest:,}",
        basis=outlook.basis,
        reason=outlook.reason or "",
    )


# ---- checks and lines ----------------------------------------------------------------------------


def check_rows(forecast: Forecast) -> tuple[tuple[str, ...], ...]:
    """Backend, slices, and the errors in % of weights, peak, load and step, one for each repeat in order."""
    rows = []
    for backend in forecast.backends:
        for slices in dict.fromkeys(check.slices for check in backend.checks):
            checks = [check for check in backend.checks if check.slices == slices]
            rows.append((backend.backend, ", ".join(map(str, slices)), *_errors(checks)))
    return tuple(rows)


def _errors(checks: Sequence[Check]) -> Iterator[str]:
    yield "; ".join(percent(weights_error(check.lines)) for check in checks)
    for place in (("peak", HIGHEST), ("load", "load"), ("step", "step")):
        lines = [
            next((one for one in check.lines if (one.group, one.name) == place), None) for check in checks
        ]
        yield "; ".join(percent(line.error if line else None) for line in lines)


def line_heads(backend: BackendForecast) -> tuple[str, ...]:
    """Titles of the columns of `line_rows`."""
    at = (f"At {depth} layers" if depth > 1 else "At 1 layer" for depth in backend.slices)
    after = ("Each layer", "No layers", "Correction", "Predicted", "95 %", "Measured", "Error (%)")
    return ("Quantity", "Unit", *at, *after)


def line_rows(backend: BackendForecast) -> tuple[tuple[str, ...], ...]:
    """Every line as cells, bytes in GiB."""
    return tuple(tuple(_line_cells(line)) for line in backend.lines)


def _line_cells(line: Line) -> Iterator[str]:
    form: Form = gib if line.unit == "bytes" else number
    yield f"{line.group}: {words(line.name)}" if line.group != line.name else words(line.name)
    yield "GiB" if line.unit == "bytes" else "s"
    yield from (form(value) for value in line.at_slices)
    yield from (form(value) for value in (line.per_layer, line.fixed, line.correction, line.predicted))
    yield _interval(line, form) or MISSING
    yield form(line.measured)
    yield percent(line.error)
