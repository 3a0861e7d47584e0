"""Sweeps as small multiples: a figure over the values of a setting, a line for each backend, and a panel for
each combination of the other settings, so that nothing is averaged over two of them.

``sweep_plots(rows, styles)`` draws memory, speed and the last loss for the settings in which runs of one
backend differ. A run that did not complete is a cross on the top edge: how far a setting can be taken is a
result.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.judge.labels import swept_settings
from bench.judge.rows import Row
from bench.show.bands import Band, band_of, draw_band
from bench.show.columns import GIB, number
from bench.show.drawing import Plot, dressed, elided, finish, legend_below, new_figure
from bench.show.owners import owner
from bench.show.styles import Style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.lines import Line2D

SETTINGS, PANELS, BACKENDS, VALUES = 3, 6, 8, 16
"""Settings that have figures, panels of a figure, backends in a panel, and values of a setting, at most."""
COLUMNS = 2
OF_SWEEP = "sweep-"
"""How the names of its figures begin."""
SAYS_NOTHING = ("unavailable", "interrupted")
"""Outcomes that say nothing of the setting."""
PANEL_INCHES = 2.1
CROSS = "A cross on the top edge: a run did not complete there, or its value is not finite."
LONGEST_TITLE = 44


@dataclass(frozen=True)
class Metric:
    """What is drawn over a setting."""

    name: str
    title: str
    axis: str
    value: Callable[[Row], float | None]


METRICS = (
    Metric("memory", "Peak memory", "peak memory (GiB)",
           lambda row: None if row.peak_memory_bytes is None else row.peak_memory_bytes / GIB),
    Metric("speed", "Tokens per second", "tokens/s", lambda row: row.tokens_per_second),
    Metric("loss", "Last loss", "last loss (nats)", lambda row: row.last_loss),
)  # fmt: skip


@dataclass(frozen=True)
class Sweep:
    """One setting: its values in order, and its panels."""

    setting: str
    values: tuple[str, ...]
    panels: Mapping[str, Mapping[str, Sequence[tuple[int, Row]]]]
    """The other settings in words -> backend -> place among the values, and run."""
    left_out: int
    """Panels that are not drawn."""


def sweep_plots(rows: Sequence[Row], styles: Mapping[str, Style]) -> Iterator[Plot]:
    """The figures of each setting that was swept; ``styles``: by backend."""
    for sweep in _sweeps(rows):
        for metric in METRICS:
            plot = _plot(sweep, metric, styles)
            if plot is not None:
                yield plot


def _sweeps(rows: Sequence[Row]) -> Iterator[Sweep]:
    telling = [row for row in rows if row.record.status not in SAYS_NOTHING]
    settings = swept_settings([row.record for row in telling])
    of_row = [dict(zip(settings, values, strict=True)) for values in zip(*settings.values(), strict=True)]
    pairs = list(zip(telling, of_row, strict=True)) if settings else []
    found = [path for path in settings if _has_curve(path, pairs)]
    for path in found[:SETTINGS]:
        values = _ordered([own[path] for _, own in pairs])
        if len(values) <= VALUES:
            yield _sweep(path, values, pairs)


def _has_curve(path: str, pairs: Sequence[tuple[Row, Mapping[str, str]]]) -> bool:
    """Whether a backend completed with two values of the setting, all else equal."""
    seen: dict[object, set[str]] = {}
    for row, own in pairs:
        rest = tuple(value for name, value in own.items() if name != path)
        seen.setdefault((row.record.request.backend, rest), set()).add(own[path] if row.completed else "")
    return any(len(values - {""}) > 1 for values in seen.values())


def _sweep(path: str, values: tuple[str, ...], pairs: Sequence[tuple[Row, Mapping[str, str]]]) -> Sweep:
    rests = [{name: value for name, value in own.items() if name != path} for _, own in pairs]
    kinds = list({tuple(rest.items()): rest for rest in rests}.values())
    panels = [rest for rest in kinds if not any(_within(rest, other) for other in kinds)]
    drawn: dict[str, dict[str, list[tuple[int, Row]]]] = {}
    for panel in panels:
        lines = drawn.setdefault(_in_words(panel), {})
        for (row, own), rest in zip(pairs, rests, strict=True):
            if rest == panel or _within(rest, panel):
                lines.setdefault(row.record.request.backend, []).append((values.index(own[path]), row))
    by_runs = sorted(drawn, key=lambda title: -sum(map(len, drawn[title].values())))
    kept = {
        title: dict(list(lines.items())[:BACKENDS])
        for title, lines in drawn.items()
        if title in by_runs[:PANELS]
    }
    return Sweep(path.rpartition(".")[2], values, kept, len(drawn) - len(kept))


def _within(rest: Mapping[str, str], panel: Mapping[str, str]) -> bool:
    """Whether runs belong into a panel although they lack an option that it is about: these stand in each."""
    lacks = [name for name, value in rest.items() if name.startswith("options.") and value == "unset"]
    return (
        any(panel[name] != "unset" for name in lacks)
        and all(panel[name] == value for name, value in rest.items() if name not in lacks)
    )


def _in_words(rest: Mapping[str, str]) -> str:
    return ", ".join(f"{name.rpartition('.')[2]}={value}" for name, value in rest.items())


def _ordered(values: Sequence[str]) -> tuple[str, ...]:
    own = dict.fromkeys(values)
    try:
        return tuple(sorted(own, key=float))
    except ValueError:
        return tuple(own)


def _plot(sweep: Sweep, metric: Metric, styles: Mapping[str, Style]) -> Plot | None:
    bands = {
        rest: {backend: _band(points, metric) for backend, points in lines.items()}
        for rest, lines in sweep.panels.items()
    }
    if not any(band.drawn for lines in bands.values() for band in lines.values()):
        return None
    columns = min(COLUMNS, len(bands))
    lines_of_panels = math.ceil(len(bands) / columns)
    with new_figure(0.9 + PANEL_INCHES * lines_of_panels) as (figure, only):
        only.remove()
        grid = figure.subplots(lines_of_panels, columns, squeeze=False, sharex=True, sharey=True)
        legend: dict[str, Line2D] = {}
        for place, (rest, lines) in enumerate(bands.items()):
            axes = dressed(grid.flat[place])
            legend |= {b: line for b, line in _panel(axes, rest, lines, styles).items() if b not in legend}
            axes.set_xticks(range(len(sweep.values)), [elided(v, 18) for v in sweep.values])
        for axes in list(grid.flat)[len(bands) :]:
            axes.set_visible(False)
        figure.supxlabel(sweep.setting.replace("_", " "), fontsize=11)
        figure.supylabel(metric.axis, fontsize=11)
        legend_below(figure, legend)
        title = f"{metric.title} by {sweep.setting.replace('_', ' ')}"
        name = f"{OF_SWEEP}{metric.name}-{owner(sweep.setting)}"
        return finish(figure, name, title, _words(title, sweep, bands))


def _panel(
    axes: Axes, rest: str, lines: Mapping[str, Band], styles: Mapping[str, Style]
) -> dict[str, Line2D]:
    found, crossed = {}, 0
    for backend, band in lines.items():
        found[backend] = draw_band(axes, band, styles[backend], backend, crossed, size=4.0)
        crossed += bool(band.broken)
    if rest:
        axes.set_title(elided(rest, LONGEST_TITLE), fontsize=9, loc="left")
    return found


def _band(points: Sequence[tuple[int, Row]], metric: Metric) -> Band:
    """Of the runs of a backend in a panel; one that did not complete has no number, which is drawn."""
    return band_of(
        [{place: metric.value(row) if row.completed else math.nan} for place, row in points],
        logarithmic=False,
    )


def _words(title: str, sweep: Sweep, bands: Mapping[str, Mapping[str, Band]]) -> str:
    parts = []
    for rest, lines in bands.items():
        said = "; ".join(f"{backend} {_line_in_words(band, sweep)}" for backend, band in lines.items())
        parts.append(f"{rest}: {said}" if rest else said)
    crosses = any(band.broken for lines in bands.values() for band in lines.values())
    return " ".join(filter(None, (
        f"{title}, a line for each backend. {'. '.join(parts)}.",
        CROSS if crosses else "",
        f"{sweep.left_out} more combinations of the other settings are not drawn." if sweep.left_out else "",
    )))


def _line_in_words(band: Band, sweep: Sweep) -> str:
    known = [(place, value) for place, value in zip(band.places, band.median, strict=True)
             if not math.isnan(value)]  # fmt: skip
    if not known:
        return "no value"
    (first, start), (last, end) = known[0], known[-1]
    if first == last:
        return f"{number(start)} at {sweep.values[first]}"
    return f"{number(start)} at {sweep.values[first]} to {number(end)} at {sweep.values[last]}"
