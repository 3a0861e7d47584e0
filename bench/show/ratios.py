"""What repeats allow to say: the ratio of every backend to the baseline, its interval, and its rank.

``ratio_tables(comparison)`` gives one table for each group with repeats; the terminal, Markdown and the page
draw it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.judge.comparison import Comparison
from bench.judge.groups import FIGURES, Group
from bench.judge.intervals import LEVEL, NOISE_MARGIN
from bench.judge.ranking import Standing
from bench.show.columns import MISSING, number
from bench.show.marks import rank_in_words

if TYPE_CHECKING:
    from rich.table import Table

TITLES: Mapping[str, tuple[str, str]] = {
    "storage_bits_per_weight": ("Bits/weight", "bits"),
    "load_seconds": ("Load time", "load"),
    "reload_seconds": ("Load from cache", "cached"),
    "step_seconds_median": ("Step time", "step"),
    "tokens_per_second": ("Tokens/s", "tok/s"),
    "peak_memory_bytes": ("Peak memory", "peak"),
    "last_loss": ("Last loss", "loss"),
    "gradient_norm_median": ("Gradient norm", "norm"),
}
"""Figure -> its title, and the one where room is scarce, in the order in which they are shown."""


@dataclass(frozen=True)
class RatioCell:
    """One backend in one figure."""

    ratio: str
    range: str
    """From the lower end of the interval to the upper one; empty where there is none, or where all repeats
    agree to the bit."""
    rank: str
    """Empty where there is none; with an equals sign where another backend cannot be told apart."""
    first: bool
    """Whether nobody is surely better, and somebody is surely worse."""
    value: str
    """What it is sorted by."""

    @property
    def text(self) -> str:
        """All of it in one line."""
        return f"{self.ratio} ({self.range})" if self.range else self.ratio

    @property
    def ranked_text(self) -> str:
        """The same with the rank."""
        return f"{self.text}, rank {self.rank}" if self.rank else self.text


@dataclass(frozen=True)
class RatioLine:
    """One backend."""

    label: str
    cells: tuple[RatioCell, ...]


@dataclass(frozen=True)
class RatioTable:
    """One group of runs with repeats."""

    title: str
    baseline: str
    fields: tuple[str, ...]
    lines: tuple[RatioLine, ...]
    legend: str
    resolution: str
    """How far apart two backends had to be; empty where nothing is ranked."""

    @property
    def said(self) -> str:
        """What stands below it."""
        return " ".join((self.legend, self.resolution)).strip()

    @property
    def titles(self) -> tuple[str, ...]:
        """Of the figures."""
        return tuple(TITLES[field][0] for field in self.fields)


def ratio_tables(comparison: Comparison) -> tuple[RatioTable, ...]:
    """A table for each group in which at least one backend shares two repeats with the baseline."""
    found = []
    for place, group in enumerate(comparison.groups, start=1):
        fields = tuple(field for field in TITLES if _repeated(group, field))
        if fields and len(group.summaries) > 1:
            where = f" (group {place})" if len(comparison.groups) > 1 else ""
            found.append(_table(group, fields, where))
    return tuple(found)


def _repeated(group: Group, field: str) -> bool:
    standings = group.rankings[field].standings
    return any(
        one.ratio is not None and one.ratio.pairs > 1
        for label, one in standings.items()
        if label != group.baseline
    )


def _table(group: Group, fields: tuple[str, ...], where: str) -> RatioTable:
    lines = tuple(
        RatioLine(summary.label, tuple(_cell(group, field, summary.label) for field in fields))
        for summary in group.summaries
    )
    counts = sorted({one.ratio.pairs for field in fields for one in _others(group, field) if one.ratio})
    runs = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    legend = (
        f"Geometric mean over {runs} repeats of the ratio to {group.baseline} in the same repeat, with its "
        f"{100 * LEVEL:g} % interval and the rank: 1 plus the number of backends that are surely better. "
        "=: cannot be told apart from at least one other."
    )
    return RatioTable(
        title=f"Ratios to {group.baseline}{where}",
        baseline=group.baseline,
        fields=fields,
        lines=lines,
        legend=legend,
        resolution=_resolution(group, fields),
    )


def _others(group: Group, field: str) -> list[Standing]:
    standings = group.rankings[field].standings
    return [one for label, one in standings.items() if label != group.baseline]


def _resolution(group: Group, fields: tuple[str, ...]) -> str:
    parts = [
        f"{TITLES[field][0].lower()} {100 * (factor - 1):.2g} %"
        for field in fields
        if (factor := group.rankings[field].resolution) is not None and factor > 1
    ]
    if not parts:
        return ""
    return (
        f"Two tie where these intervals overlap or are within {100 * NOISE_MARGIN:g} % of one another (bits: "
        f"overlap). Against {group.baseline} they are widened, so that all {len(group.summaries) - 1} "
        "comparisons hold at once: to be ranked apart from it, a backend in the middle of the field had to "
        f"differ by {', '.join(parts)}. More repeats tell smaller differences."
    )


def _cell(group: Group, field: str, label: str) -> RatioCell:
    standing = group.standing(field, label)
    ratio = standing.ratio if standing else None
    if standing is None or ratio is None:
        return RatioCell(MISSING, "", "", first=False, value="")
    text = "1" if label == group.baseline else number(ratio.estimate)
    return RatioCell(
        text,
        _range(standing),
        rank_in_words(standing),
        first=label in (group.rankings[field].best or ()),
        value=repr(ratio.estimate) if math.isfinite(ratio.estimate) else "",
    )


def _range(standing: Standing) -> str:
    interval = standing.ratio.interval if standing.ratio else None
    if interval is None or interval.low == interval.high:
        return ""
    return f"{number(interval.low)} to {number(interval.high)}"


# ---- terminal ------------------------------------------------------------------------------------


def terminal_ratios(table: RatioTable) -> Table:
    """The figures that have a better end, for a rich console; the others are on the page."""
    from rich.table import Table
    from rich.text import Text

    shown = [place for place, field in enumerate(table.fields) if FIGURES[field] is not None]
    grid = Table(
        box=None, pad_edge=False, header_style="bold", padding=(0, 1, 0, 0), title=Text(table.title),
        title_justify="left", title_style="bold",
    )  # fmt: skip
    grid.add_column("backend", no_wrap=True)
    for place in shown:
        grid.add_column(TITLES[table.fields[place]][1], justify="right", no_wrap=True)
    for line in table.lines:
        cells = [line.cells[place] for place in shown]
        grid.add_row(Text(line.label), *(Text(_brief(c), style="bold" if c.first else "") for c in cells))
    return grid


def _brief(cell: RatioCell) -> str:
    """Ratio and rank, and the interval below: a column must stay narrow."""
    head = f"{cell.ratio} #{cell.rank}" if cell.rank else cell.ratio
    return f"{head}\n{cell.range.replace(' to ', '–')}" if cell.range else head  # noqa: RUF001


# ---- Markdown ------------------------------------------------------------------------------------


def ratio_blocks(comparison: Comparison, escaped: Callable[[str], str]) -> list[str]:
    """Each table as a block of Markdown, with what it says. ``escaped``: makes text harmless."""
    import pandas

    blocks = []
    for table in ratio_tables(comparison):
        rows = [
            [escaped(line.label), *(f"**{c.ranked_text}**" if c.first else c.ranked_text for c in line.cells)]
            for line in table.lines
        ]
        frame = pandas.DataFrame(rows, columns=["Backend", *table.titles], dtype=object)
        align = ("left", *("right" for _ in table.titles))
        text = frame.to_markdown(index=False, disable_numparse=True, colalign=align)
        blocks.append(f"**{escaped(table.title)}**\n\n{text}\n\n{escaped(table.said)}")
    return blocks
