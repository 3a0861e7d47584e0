"""A forecast in the terminal: what each backend comes to at the full depth, and how far off it was."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Literal

from bench.judge.forecast_lines import HIGHEST
from bench.record.forecast import BackendForecast, Check, Forecast, Line
from bench.show.columns import GIB, MISSING, SHORT_DTYPES, gib, number

if TYPE_CHECKING:
    from rich.console import RenderableType
    from rich.table import Table

WEIGHT_KINDS = ("quantized_weights", "quantization_metadata", "unquantized_weights")
TITLES = ("backend", "dtype", "weights\nGiB", "peak\nGiB", "load\ns", "step\ns", "95 %", "tokens/s")
WORDS = ("backend", "dtype")
LEGEND = (
    "Weights: all tensors of the base model. Peak: {peak}, the highest of forward, backward and optimizer "
    "step. Step: one optimizer step; 95 %: from the spread of the measured rounds, which knows nothing of "
    "what is not a straight line."
)
PEAKS = {
    "peak_resident_bytes": "resident memory of the process, interpreter and libraries included",
    "peak_allocated_bytes": "tensors in torch's CUDA allocator",
    None: "not measured",
}
VERIFIED = (
    "Below each forecast what the full depth measured here, and how far the forecast is off it: predicted / "
    "measured - 1."
)
CHECKED = (
    "The forecast made again from fewer slices, for each repeat by itself; errors in %, one for each repeat "
    "in order."
)


def forecast_table(forecast: Forecast) -> RenderableType:
    """The tables, what their columns mean, and what was assumed, for a rich console."""
    from rich.console import Group
    from rich.text import Text

    verified = any(backend.full_key for backend in forecast.backends)
    parts: list[RenderableType] = [Text(heading(forecast), style="bold")]
    parts += [_main(forecast, verified=verified), Text("")]
    for cards in dict.fromkeys(o.cards for backend in forecast.backends for o in backend.outlooks):
        parts += [Text(f"On {cards}", style="bold"), _cards(forecast.backends, cards), Text("")]
    if any(backend.checks for backend in forecast.backends):
        parts += [Text(CHECKED, style="bold"), _checks(forecast.backends), Text("")]
    below = [LEGEND.format(peak=PEAKS[forecast.peak_memory])]
    if verified:
        below.append(VERIFIED)
    for backend in forecast.backends:
        below += [f"{backend.backend}: did not complete: {failure}." for failure in backend.failures]
        below += [f"{backend.backend}: {note}." for note in backend.notes]
    return Group(*parts, *(Text(line) for line in (*below, *forecast.assumptions)))


def heading(forecast: Forecast) -> str:
    """What is forecast from what, and where that was measured."""
    slices = ", ".join(map(str, next((b.slices for b in forecast.backends), ())))
    repeats = f", {forecast.repeats} repeats" if forecast.repeats > 1 else ""
    return (
        f"{forecast.model} at {forecast.full_layers} layers, from {slices} layers measured on "
        f"{forecast.device}{repeats}; {forecast.weights} weights"
    )


def _main(forecast: Forecast, *, verified: bool) -> Table:
    from rich.text import Text

    table = _grid(TITLES, WORDS)
    for backend in forecast.backends:
        if backend.message is not None:
            table.add_row(
                Text(backend.backend, style="red"), *[Text(MISSING, style="red")] * (len(TITLES) - 1)
            )
            continue
        # Text, never str: rich would read square brackets in a value as markup.
        table.add_row(*(Text(cell) for cell in _cells(backend)))
        if verified and backend.full_key:
            table.add_row(*(Text(cell, style="dim") for cell in _measured_cells(backend)))
    return table


def _cells(backend: BackendForecast) -> list[str]:
    dtype = backend.effective_dtype or MISSING
    step, load = backend.line("step", "step"), backend.line("load", "load")
    return [
        backend.backend,
        SHORT_DTYPES.get(dtype, dtype),
        gib(weights(backend.lines, "predicted")),
        gib(_value(backend.line("peak", HIGHEST))),
        number(_value(load)),
        number(_value(step), 4),
        f"{number(step.low, 4)} to {number(step.high, 4)}" if step and step.low is not None else MISSING,
        number(_speed(backend, _value(step))),
    ]


def _measured_cells(backend: BackendForecast) -> list[str]:
    step, load = backend.line("step", "step"), backend.line("load", "load")
    measured = step.measured if step else None
    return [
        "  measured",
        "",
        _beside(gib(weights(backend.lines, "measured")), weights_error(backend.lines)),
        _beside(gib(_measured(backend.line("peak", HIGHEST))), _error(backend.line("peak", HIGHEST))),
        _beside(number(_measured(load)), _error(load)),
        _beside(number(measured, 4), _error(step)),
        "",
        number(_speed(backend, measured)),
    ]


def _cards(backends: Sequence[BackendForecast], cards: str) -> Table:
    from rich.text import Text

    titles = ("backend", "fits", "longest", "fullest\nGiB", "of GiB", "basis", "GiB on each card")
    table = _grid(titles, ("backend", "fits", "basis", "GiB on each card"))
    for backend in backends:
        for outlook in backend.outlooks:
            if outlook.cards != cards:
                continue
            style = "" if outlook.fits else "red"
            peaks = outlook.peak_bytes
            cells = [
                backend.backend,
                "yes" if outlook.fits else "no",
                f"{outlook.longest_sequence:,}" if outlook.longest_sequence else "none",
                gib(max(peaks, default=None)),
                gib(outlook.capacity_bytes),
                outlook.basis,
                outlook.reason or " ".join(f"{peak / GIB:.1f}" for peak in peaks),
            ]
            table.add_row(*(Text(cell, style=style) for cell in cells))
    return table


def _checks(backends: Sequence[BackendForecast]) -> Table:
    from rich.text import Text

    table = _grid(("backend", "from", "weights", "step", "peak", "load"), ("backend", "from"))
    for backend in backends:
        for slices in dict.fromkeys(check.slices for check in backend.checks):
            checks = [check for check in backend.checks if check.slices == slices]
            cells = [
                backend.backend,
                ", ".join(map(str, slices)),
                _errors([weights_error(check.lines) for check in checks]),
                *(_errors([_error(_of(check, *name)) for check in checks])
                  for name in (("step", "step"), ("peak", HIGHEST), ("load", "load"))),
            ]  # fmt: skip
            table.add_row(*(Text(cell) for cell in cells))
    return table


def _grid(titles: Sequence[str], of_words: Sequence[str]) -> Table:
    from rich.table import Table

    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0))
    for title in titles:
        side: Literal["left", "right"] = "left" if title in of_words else "right"
        # Folded, not cut: half of a number is another number.
        table.add_column(title, justify=side, no_wrap=title != titles[-1], overflow="fold")
    return table


# ---- figures -------------------------------------------------------------------------------------


def weights(lines: Sequence[Line], field: Literal["predicted", "measured"]) -> float | None:
    """Bytes of all tensors of the base model; None as soon as one kind is not known."""
    found = [getattr(line, field) for line in lines if line.group == "weights" and line.name in WEIGHT_KINDS]
    return None if not found or None in found else sum(found)


def weights_error(lines: Sequence[Line]) -> float | None:
    """Of the kind that is furthest off, so that two errors cannot cancel each other."""
    found = [line for line in lines if line.group == "weights" and line.measured is not None]
    errors = [0.0 if line.measured == line.predicted else line.error for line in found]
    known = [error for error in errors if error is not None]
    return max(known, key=abs) if known and len(known) == len(errors) else None


def _of(check: Check, group: str, name: str) -> Line | None:
    return next((line for line in check.lines if (line.group, line.name) == (group, name)), None)


def _value(line: Line | None) -> float | None:
    return line.predicted if line else None


def _measured(line: Line | None) -> float | None:
    return line.measured if line else None


def _error(line: Line | None) -> float | None:
    return line.error if line else None


def _speed(backend: BackendForecast, seconds: float | None) -> float | None:
    return backend.tokens_per_step / seconds if backend.tokens_per_step and seconds else None


def percent(error: float | None) -> str:
    """With its sign; exactly nothing is 0."""
    if error is None:
        return MISSING
    if not math.isfinite(error):
        return number(error)
    return "0" if error == 0 else f"{100 * error:+.2f}"


def _errors(errors: Sequence[float | None]) -> str:
    return "  ".join(percent(error) for error in errors)


def _beside(value: str, error: float | None) -> str:
    return value if error is None else f"{value} ({percent(error)} %)"
