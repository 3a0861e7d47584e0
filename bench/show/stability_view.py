"""What the report says of stability beside the verdicts: measures beside thresholds, failures, remedies.

``page`` shows it as tables and ``tables`` as Markdown; the words are made here once.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from bench.judge.headroom import Place
from bench.judge.location import KINDS, remedy_words
from bench.judge.rows import Row
from bench.judge.thresholds import MEASURES, SKIP_RATE, Evidence, Threshold
from bench.record.stability import Fidelity, FirstFailure, Remedy, Replay
from bench.show.columns import MISSING, number

HEALS = {True: "yes", False: "no", None: "could not be tried"}
"""`Remedy.heals` in words."""


@dataclass(frozen=True)
class Failure:
    """Where one run failed first, each part in words."""

    row: Row
    name: str
    what: tuple[str, ...]
    """Kind of failure, and the value beside the end of the dtype."""
    where: tuple[str, ...]
    """Module, tensor, device."""
    when: tuple[str, ...]
    """Step, micro-batch, phase."""
    before: tuple[str, ...]
    """How large the numbers were there before."""
    operation: tuple[str, ...]
    """What the replay found."""
    evidence: str


@dataclass(frozen=True)
class Change:
    """One remedy that was tried on the failing micro-batch."""

    change: str
    detail: str
    heals: bool | None
    heals_in_words: str
    loss: str
    gradient_norm: str
    abs_max_there: str
    error: str | None


# ---- measures ------------------------------------------------------------------------------------


def measures_of(rows: Sequence[Row]) -> tuple[Threshold, ...]:
    """The measures that any of ``rows`` gives, gravest first."""
    given = {item.measure for row in rows for item in row.verdict.evidence}
    return tuple(measure for measure in MEASURES if measure in given)


def measured(row: Row, measure: Threshold) -> Evidence | None:
    """What one run gives of a measure; None: nothing."""
    return next((item for item in row.verdict.evidence if item.measure == measure), None)


def value_in_words(item: Evidence) -> str:
    """The value of a measure."""
    return _in_words(item.value, item.measure)


def limit_in_words(item: Evidence) -> str:
    """The threshold that held for this run."""
    return _in_words(item.limit, item.measure)


def threshold_in_words(measure: Threshold) -> str:
    """The threshold, as far as it does not depend on the run."""
    return _in_words(measure.value, measure)


def _in_words(value: float | None, measure: Threshold) -> str:
    if value is not None and measure == SKIP_RATE:
        return f"{value:.0%}"
    # A count is no measured quantity: 3 and not 3.00.
    whole = value is not None and abs(value) < 1e7 and value == int(value)
    return f"{value:,.0f}" if whole else number(value)


def factor_in_words(value: float | None) -> str:
    """A factor in full: powers of two are told apart by their last digits."""
    if value is None or not math.isfinite(value):
        return number(value)
    return f"{value:,.0f}" if value == int(value) else f"{value:g}"


# ---- headroom and fidelity -----------------------------------------------------------------------


@dataclass(frozen=True)
class Lowest:
    """The lowest headroom of a run in words: the value, and beside it where that was."""

    value: str
    beside: tuple[str, ...]
    broken: bool
    """Something was not finite, in a step that the loss scaler did not skip."""


def lowest_headroom(row: Row) -> Lowest:
    """What was not finite comes first: it left no headroom at all."""
    found = row.headroom
    if found is None:
        return Lowest(MISSING, (), broken=False)
    finite = () if found.lowest is None else (f"{_place(found.lowest)}, {found.dtype}",)
    bits = number(row.lowest_headroom_bits)
    if not found.non_finite:
        return Lowest(bits, finite, broken=False)
    skipped = {step.index for step in row.record.steps if not step.applied}
    first = next((place for place in found.non_finite if place.step not in skipped), None)
    if first is None:
        spared = f"not finite where the scaler skipped the update: {_place(found.non_finite[0])}"
        return Lowest(bits, (*finite, spared), broken=False)
    rest = tuple(f"else {bits}: {place}" for place in finite)
    return Lowest("not finite", (f"first: {_place(first)}", *rest), broken=True)


def _place(place: Place) -> str:
    return f"{place.direction}, layer {place.layer}, step {place.step}"


def compared(rows: Sequence[Row]) -> tuple[tuple[Row, Fidelity], ...]:
    """The runs that were compared with a reference, or tell why they were not."""
    return tuple((row, row.record.fidelity) for row in rows if row.record.fidelity is not None)


def projections_of(rows: Sequence[Row]) -> tuple[str, ...]:
    """The kinds of projections whose weights were compared, in the order in which they first stand."""
    errors = (error for _, found in compared(rows) for error in found.weight_errors)
    return tuple(dict.fromkeys(error.projection for error in errors))


# ---- failures ------------------------------------------------------------------------------------


def failures_of(rows: Sequence[Row]) -> tuple[Failure, ...]:
    """The first failure of every run that had one."""
    return tuple(
        _failure(row, row.record.first_failure) for row in rows if row.record.first_failure is not None
    )


def _failure(row: Row, found: FirstFailure) -> Failure:
    value = None if found.value is None else f"value: {number(found.value)}"
    end = None if found.dtype_max is None else f"the dtype ends at {number(found.dtype_max, 5)}"
    batch = None if found.micro_batch is None else f"micro-batch {found.micro_batch}"
    spared = "the loss scaler skipped the update" if found.skipped_by_scaler else None
    scale = None if found.loss_scale is None else f"loss scale {found.loss_scale:g}"
    return Failure(
        row=row,
        name=row.name,
        what=_known(KINDS[found.kind], value, end, spared),
        where=_known(found.module, found.tensor, found.device),
        when=_known(f"step {found.step}", batch, found.phase, scale),
        before=_before(found),
        operation=_operation(row.record.replay),
        evidence=found.evidence,
    )


def _before(found: FirstFailure) -> tuple[str, ...]:
    last, growth = found.last_finite_abs_max, found.growth
    history = found.history_abs_max[-4:]
    return _known(
        None if last is None else f"largest value before: {number(last, 5)}",
        None if growth is None else f"grown by a factor of {number(growth)} since the first",
        f"last ones: {', '.join(number(value) for value in history)}" if len(history) > 1 else None,
    )


def _operation(replay: Replay | None) -> tuple[str, ...]:
    if replay is None:
        return ("not replayed",)
    if replay.error is not None:
        return (f"the replay failed: {replay.error}",)
    if not replay.reproduced:
        return ("not seen again in the replay",)
    inputs = replay.input_abs_max
    named = replay.module and replay.module in (replay.description or "")
    return _known(
        replay.operation or "seen again in the replay",
        replay.description,
        f"in {replay.module}" if replay.module and not named else None,
        None if inputs is None else f"from inputs of at most {number(inputs, 5)}",
    )


def changes_of(rows: Sequence[Row]) -> tuple[tuple[Row, tuple[Change, ...]], ...]:
    """What was tried on the failing micro-batch of every run that was replayed."""
    return tuple(
        (row, tuple(_change(remedy) for remedy in row.record.replay.remedies))
        for row in rows
        if row.record.replay is not None and row.record.replay.remedies
    )


def _change(remedy: Remedy) -> Change:
    return Change(
        remedy_words(remedy),
        remedy.detail,
        remedy.heals,
        HEALS[remedy.heals],
        number(remedy.loss, 4),
        number(remedy.gradient_norm),
        number(remedy.abs_max_there, 5),
        remedy.error,
    )


def _known(*parts: str | None) -> tuple[str, ...]:
    return tuple(part for part in parts if part) or (MISSING,)
