"""The comparison as one self-contained HTML page.

``page(comparison)`` gives the whole text: styles, script and figures are inside, nothing is fetched, and
a strict content security policy holds that. Every string of a record is escaped by the templates
(autoescape); only this package's own CSS, JavaScript and SVG are put in as they are.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Mapping, Sequence
from importlib.resources import files
from types import SimpleNamespace

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from bench.judge.comparison import Comparison
from bench.judge.rows import Row
from bench.judge.unlike import listed
from bench.record.forecast import Forecast
from bench.record.triage import Triage
from bench.show import stability_view
from bench.show.columns import COLUMNS, MISSING, Line, changed_dtype, gib, number, sections, words
from bench.show.decision import decision_of
from bench.show.differences import notes_on
from bench.show.drawing import Plot
from bench.show.embedded import embed
from bench.show.facets import Facets, facets_of
from bench.show.fit_section import fit_section
from bench.show.ladder import HEALS, evidence_in_words, rung_in_words
from bench.show.margin import bits_in_words, dtype_in_words, ending_in_words
from bench.show.marks import best_legend
from bench.show.owners import owned
from bench.show.page_facts import environment_facts, make_cell
from bench.show.page_tools import column_groups, make_chips, settings_of
from bench.show.page_top import VERDICTS, count, headline, is_synthetic, make_tiles, models_of, setting
from bench.show.plots import plots
from bench.show.ratios import ratio_tables
from bench.show.runs_shown import margins_of, runs_shown
from bench.show.selection import RUNS_LISTED, select
from bench.show.stability_view import factor_in_words
from bench.show.sweep_plots import OF_SWEEP

__all__ = ["headline", "page"]

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

FIGURES_OF = {
    "choice": ("pareto",),
    "ratio": ("ratio-step-time", "ratio-peak-memory", "ratio-load-time"),
    "memory": ("memory-by-phase", "bytes-by-kind"),
    "time": ("throughput", "step-time"),
    "curve": ("loss", "gradient-norm"),
    "headroom": ("headroom-forward", "headroom-backward"),
    "fidelity": ("gradient-fidelity",),
    "margin": ("margin",),
}
"""Place on the page -> its figures, in order."""
MANY = 150
"""Runs from which on the browser lays out a section only when it comes into view."""
NAMES_LISTED = 24
"""Runs that are named for one value of a condition."""
VALUES_SHOWN = 12
"""Values of a condition that are shown; a seed has one for each repeat."""
STANDING_SHOWN = 8
"""Lines of each list at the top."""


def page(
    comparison: Comparison,
    drawn: Sequence[Plot] | None = None,
    triage: Triage | None = None,
    forecast: Forecast | None = None,
    refresh_seconds: float | None = None,
) -> str:
    """The page as HTML text.

    ``drawn``: its figures where they have been drawn already. ``triage``: of one of the runs, where there
    was one. ``forecast``: of the whole model, where there is one. ``refresh_seconds``: how often the page
    loads itself again; None: never.
    """
    css, script = _own("page.css"), _own("page.js")
    figures = {plot.name: plot for plot in (plots(comparison, forecast) if drawn is None else drawn)}
    hidden = len(comparison.rows) - len(runs_shown(comparison))
    chosen, facets = select(comparison), facets_of(comparison.rows)
    return (
        _environment()
        .get_template("page.html")
        .render(
            css=Markup(css),  # noqa: S704  (this package's own file)
            script=Markup(script),  # noqa: S704  (this package's own file)
            policy=_policy(css, script),
            refresh=None if refresh_seconds is None else f"{refresh_seconds:g}",
            title=models_of(comparison.rows) or "No records",
            headline=headline(comparison),
            setting=setting(comparison.rows),
            decision=decision_of(comparison),
            tiles=make_tiles(comparison),
            comparison=comparison,
            columns=COLUMNS,
            sections=sections(comparison),
            ratio_tables=ratio_tables(comparison),
            mark_means=best_legend(comparison),
            cells=lambda line: [(column, make_cell(column, line)) for column in COLUMNS],
            facets=facets.facets,
            of_run=lambda row: _of_run(row, facets),
            of_line=lambda line: _of_run(_gravest(line), facets),
            chips=make_chips(comparison, forecast),
            column_groups=column_groups(),
            settings=settings_of(chosen),
            listed_note=chosen.listed_note,
            every=chosen.every,
            every_note=chosen.every_note,
            uses_shown=RUNS_LISTED,
            standing_shown=STANDING_SHOWN,
            values_shown=VALUES_SHOWN,
            records=embed(comparison.rows, chosen.every),
            many=len(comparison.rows) > MANY,
            changed_dtype=changed_dtype,
            terms=TERMS,
            verdicts=VERDICTS,
            svg=lambda plot: Markup(plot.svg),  # noqa: S704  (drawn by bench.show.plots, which escapes)
            synthetic=is_synthetic(comparison.rows),
            identical=[item for item in comparison.conditions if item.shown_identical],
            untold=[i.name for i in comparison.conditions if not i.differs and not i.shown_identical],
            environment=environment_facts(comparison.rows),
            notes=notes_on(comparison),
            missing=MISSING,
            view=stability_view,
            listed=chosen.listed,
            not_shown=count(hidden, "run") if hidden else "",
            margins=margins_of(comparison),
            margin_words=SimpleNamespace(bits=bits_in_words, dtype=dtype_in_words, ending=ending_in_words),
            triage=triage,
            fit=fit_section(comparison, forecast, figures),
            rung_words=SimpleNamespace(heals=HEALS, rung=rung_in_words, evidence=evidence_in_words),
            **_placed(figures),
        )
    )


def _placed(figures: Mapping[str, Plot]) -> dict[str, list[Plot]]:
    """The figures of each place, by the name that the template has for it."""
    named = {
        f"{place}_figures": [figures[name] for name in names if name in figures]
        for place, names in FIGURES_OF.items()
    }
    return {**named, "sweep_figures": [plot for name, plot in figures.items() if name.startswith(OF_SWEEP)]}


def _gravest(line: Line) -> Row:
    """The run whose verdict the line shows."""
    verdict = line.summary.verdict.verdict
    return next(row for row in line.summary.rows if row.verdict.verdict == verdict)


def _of_run(row: Row, facets: Facets) -> Markup:
    """The attributes by which the script finds the rows of a run."""
    own = f'data-status="{escape(row.record.status)}" {owned(row.label)} data-facets="{facets.of(row)}"'
    return Markup(own)  # noqa: S704  (escaped right here; the others are digits and letters)


# ---- the page's own files and filters ------------------------------------------------------------


def _environment() -> Environment:
    environment = Environment(
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        loader=FunctionLoader(_own),
    )
    environment.filters.update(
        gib=gib,
        number=number,
        words=words,
        joined=", ".join,
        flags=_unbroken_flags,
        factor=factor_in_words,
        label=_label,
        owned=lambda label: Markup(owned(label)),  # noqa: S704  (letters, digits and hyphens)
        few=_few,
        standing=_standing,
    )
    return environment


def _standing(line: str) -> Markup:
    """Escape a line such as "hqq: 4 % more memory; healthy", with the backend in front set off."""
    name, colon, rest = line.partition(": ")
    whole = f"<strong>{escape(name)}</strong>{colon}{escape(rest)}" if colon else escape(line)
    return Markup(whole)  # noqa: S704  (escaped right here)


def _few(names: Sequence[str]) -> str:
    """Names with commas between them, and how many are left out of very many."""
    return listed(names, NAMES_LISTED)


def _label(text: str) -> Markup:
    """Escape a run's name; its settings, which can be long, may be broken into lines and the backend not."""
    backend, space, settings = text.partition(" ")
    broken = f' <span class="settings">{escape(settings)}</span>' if space else ""
    return Markup(f'<span class="flag">{escape(backend)}</span>{broken}')  # noqa: S704  (escaped right here)


def _unbroken_flags(text: str) -> Markup:
    """Escape ``text``, and keep a command line option such as --steps on one line."""
    whole = re.sub(r"--[a-z]+", r'<span class="flag">\g<0></span>', str(escape(text)))
    return Markup(whole)  # noqa: S704  (escaped in the line above)


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
