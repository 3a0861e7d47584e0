"""The comparison as one self-contained HTML page.

``page(comparison)`` gives the whole text: styles, script and figures are inside, nothing is fetched, and
a strict content security policy holds that. Every string of a record is escaped by the templates
(autoescape); only this package's own CSS, JavaScript and SVG are put in as they are.
"""

from __future__ import annotations

import base64
import hashlib
import re
from collections.abc import Sequence
from importlib.resources import files
from types import SimpleNamespace

from jinja2 import Environment, FunctionLoader, StrictUndefined
from markupsafe import Markup, escape

from bench.judge.comparison import Comparison
from bench.record.forecast import Forecast
from bench.record.schema import Record
from bench.record.triage import Triage
from bench.show import stability_view
from bench.show.columns import COLUMNS, MISSING, changed_dtype, gib, number, sections, words
from bench.show.differences import notes_on
from bench.show.drawing import Plot
from bench.show.fit_section import fit_section
from bench.show.ladder import HEALS, evidence_in_words, rung_in_words
from bench.show.margin import bits_in_words, dtype_in_words, ending_in_words
from bench.show.page_facts import environment_facts, make_cell
from bench.show.page_top import VERDICTS, count, headline, is_synthetic, make_tiles, models_of, setting
from bench.show.plots import plots
from bench.show.runs_shown import margins_of, runs_shown
from bench.show.stability_view import factor_in_words

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
    "memory": ("memory-by-phase", "bytes-by-kind"),
    "time": ("throughput", "step-time"),
    "curve": ("loss", "gradient-norm"),
    "headroom": ("headroom-forward", "headroom-backward"),
    "fidelity": ("gradient-fidelity",),
    "margin": ("margin",),
}
"""Place on the page -> its figures, in order."""


def page(
    comparison: Comparison,
    drawn: Sequence[Plot] | None = None,
    triage: Triage | None = None,
    forecast: Forecast | None = None,
) -> str:
    """The page as HTML text.

    ``drawn``: its figures where they have been drawn already. ``triage``: of one of the runs, where there
    was one. ``forecast``: of the whole model, where there is one.
    """
    css, script = _own("page.css"), _own("page.js")
    figures = {plot.name: plot for plot in (plots(comparison, forecast) if drawn is None else drawn)}
    placed = {
        f"{place}_figures": [figures[n] for n in names if n in figures] for place, names in FIGURES_OF.items()
    }
    shown = runs_shown(comparison)
    hidden = len(comparison.rows) - len(shown)
    return (
        _environment()
        .get_template("page.html")
        .render(
            css=Markup(css),  # noqa: S704  (this package's own file)
            script=Markup(script),  # noqa: S704  (this package's own file)
            policy=_policy(css, script),
            title=models_of(comparison.rows) or "No records",
            headline=headline(comparison),
            setting=setting(comparison.rows),
            tiles=make_tiles(comparison),
            comparison=comparison,
            columns=COLUMNS,
            sections=sections(comparison),
            cells=lambda line: [(column, make_cell(column, line)) for column in COLUMNS],
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
            shown=shown,
            not_shown=count(hidden, "run") if hidden else "",
            margins=margins_of(comparison),
            margin_words=SimpleNamespace(bits=bits_in_words, dtype=dtype_in_words, ending=ending_in_words),
            triage=triage,
            fit=fit_section(comparison, forecast, figures),
            rung_words=SimpleNamespace(heals=HEALS, rung=rung_in_words, evidence=evidence_in_words),
            **placed,
        )
    )


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
        json=_json,
        label=_label,
    )
    return environment


NUMBERS = re.compile(r'\[\n(?:\s|[\d.,eE+-]|null|"NaN"|"-?Infinity")*\]')
"""A JSON list that holds numbers only. No string can look like one, for strings hold no raw line breaks."""


def _json(record: Record) -> str:
    """A record as JSON text, in which a list of numbers is one line: the probes have thousands of them."""
    return NUMBERS.sub(lambda found: " ".join(found.group(0).split()), record.model_dump_json(indent=1))


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
