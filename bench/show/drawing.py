"""How every figure is drawn, and how matplotlib's SVG becomes an element that lives in any page.

Text and axes have the colour of the text around them, so a figure is legible on light and on dark; each
backend has one colour and one marker in all figures (``bench.show.styles``); equal data gives equal bytes.
"""

from __future__ import annotations

import html
import io
import math
import re
import warnings
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeGuard

from bench.errors import printable
from bench.show.owners import owner_id, with_owners

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

INK = "#010203"
"""Drawn with by matplotlib, then replaced by currentColor. No backend has this colour."""
WIDTH_INCHES = 6.4
LONGEST_OF_LINES, LONGEST_IN_LEGEND = 36, 64
"""Characters of a name beside a horizontal line, and in a legend, that leave room for the figure."""
FONTS = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"


SMALLEST_DRAWN, LARGEST_DRAWN = 1e-150, 1e150
"""Beyond these the arithmetic of an axis leaves the range of floats."""


@dataclass(frozen=True)
class Plot:
    """One figure. ``svg`` is an ``<svg>`` element without prologue."""

    name: str
    title: str
    svg: str
    alternative: str
    """What the figure shows, in words."""

    @property
    def standalone(self) -> str:
        """The figure as a file: it brings the text colour that a page would give it."""
        style = "<style>svg{color:#1b1f24}@media(prefers-color-scheme:dark){svg{color:#e6e8ea}}</style>"
        head, rest = self.svg.split(">", 1)
        return f'<?xml version="1.0" encoding="utf-8"?>\n{head}>{style}{rest}\n'


# ---- matplotlib ----------------------------------------------------------------------------------

SETTINGS: Any = {
    "svg.fonttype": "none",
    "svg.hashsalt": "qlora-bench",
    "text.parse_math": False,
    "text.color": INK,
    "axes.labelcolor": INK,
    "axes.edgecolor": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "hatch.linewidth": 0.7,
    "font.family": ["DejaVu Sans"],
    "font.size": 11,
    "lines.linewidth": 1.6,
    "lines.markersize": 6,
}


@contextmanager
def new_figure(height_inches: float) -> Iterator[tuple[Figure, Axes]]:
    """A Figure of its own, without pyplot: nothing global stays behind."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context(SETTINGS), warnings.catch_warnings():
        # Its remarks (a font without a sign of some script, an axis of one value) are not for who asked for
        # a report: the font only measures, and the numbers stand in the figure's words.
        warnings.simplefilter("ignore", UserWarning)
        figure = Figure(figsize=(WIDTH_INCHES, height_inches), layout="constrained")
        FigureCanvasSVG(figure)
        figure.patch.set_visible(False)
        yield figure, dressed(figure.add_subplot())


def dressed(axes: Axes) -> Axes:
    """Axes as every figure has them."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(visible=True, axis="both", color=INK, alpha=0.12, lw=0.8)
    axes.set_axisbelow(True)
    axes.patch.set_visible(False)
    return axes


def has_place(value: float | None, *, logarithmic: bool = False) -> TypeGuard[float]:
    """Whether a value can be drawn on a scale."""
    if value is None or not math.isfinite(value):
        return False
    if value == 0:
        return not logarithmic
    return SMALLEST_DRAWN <= abs(value) <= LARGEST_DRAWN and (value > 0 or not logarithmic)


def name_lines(axes: Axes, names: Sequence[str], labels: Sequence[str]) -> None:
    """One horizontal line of the figure for each name, from the top down; ``labels``: whose line it is."""
    axes.set_yticks(range(len(names)), [elided(name, LONGEST_OF_LINES) for name in names])
    name_owners(axes, labels)
    axes.set_ylim(len(names) - 0.45, -0.55)
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    axes.grid(visible=False, axis="y")


def name_owners(axes: Axes, labels: Sequence[str]) -> None:
    """Say of each name on the vertical axis whose it is."""
    for text, label in zip(axes.get_yticklabels(), labels, strict=True):
        text.set_gid(owner_id(label))


def shading(shade: float, hatch: str) -> dict[str, Any]:
    """A filled box in the colour of the text, told apart by shade and hatching."""
    from matplotlib.colors import to_rgba

    return {"facecolor": to_rgba(INK, shade), "edgecolor": INK, "hatch": hatch, "linewidth": 0.6}


def box(**look: Any) -> Patch:
    """A filled box for a legend."""
    from matplotlib.patches import Patch

    return Patch(**look)


def legend_below(figure: Figure, handles: Mapping[str, Artist]) -> None:
    """A legend under the figure, in as many columns as its longest label leaves room for.

    What belongs to a backend belongs to it in the legend too.
    """
    look: Any = {"frameon": False, "handlelength": 2.2, "columnspacing": 1.2, "fontsize": 10}
    columns = _legend_columns(list(handles))
    names = [elided(name, LONGEST_IN_LEGEND) for name in handles]
    legend = figure.legend(handles.values(), names, loc="outside lower center", ncols=columns, **look)
    for given, *shown in zip(handles.values(), legend.legend_handles, legend.get_texts(), strict=True):
        for artist in shown:
            if artist is not None:
                artist.set_gid(given.get_gid())


def height_with_legend(names: Collection[str]) -> float:
    """Inches of a figure of curves with a legend of these names below, that takes no room from the axes."""
    rows = math.ceil(len(names) / _legend_columns(names)) if names else 0
    return 3.3 + 0.2 * rows


def _legend_columns(names: Collection[str]) -> int:
    longest = max(len(elided(name, LONGEST_IN_LEGEND)) for name in names)
    return max(1, min(4, 76 // (longest + 8)))


def elided(name: str, longest: int) -> str:
    """A name that leaves room for the figure; the tables have it in full, and its ends tell most.

    It is on one line and without control characters, which neither matplotlib nor XML takes.
    """
    name = printable(" ".join(name.split()))
    if len(name) <= longest:
        return name
    return f"{name[: longest - 16]}…{name[-15:]}"


# ---- SVG -----------------------------------------------------------------------------------------


def finish(figure: Figure, name: str, title: str, words: str) -> Plot:
    """The figure as SVG, with what it shows in words."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None}, transparent=True)
    return Plot(name, title, _clean(buffer.getvalue(), name, words), words)


def hand_drawn(body: str, size: tuple[float, float], name: str, title: str, words: str) -> Plot:
    """A figure out of SVG elements written by hand, ``size`` units wide and high.

    For figures of which matplotlib would make too many elements. ``body`` must be well-formed, must escape
    its texts, and must begin its ids with ``name``.
    """
    root = _root(f'viewBox="0 0 {size[0]:g} {size[1]:g}"', words)
    return Plot(name, title, f"{root}{body}</svg>", words)


def _clean(text: str, name: str, words: str) -> str:
    """What matplotlib wrote, as an element that lives in any page.

    Style attributes become plain ones, which a strict content security policy allows; ids get the
    figure's name, so that two figures of a page do not share any; the text colour is the page's.
    """
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.S)
    text = re.sub(r"<style[^>]*>.*?</style>", "", text, flags=re.S)
    # Tags only: a name that looks like an attribute is text, and stays as it is.
    text = re.sub(r"<[^>]*>", lambda tag: _clean_tag(tag.group(0), name), text)
    size = re.search(r'viewBox="[^"]*"', text)
    assert size is not None, "matplotlib always writes a view box"
    return re.sub(r"^<svg[^>]*>", lambda _: _root(size.group(0), words), text).strip()


def _clean_tag(tag: str, name: str) -> str:
    tag = re.sub(r'style="([^"]*)"', lambda match: _attributes(match.group(1)), tag)
    tag = with_owners(tag.replace(INK, "currentColor"))
    return re.sub(r'(\bid="|href="#|url\(#)', rf"\g<1>{name}-", tag)


def _root(view_box: str, words: str) -> str:
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink" {view_box} '
        f'role="img" aria-label="{html.escape(printable(words))}" stroke-linejoin="round">'
    )


def _attributes(style: str) -> str:
    found = []
    for declaration in style.split(";"):
        key, _, value = (part.strip() for part in declaration.partition(":"))
        if key == "font":
            size = re.match(r"[\d.]+px", value)
            found.append(f'font-size="{size.group(0) if size else "11px"}" font-family="{FONTS}"')
        elif key == "font-family":
            found.append(f'font-family="{FONTS}"')
        elif key:
            found.append(f'{key}="{value}"')
    return " ".join(found)
