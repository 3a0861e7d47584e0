"""Figures that are computed from data, adapters and weights: where these are equal to the bit and the figure
is not, the program computes something else.

They are compared run by run (`_twins`), every change is told, and one beyond its limit is a regression.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.judge.regression_counted import HEALED, OFF, Exact, called, quotient, unrecorded
from bench.judge.regression_findings import Finding, Result
from bench.judge.regression_limits import Limits
from bench.judge.regression_pairs import Match
from bench.judge.regression_runs import Run
from bench.judge.rows import median

BIT_EQUAL = "equal to the bit"
OWN_SCATTER = "BASE's own runs on equal data are not equal to the bit either"
NUMERIC_CHANGE = "a numeric change: data, adapters and unquantized weights are equal to the bit, this is not"

FIRST_LOSS = Exact("first_loss", "first loss", "nats", lambda run: run.row.first_loss)
COSINE = Exact(
    "gradient_cosine_drop", "gradient cosine to the reference", "ratio", lambda run: run.row.gradient_cosine
)
HEADROOM = Exact("headroom_drop_bits", "lowest headroom", "bits", lambda run: run.row.lowest_headroom_bits)


def computed_findings(match: Match, limits: Limits) -> Iterator[Finding]:
    """A finding for each computed figure that BASE has."""
    yield from _first_loss(match, limits.first_loss)
    yield from _fallen(match, COSINE, limits.gradient_cosine_drop)
    yield from _fallen(match, HEADROOM, limits.headroom_drop_bits)


def _first_loss(match: Match, limit: float | None) -> Iterator[Finding]:
    """The farthest of the runs stands for all; a change in either direction is one for the worse."""
    twins = list(_twins(match, FIRST_LOSS.read))
    if not twins:
        return
    worst = min(twins, key=lambda twin: (twin.harmless, -_distance(quotient(twin.new, twin.base))))
    factor = quotient(worst.new, worst.base)
    result: Result
    if worst.equal:
        result, note = "same", BIT_EQUAL
    elif worst.healed:
        result, note = "better", HEALED
    else:
        # Equal medians of unequal runs are a change too.
        result = "changed" if factor == 1 else called(factor, limit, either=True)
        note = worst.own_scatter or NUMERIC_CHANGE
        note += f"; {OFF}" if limit is None else ""
    yield Finding(
        match.label, FIRST_LOSS.key, FIRST_LOSS.title, result, FIRST_LOSS.unit,
        FIRST_LOSS.of(match.base), FIRST_LOSS.of(match.new),
        factor=factor, limit=limit, beyond=result == "worse", note=note,
    )  # fmt: skip


def _distance(factor: float) -> float:
    """How far from 1, on a logarithm; what has none is farthest."""
    return abs(math.log(factor)) if factor > 0 and math.isfinite(factor) else math.inf


def _fallen(match: Match, what: Exact, limit: float | None) -> Iterator[Finding]:
    """Of figures that may fall by so much; the run that fell most stands for all."""
    base, new = what.of(match.base), what.of(match.new)
    if not base:
        return
    twins = list(_twins(match, what.read))
    if not twins:
        yield unrecorded(match.label, what, base, new)
        return
    worst = min(twins, key=lambda twin: (twin.harmless, _rise(twin)))
    change = worst.new - worst.base
    result: Result
    if worst.equal:
        result, note = "same", BIT_EQUAL
    elif limit is None:
        result, note = "changed", OFF
    else:
        fell = not math.isfinite(worst.new) or not change >= -limit
        result = "better" if worst.healed or change > limit else "worse" if fell else "changed"
        note = worst.own_scatter
    yield Finding(
        match.label, what.key, what.title, result, what.unit, base, new, difference=change,
        limit=None if limit is None else -limit, beyond=result == "worse", note=note,
    )  # fmt: skip


def _rise(twin: _Twin) -> float:
    """NEW less BASE; a change that is no number is the worst."""
    change = twin.new - twin.base
    return -math.inf if math.isnan(change) else change


# ---- runs on the same data -----------------------------------------------------------------------


@dataclass(frozen=True)
class _Twin:
    """A figure of runs of either side whose data, adapters and unquantized weights are equal to the bit."""

    base: float
    """The median where several runs share all three."""
    new: float
    equal: bool
    """Whether the same values stand on both sides, to the bit."""
    own_scatter: str
    """What is to be said where BASE's own runs are not equal; else empty."""

    @property
    def healed(self) -> bool:
        """Whether it was not finite and is now."""
        return not math.isfinite(self.base) and math.isfinite(self.new)

    @property
    def harmless(self) -> int:
        """Whether nothing bad can be in it, as a rank: what healed, and last what is equal, must not stand
        before a change for the worse."""
        return 2 if self.equal else 1 if self.healed else 0


def _twins(match: Match, read: Callable[[Run], float | None]) -> Iterator[_Twin]:
    base, new = _by_digests(match.base, read), _by_digests(match.new, read)
    for digests, values in base.items():
        others = new.get(digests, [])
        old, now = median(values), median(others)
        if old is not None and now is not None:
            # In words, for a NaN equals no NaN.
            here, there = {repr(value) for value in values}, {repr(value) for value in others}
            yield _Twin(old, now, here == there, OWN_SCATTER if len(here) > 1 else "")


def _by_digests(
    runs: Sequence[Run], read: Callable[[Run], float | None]
) -> dict[tuple[str, ...], list[float]]:
    found: dict[tuple[str, ...], list[float]] = {}
    for run in runs:
        record, value = run.record, read(run)
        if value is None or record.workload is None or record.lora is None or record.load is None:
            continue
        if record.workload.digest is not None:
            digests = record.workload.digest, record.lora.initial_digest, record.load.weights_digest
            found.setdefault(digests, []).append(value)
    return found
