"""Figures that are counted from the tensors: the same every time, so that they need no interval."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from bench.judge.regression_findings import Finding, Result, Unit
from bench.judge.regression_limits import Limits
from bench.judge.regression_pairs import Match
from bench.judge.regression_runs import Run
from bench.judge.rows import median
from bench.record.memory import BytesByKind

KINDS = tuple(name for name in BytesByKind.model_fields if name not in ("device", "rank"))
OFF = "not judged: its limit is off"
HEALED = "it was not finite"


@dataclass(frozen=True)
class Exact:
    """One figure without scatter."""

    key: str
    """Of its limit."""
    title: str
    unit: Unit
    read: Callable[[Run], float | None]
    """None: not observed."""

    def of(self, runs: Sequence[Run]) -> tuple[float, ...]:
        """The values of the runs that have one."""
        return tuple(value for run in runs if (value := self.read(run)) is not None)


STORAGE = Exact(
    "storage_bits", "storage bits per weight", "bits", lambda run: run.row.storage_bits_per_weight
)
ERROR = Exact("weight_error", "error of the stored weights", "ratio", lambda run: run.weight_error)


def counted_findings(match: Match, limits: Limits) -> Iterator[Finding]:
    """A finding for each counted figure that BASE has; tensor bytes by kind where any of them changed."""
    yield from _finding(match, STORAGE, limits.storage_bits)
    yield from _finding(match, ERROR, limits.weight_error)
    by_kind = [found for kind in KINDS for found in _finding(match, _bytes_of(kind), limits.tensor_bytes)]
    if by_kind and all(found.result == "same" for found in by_kind):
        every = Exact("tensor_bytes", "tensor bytes", "bytes", _all_bytes)
        yield from _finding(match, every, limits.tensor_bytes)
    else:
        yield from by_kind


def _bytes_of(kind: str) -> Exact:
    title = f"tensor bytes, {kind.replace('_', ' ')}"
    return Exact("tensor_bytes", title, "bytes", lambda run: run.row.tensor_bytes[kind])


def _all_bytes(run: Run) -> float:
    return sum(value for value in run.row.tensor_bytes.values() if value is not None)


def _finding(match: Match, what: Exact, limit: float | None) -> Iterator[Finding]:
    base, new = what.of(match.base), what.of(match.new)
    if not base:
        return
    old, now = median(base), median(new)
    if old is None or now is None:
        yield unrecorded(match.label, what, base)
        return
    factor = quotient(now, old)
    healed = not math.isfinite(old) and math.isfinite(now)
    result: Result = "better" if healed else called(factor, limit)
    yield Finding(
        match.label, what.key, what.title, result, what.unit, base, new, factor=factor, limit=limit,
        beyond=result == "worse", note=HEALED if healed else OFF if limit is None else "",
    )  # fmt: skip


def unrecorded(label: str, what: Exact, base: tuple[float, ...], new: tuple[float, ...] = ()) -> Finding:
    """The finding on a figure that NEW does not have, or not of the same data, adapters and weights."""
    note = "no runs on equal data, adapters and weights" if new else "BASE recorded it and NEW did not"
    return Finding(label, what.key, what.title, "untold", what.unit, base, new, note=note)


def quotient(now: float, old: float) -> float:
    """NEW over BASE; of nothing to nothing 1, and of something to nothing infinite."""
    if now == old or (math.isnan(now) and math.isnan(old)):
        return 1.0
    if old == 0:
        return math.inf if now > 0 else math.nan
    return now / old


def called(factor: float, limit: float | None, *, either: bool = False) -> Result:
    """What a factor is to be called; ``either``: a change in either direction is one for the worse."""
    if factor == 1:
        return "same"
    if limit is None:
        return "changed"
    # What became NaN is beyond every limit.
    if not factor <= limit or (either and factor < 1 / limit):
        return "worse"
    return "better" if factor < 1 / limit else "changed"
