"""Figures that are the same every time and need no interval.

Bits and bytes are counted from the tensors. What is computed from the same data, adapters and weights changes
only where the program does, so it is compared run by run (`_twins`), and any change of it is told.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.judge.regression_findings import Finding, Result, Unit
from bench.judge.regression_limits import Limits
from bench.judge.regression_pairs import Match
from bench.judge.regression_runs import Run
from bench.judge.rows import median
from bench.record.schema import BytesByKind

KINDS = tuple(name for name in BytesByKind.model_fields if name not in ("device", "rank"))
BIT_EQUAL = "equal to the bit"
OFF = "not judged: its limit is off"
OWN_SCATTER = "BASE's own runs on equal data are not equal to the bit either"
NUMERIC_CHANGE = "a numeric change: data, adapters and unquantized weights are equal to the bit, this is not"


def exact_findings(match: Match, limits: Limits) -> Iterator[Finding]:
    """A finding for each counted or computed figure that BASE has."""
    for counted in _counted():
        yield from _factor(match, counted, getattr(limits, counted.key))
    yield from _first_loss(match, limits.first_loss)
    for title, key, unit, read in (
        ("gradient cosine to the reference", "gradient_cosine_drop", "ratio", _cosine),
        ("lowest headroom", "headroom_drop_bits", "bits", _headroom),
    ):
        yield from _difference(match, _Compared(key, title, unit, read), getattr(limits, key))


@dataclass(frozen=True)
class _Compared:
    key: str
    title: str
    unit: Unit
    read: Callable[[Run], float | None]


def _cosine(run: Run) -> float | None:
    return run.row.gradient_cosine


def _storage_bits(run: Run) -> float | None:
    return run.row.storage_bits_per_weight


def _headroom(run: Run) -> float | None:
    return run.row.lowest_headroom_bits


def _counted() -> Iterator[_Compared]:
    yield _Compared("storage_bits", "storage bits per weight", "bits", _storage_bits)
    for kind in KINDS:
        words = f"tensor bytes, {kind.replace('_', ' ')}"
        yield _Compared("tensor_bytes", words, "bytes", _bytes_of(kind))
    yield _Compared("weight_error", "error of the stored weights", "ratio", lambda run: run.weight_error)


def _bytes_of(kind: str) -> Callable[[Run], float | None]:
    return lambda run: run.row.tensor_bytes[kind]


# ---- NEW over BASE -------------------------------------------------------------------------------


def _factor(match: Match, what: _Compared, limit: float | None) -> Iterator[Finding]:
    base, new = _known(match.base, what), _known(match.new, what)
    if not base:
        return
    old, now = median(base), median(new)
    if old is None or now is None:
        yield _unrecorded(match, what, base)
        return
    factor = _quotient(now, old)
    result, note = _called(factor, limit, either=False)
    yield Finding(
        match.label, what.key, what.title, result, what.unit, base, new, factor=factor, limit=limit,
        beyond=result == "worse", note=note,
    )  # fmt: skip


def _quotient(now: float, old: float) -> float:
    """NEW over BASE; of nothing to nothing 1, and of something to nothing infinite."""
    if now == old or (math.isnan(now) and math.isnan(old)):
        return 1.0
    if old == 0:
        return math.inf if now > 0 else math.nan
    return now / old


def _called(factor: float, limit: float | None, *, either: bool) -> tuple[Result, str]:
    """``either``: a change in either direction is one for the worse."""
    if factor == 1:
        return "same", ""
    if limit is None:
        return "changed", OFF
    # What became NaN is beyond every limit.
    if not factor <= limit or (either and factor < 1 / limit):
        return "worse", ""
    return ("better" if factor < 1 / limit else "changed"), ""


# ---- NEW less BASE -------------------------------------------------------------------------------


def _difference(match: Match, what: _Compared, limit: float | None) -> Iterator[Finding]:
    """Of figures that may fall by so much; the worst of the runs on the same data stands for all."""
    base, new = _known(match.base, what), _known(match.new, what)
    if not base:
        return
    twins = list(_twins(match, what.read))
    if not twins:
        yield _unrecorded(match, what, base)
        return
    worst = min(twins, key=lambda twin: _order(twin.new - twin.base))
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


def _order(change: float) -> float:
    """A change that is no number comes first: it is the worst."""
    return -math.inf if math.isnan(change) else change


# ---- the first loss ------------------------------------------------------------------------------


def _first_loss(match: Match, limit: float | None) -> Iterator[Finding]:
    what = _Compared("first_loss", "first loss", "nats", lambda run: run.row.first_loss)
    twins = list(_twins(match, what.read))
    if not twins:
        return
    worst = max(twins, key=lambda twin: _distance(_quotient(twin.new, twin.base)))
    factor = _quotient(worst.new, worst.base)
    result: Result
    if worst.equal:
        result, note = "same", BIT_EQUAL
    elif worst.healed:
        result, note = "better", "it was not finite"
    else:
        called, off = _called(factor, limit, either=True)
        # Equal medians of unequal runs are a change too.
        result = "changed" if called == "same" else called
        note = "; ".join(part for part in (worst.own_scatter or NUMERIC_CHANGE, off) if part)
    yield Finding(
        match.label, what.key, what.title, result, what.unit,
        _known(match.base, what), _known(match.new, what),
        factor=factor, limit=limit, beyond=result == "worse", note=note,
    )  # fmt: skip


def _distance(factor: float) -> float:
    """How far from 1, on a logarithm; what has none is farthest."""
    return abs(math.log(factor)) if factor > 0 and math.isfinite(factor) else math.inf


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


def _known(runs: Sequence[Run], what: _Compared) -> tuple[float, ...]:
    return tuple(value for run in runs if (value := what.read(run)) is not None)


def _unrecorded(match: Match, what: _Compared, base: tuple[float, ...]) -> Finding:
    note = "BASE recorded it and NEW did not"
    return Finding(match.label, what.key, what.title, "untold", what.unit, base, note=note)


