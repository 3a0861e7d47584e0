"""The triage's decisions: what a run showed, what heals, which change is the smallest, and what follows.

Nothing here runs anything. A change heals where the run with it trained with finite numbers
(``bench.judge.finiteness``) and the run as asked did not.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import get_args

from bench.judge.finiteness import judge_finiteness
from bench.judge.location import first_failure
from bench.judge.rows import step_loss
from bench.judge.stability import judge_stability
from bench.record.schema import Record
from bench.record.triage import Confirmation, Evidence, Rung, RungKind

ORDER: tuple[RungKind, ...] = get_args(RungKind)
ORDER_IN_WORDS = (
    "smallest first: a setting that leaves the training the same (attention kernel, checkpointing, padding) "
    "< a precision (compute dtype, adapters, double quantization) "
    "< how it learns (learning rate, clipping) < another backend"
)
SYNTHETIC = "the weights are synthetic: what overflows is real arithmetic, and says nothing of a real model"


def evidence(record: Record) -> Evidence:
    """What one run showed, in the terms of the ladder."""
    judged = judge_finiteness(record)
    losses = [step_loss(step) for step in record.steps if step.losses]
    return Evidence(
        key=record.key,
        outcome=record.status,
        verdict=judge_stability(record).verdict,
        finite=judged.finite,
        reason=judged.reason,
        steps=len(record.steps),
        failing_step=judged.step,
        failing_module=judged.module,
        first_loss=losses[0] if losses else None,
        last_loss=losses[-1] if losses else None,
    )


def smallest_first(rungs: Sequence[Rung]) -> list[Rung]:
    """Those that heal, the smallest change first: by kind (``ORDER_IN_WORDS``), within a kind as tried."""
    return sorted((rung for rung in rungs if rung.heals), key=lambda rung: ORDER.index(rung.kind))


def cause(record: Record) -> str | None:
    """What failed first, where, and what the replay found; None: the record does not tell."""
    return first_failure(record).removeprefix("first failure: ") or None


def conclude(
    base: Evidence, rungs: Sequence[Rung], chosen: Rung | None, confirmations: Sequence[Confirmation]
) -> str:
    """The result of a triage in one sentence."""
    if base.finite is None:
        return f"nothing can be said: {base.reason}"
    if base.finite:
        return f"nothing failed: {base.reason}"
    if chosen is None:
        healing = ", ".join(rung.change for rung in smallest_first(rungs))
        tried = sum(rung.applicable for rung in rungs)
        if not healing:
            return f"no single change healed it, of {tried} that were tried"
        return f"no single change healed every seed (the first seed was healed by: {healing})"
    own = [seed for seed in confirmations if seed.rung == chosen.name]
    failing = sum(seed.fails_unhealed for seed in own)
    without = f"{failing} of {len(own)} seeds fail as asked, and all {len(own)} are finite with it"
    return f"the smallest change that heals it: {chosen.change} ({without})"
