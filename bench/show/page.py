"""The comparison as one self-contained HTML page.

``page(comparison)`` gives the whole text: styles, script and figures are inside, nothing is fetched, and
a strict content security policy holds that. Every string of a record is escaped by the template
(autoescape); only this package's own CSS, JavaScript and SVG are put in as they are.
"""

from __future__ import annotations

import base64
import hashlib
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup, escape

from bench.judge.comparison import Comparison
from bench.judge.conditions import NOT_RECORDED, ConditionValue, counted
from bench.judge.groups import FIGURES, Summary
from bench.judge.rows import Row
from bench.judge.stability import BAD, VerdictName
from bench.show.columns import (
    COLUMNS,
    MISSING,
    Column,
    Line,
    changed_dtype,
    gib,
    number,
    outcome,
    sections,
    words,
)
from bench.show.drawing import Plot
from bench.show.plots import plots

TERMS = {
    "bf16": "no quantization: the reference",
    "bnb-nf4": "NF4: 4-bit codes spaced for normally distributed weights",
    "bnb-nf4-dq": "NF4 with double quantization: the scales are quantized too",
    "bnb-int8": "8-bit integers, with outlier columns kept in 16 bit",
    "hqq": "half-quadratic quantization: scales fitted to the weights, without data",
    "gptq": "4-bit codes, rounded so that each rounding error is made up for by later weights",
    "awq": "4-bit codes after scaling up the channels that activations make important",
    "eetq": "8-bit integers, one scale for each output channel",
}
"""Backend -> half a sentence; a backend from elsewhere has none."""


VERDICTS: Mapping[VerdictName, str] = {
    "non_finite": "NaN or infinity in a loss or a gradient",
    "poisoned": "the trained weights are no longer finite",
    "dead": "every gradient is exactly zero",
    "not_judged": "nothing can be concluded",
}
"""Verdict -> half a sentence; healthy speaks for itself."""


@dataclass(frozen=True)
class Tile:
    """One of the few answers that stand at the top."""

    title: str
    answer: str
    details: tuple[str, ...]


@dataclass(frozen=True)
class Cell:
    """One cell of the main table."""

    text: str
    range: str
    """Lowest and highest run beside a median, empty where there is one run."""
    value: str
    """What it is sorted by, empty where there is nothing to sort by."""
    mark: str
    """"lowest" or "highest" where it is the best measured, else empty."""


@dataclass(frozen=True)
class Fact:
    """One entry of a list of facts: a name, and what was found, with who where it differs."""

    name: str
    values: tuple[ConditionValue, ...]


def page(comparison: Comparison, drawn: Sequence[Plot] | None = None) -> str:
    """The page as HTML text; ``drawn`` are its figures where they have been drawn already."""
    css, script = _own("page.css"), _own("page.js")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    environment.filters.update(gib=gib, number=number, words=words, joined=", ".join, flags=_unbroken_flags)
    template = environment.from_string(_own("page.html"))
    figures = {plot.name: plot for plot in (plots(comparison) if drawn is None else drawn)}
    return template.render(
        css=Markup(css),  # noqa: S704  (this package's own file)
        script=Markup(script),  # noqa: S704  (this package's own file)
        policy=_policy(css, script),
        title=_models(comparison.rows) or "No records",
        headline=headline(comparison),
        setting=_setting(comparison.rows),
        tiles=_tiles(comparison),
        comparison=comparison,
        columns=COLUMNS,
        sections=sections(comparison),
        cells=lambda line: [(column, _cell(column, line)) for column in COLUMNS],
        changed_dtype=changed_dtype,
        terms=TERMS,
        verdicts=VERDICTS,
        memory_figures=_pick(figures, "memory-by-phase", "bytes-by-kind"),
        time_figures=_pick(figures, "throughput", "step-time"),
        curve_figures=_pick(figures, "loss", "gradient-norm"),
        svg=lambda plot: Markup(plot.svg),  # noqa: S704  (drawn by bench.show.plots, which escapes)
        synthetic=_synthetic(comparison.rows),
        identical=[item for item in comparison.conditions if item.shown_identical],
        untold=[i.name for i in comparison.conditions if not i.differs and not i.shown_identical],
        environment=_environment(comparison.rows),
        missing=MISSING,
    )


# ---- what the page says first ------------------------------------------------------------------------


def headline(comparison: Comparison) -> str:
    """What was measured, where and on what, how many completed, and the answers of the top, in sentences."""
    answers = [f"{tile.title}: {'; '.join((tile.answer, *tile.details))}." for tile in _tiles(comparison)]
    return " ".join([_setting(comparison.rows), *answers])


def _setting(rows: Sequence[Row]) -> str:
    if not rows:
        return "There are no records here, so there is nothing to show."
    done = sum(row.completed for row in rows)
    backends = len({row.record.request.backend for row in rows})
    ended = "all" if done == len(rows) else done or "none"
    cpu = any(row.record.request.device == "cpu" for row in rows)
    return (
        f"{_count(len(rows), 'short QLoRA run')} with {_count(backends, 'backend')} "
        f"on {_where(rows)}, {_weights(rows)}: {ended} completed."
        + (" These are figures of a CPU, not of a GPU." if cpu else "")
    )


def _tiles(comparison: Comparison) -> list[Tile]:
    """Who needed least memory, who was fastest, and what went wrong."""
    tiles = []
    if comparison.groups:
        summaries = comparison.groups[0].summaries
        several = len(comparison.groups) > 1
        of = ("in the largest group of alike runs",) if several else ()
        memory = _extreme(
            summaries, "peak_memory_bytes", ("Lowest memory measured", "Memory"), "GiB at the peak", gib
        )
        speed = _extreme(
            summaries, "tokens_per_second", ("Highest speed measured", "Speed"), "tokens/s", number
        )
        tiles = [Tile(t.title, t.answer, (*t.details, *of)) for t in (memory, speed) if t]
    if comparison.rows:
        tiles.append(_wrong(comparison.rows))
    return tiles


def _extreme(
    summaries: Sequence[Summary],
    field: str,
    titles: tuple[str, str],
    unit: str,
    form: Callable[[float | None], str],
) -> Tile | None:
    """The better end of a figure and the next after it; the second title where there is no next."""
    known = [
        (spread, summary)
        for summary in summaries
        if (spread := summary.figures.get(field)) and math.isfinite(spread.median)
    ]
    if not known:
        return None
    known.sort(key=lambda pair: pair[0].median, reverse=FIGURES[field] == "highest")
    best = known[0][0]
    leaders = [summary for spread, summary in known if spread.median == best.median]
    value, names = f"{form(best.median)} {unit}", " and ".join(_with_verdict(leader) for leader in leaders)
    if len(leaders) == len(known):
        return Tile(titles[1], names, (value, "nothing to compare it with" if len(known) == 1 else "equal"))
    following, runner_up = known[len(leaders)]
    overlap = best.low <= following.high and following.low <= best.high
    doubt = ", but the ranges overlap" if overlap else ""
    return Tile(
        titles[0], names, (value, f"next: {_with_verdict(runner_up)}, {form(following.median)}{doubt}")
    )


def _with_verdict(summary: Summary) -> str:
    """A backend whose training broke is no choice, however small or fast: its name never stands alone."""
    verdict = summary.verdict.verdict
    return f"{summary.label} ({words(verdict)})" if verdict in BAD else summary.label


def _wrong(rows: Sequence[Row]) -> Tile:
    found = [f"{row.label}: {fault}" for row in rows if (fault := _fault(row))]
    if found:
        return Tile(
            "What went wrong", f"{len(found)} of {_count(len(rows), 'run')}", tuple(dict.fromkeys(found))
        )
    finite = "every loss and gradient stayed finite"
    caution = "; on synthetic weights that proves nothing" if _synthetic(rows) else ""
    return Tile("What went wrong", "Nothing", ("every run completed", finite + caution))


def _fault(row: Row) -> str | None:
    if not row.completed:
        return outcome(row)
    if row.verdict.verdict in BAD:
        return f"{words(row.verdict.verdict)}: {VERDICTS[row.verdict.verdict]}"
    if row.non_finite_steps:
        return f"{row.non_finite_steps} of {len(row.record.steps)} steps not finite"
    return None


def _synthetic(rows: Sequence[Row]) -> bool:
    return any(row.record.request.model.weights == "synthetic" for row in rows)


def _models(rows: Sequence[Row]) -> str:
    return " and ".join(dict.fromkeys(row.record.request.model.name for row in rows))


def _weights(rows: Sequence[Row]) -> str:
    models = [row.record.request.model for row in rows]
    parts = (
        f"{model.weights} weights, "
        + ("all layers" if model.layers is None else f"the first {_count(model.layers, 'layer')}")
        for model in models
    )
    return " and ".join(dict.fromkeys(parts))


def _where(rows: Sequence[Row]) -> str:
    places = []
    for row in rows:
        environment, device = row.record.environment, row.record.request.device
        if environment is not None:
            threads = f" (CPU, {_count(environment.cpu_threads, 'thread')})" if device == "cpu" else ""
            places.append(counted(item.name for item in environment.devices) + threads)
    # Runs that never reached a device have no environment; the request still names its kind.
    return " and ".join(dict.fromkeys(places or [row.record.request.device for row in rows]))


def _count(number_of: int, noun: str) -> str:
    return f"{number_of} {noun}" if number_of == 1 else f"{number_of} {noun}s"


# ---- tables and facts ----------------------------------------------------------------------------------


def _cell(column: Column, line: Line) -> Cell:
    value = column.number(line)
    # A value that is not finite has no place in an order: it is sorted last, like a missing one.
    sortable = repr(value) if value is not None and math.isfinite(value) else ""
    mark = FIGURES[column.field] if column.field in line.best else None
    text, _, beside = column.text(line).partition(" (") if column.numeric else (column.text(line), "", "")
    return Cell(text, beside.rstrip(")"), sortable, mark or "")


def _unbroken_flags(text: str) -> Markup:
    """Escape ``text``, and keep a command line option such as --steps on one line."""
    whole = re.sub(r"--[a-z]+", r'<span class="flag">\g<0></span>', str(escape(text)))
    return Markup(whole)  # noqa: S704  (escaped in the line above)


def _environment(rows: Sequence[Row]) -> list[Fact]:
    """Every fact of the environments, with the runs it holds for where they are not one."""
    found: dict[str, dict[str, list[str]]] = {}
    for row in rows:
        for name, value in _environment_of(row):
            found.setdefault(name, {}).setdefault(value, []).append(row.label)
    return [
        Fact(
            name,
            tuple(ConditionValue(text, tuple(dict.fromkeys(labels))) for text, labels in values.items()),
        )
        for name, values in found.items()
    ]


def _environment_of(row: Row) -> Iterable[tuple[str, str]]:
    environment = row.record.environment
    if environment is None:
        return
    yield "system", environment.platform
    yield "Python", environment.python
    yield "processor", f"{environment.cpu}, {_count(environment.cpu_cores, 'core')}"
    yield "CPU threads used", str(environment.cpu_threads)
    yield "memory", f"{gib(environment.total_memory_bytes)} GiB"
    yield "CUDA", environment.cuda or "none"
    for device in environment.devices:
        details = [
            device.name,
            None if device.total_memory_bytes is None else f"{gib(device.total_memory_bytes)} GiB",
            device.compute_capability and f"compute capability {device.compute_capability}",
            device.driver and f"driver {device.driver}",
            None if device.power_limit_watts is None else f"limited to {device.power_limit_watts:g} W",
        ]
        yield f"device {device.device}", ", ".join(detail for detail in details if detail)
    yield "allocator settings", environment.allocator_settings or "default"
    for name, value in environment.changed_variables.items():
        yield f"{name}, as a library wanted it", "removed" if value is None else value
    imported = environment.quantization_libraries_imported
    yield "quantization libraries in memory", ", ".join(imported) or "none"
    yield "harness commit", environment.commit or "outside a checkout"
    dirty = {True: "yes", False: "no", None: NOT_RECORDED}
    yield "uncommitted changes", dirty[environment.dirty]
    for library, version in environment.versions.items():
        yield library, version or "not installed"


# ---- the page's own files ------------------------------------------------------------------------------


def _pick(figures: dict[str, Plot], *names: str) -> list[Plot]:
    return [figures[name] for name in names if name in figures]


def _own(name: str) -> str:
    return files("bench.show").joinpath(name).read_text(encoding="utf-8")


def _policy(css: str, script: str) -> str:
    """Nothing may load and nothing may run but the two texts with these digests."""
    return (
        f"default-src 'none'; style-src '{_digest(css)}'; script-src '{_digest(script)}'; "
        "img-src data:; base-uri 'none'; form-action 'none'"
    )


def _digest(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
