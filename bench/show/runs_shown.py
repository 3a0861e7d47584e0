"""Which runs are shown one by one, and which only narrow down a margin."""

from __future__ import annotations

from bench.judge.comparison import Comparison
from bench.judge.margin import Margin, find_margins
from bench.judge.rows import Row
from bench.judge.stability import MEASURED_STEPS_NEEDED


def margins_of(comparison: Comparison) -> tuple[Margin, ...]:
    """The margins that the records of a comparison hold."""
    return find_margins([row.record for row in comparison.rows])


def runs_shown(comparison: Comparison) -> tuple[Row, ...]:
    """The runs that figures and tables of single runs show: all but those that only narrow down a margin.

    A bisection has a run for every factor that it tried; one by one, they would hide the backends. Two
    factors of one pattern are no bisection yet. Its control, without any factor, is shown where it is long
    enough for a verdict, or where there is nothing else.
    """
    tried = [probe for margin in margins_of(comparison) if len(margin.probes) > 2 for probe in margin.probes]
    narrowing = {probe.key for probe in tried if probe.factor != 1}
    controls = {probe.key for probe in tried if probe.factor == 1}
    alone = tuple(row for row in comparison.rows if row.record.key not in narrowing)
    telling = tuple(
        row for row in alone if row.record.key not in controls or row.measured_steps >= MEASURED_STEPS_NEEDED
    )
    return telling or alone or comparison.rows
