"""Our own figures in the columns of the published ones, each with its conditions.

``beside_published(comparison, forecast)`` gives the table of the page; None for a model of a size that nobody
published anything about.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from bench.judge.comparison import Comparison
from bench.judge.forecast_lines import HIGHEST
from bench.judge.rows import Row
from bench.judge.values import counted
from bench.record.forecast import BackendForecast, Forecast
from bench.show.columns import MISSING, gib, number
from bench.show.fit_forecast import peak_measure, setting_in_words
from bench.show.fit_view import RunUse, uses_of
from bench.show.published import Published, published_for, size_of


@dataclass(frozen=True)
class BesideRow:
    """One line: a figure with its conditions."""

    model: str
    format: str
    backend: str
    setup: str
    memory: str
    """With its unit."""
    memory_measure: str
    tokens_per_second: str
    how: str
    """"derived" where the tokens per second were computed from other figures, else empty."""
    other: str
    source: str


@dataclass(frozen=True)
class BesideTable:
    """What was measured here, what was forecast, and what others published."""

    measured: tuple[BesideRow, ...]
    forecast: tuple[BesideRow, ...]
    published: tuple[BesideRow, ...]


def beside_published(comparison: Comparison, forecast: Forecast | None) -> BesideTable | None:
    """The figures of the models of this report beside those that others published for models of that size."""
    published = published_for(comparison, forecast)
    if not published:
        return None
    return BesideTable(
        measured=tuple(
            _measured(use) for use in uses_of(comparison) if _has_size(use.row) and use.row.completed
        ),
        forecast=tuple(_forecasts(forecast)) if forecast else (),
        published=tuple(_published(figure) for figure in published),
    )


def _has_size(row: Row) -> bool:
    model = row.record.request.model
    return size_of(model.name, model.architecture) is not None


def _measured(use: RunUse) -> BesideRow:
    row, request = use.row, use.row.record.request
    done = row.record.quantization
    asked = request.model_dump(mode="json") | {"dtype": row.effective_dtype or request.dtype}
    several = " on the fullest card" if len(use.cards) > 1 else ""
    return BesideRow(
        model=request.model.name,
        format=done.kernel if done else MISSING,
        backend=request.backend,
        setup=", ".join([*_where(use), *_cut(row), setting_in_words(asked)]),
        memory=f"{gib(use.fullest.peak_bytes)} GiB",
        memory_measure=f"peak reserved{several}" if use.on_card else "peak resident memory of the process",
        tokens_per_second=number(row.tokens_per_second),
        how="",
        other="",
        source=f"run {row.name}",
    )


def _where(use: RunUse) -> Iterator[str]:
    yield counted(card.hardware or card.name for card in use.cards) + ("" if use.on_card else " (CPU)")
    if use.row.record.request.placement != "single":
        yield f"placement {use.row.record.request.placement}"


def _cut(row: Row) -> Iterator[str]:
    model = row.record.request.model
    yield f"{model.weights} weights"
    if model.layers is not None:
        yield f"the first {model.layers} decoder layers only"
    if row.record.load is not None and row.record.load.from_cache:
        yield "quantized model loaded from cache"


def _forecasts(forecast: Forecast) -> Iterator[BesideRow]:
    for backend in forecast.backends:
        peak, step = backend.line("peak", HIGHEST), backend.line("step", "step")
        seconds = step.predicted if step else None
        if (peak is None or peak.predicted is None) and seconds is None:
            continue
        memory = peak.predicted if peak else None
        yield BesideRow(
            model=forecast.model,
            format=MISSING,
            backend=backend.backend,
            setup=_forecast_setup(forecast, backend),
            memory=MISSING if memory is None else f"{gib(memory)} GiB",
            memory_measure=_measure(forecast) if memory is not None else "",
            tokens_per_second=number(
                backend.tokens_per_step / seconds if backend.tokens_per_step and seconds else None
            ),
            how="",
            other="",
            source="",
        )


def _measure(forecast: Forecast) -> str:
    """What the peak is of, without the details that stand at the forecast itself."""
    return "peak of " + peak_measure(forecast).partition(",")[0]


def _forecast_setup(forecast: Forecast, backend: BackendForecast) -> str:
    slices = ", ".join(map(str, backend.slices))
    asked = {**forecast.asked, "dtype": backend.effective_dtype or forecast.asked.get("dtype")}
    where = f"{forecast.device}, {forecast.weights} weights"
    return f"{where}, {forecast.full_layers} layers from slices of {slices}, {setting_in_words(asked)}"


def _published(figure: Published) -> BesideRow:
    return BesideRow(
        model=figure.model,
        format=figure.format,
        backend=figure.backend or MISSING,
        setup=figure.setup,
        memory=f"{figure.memory} {figure.memory_unit}" if figure.memory else MISSING,
        memory_measure=figure.memory_measure or "",
        tokens_per_second=MISSING if figure.tokens_per_second is None else f"{figure.tokens_per_second:,}",
        how="derived" if figure.tokens_per_second_derived else "",
        other=figure.other or "",
        source=figure.source,
    )
