"""The course of a run: how its loss, its gradient norm and its largest numbers went, looked at once.

``follow(record)`` is for both the verdict (``bench.judge.stability``) and the evidence beside it
(``bench.judge.evidence``).
"""

from __future__ import annotations

from dataclasses import dataclass

from bench.judge.depth import Growth, find_growth
from bench.judge.step_spikes import LossRise, NormSpike, loss_rise, norm_spike
from bench.record.schema import Record


@dataclass(frozen=True)
class Course:
    """The worst of each; None or nothing where too few steps were recorded, or were not probed."""

    rise: LossRise | None
    spike: NormSpike | None
    growths: tuple[Growth, ...]


def follow(record: Record) -> Course:
    """What the steps of ``record`` went through."""
    return Course(loss_rise(record.steps), norm_spike(record.steps), find_growth(record))
