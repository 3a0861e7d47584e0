"""Dead adapters: what no gradient moves, found in the norms and probes of the steps or in the proof.

``find_dead(record)`` says whether a run's adapters are dead, for the verdict (``bench.judge.stability``) and
for the question that margin and triage ask (``bench.judge.finiteness``). A gradient counts as zero
where its norm is exactly zero and some of its values are: a norm that only underflowed in float32 has none.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from bench.record.schema import Record, Step

A, B = ".lora_A", ".lora_B"
STILL_STEPS = 2
"""Steps at the end with a gradient of exactly zero that make a run dead: one alone may be a batch that the
model predicts perfectly, which no training of some length shows twice."""
NAMED_TENSORS = 3
"""Dead tensors that are named; the rest is counted."""


@dataclass(frozen=True)
class Dead:
    """That adapters are dead, why in a plain sentence, and from which step on."""

    reason: str
    step: int


def find_dead(record: Record) -> Dead | None:
    """Whether the adapters of a run are dead: cut off, or left by every gradient.

    The proof tells of a run that ended by it; the rest needs a completed run, for one that ended early has
    shown too little.
    """
    told = unreached(record)
    if told:
        more = f" (and {len(told) - 1} more)" if len(told) > 1 else ""
        return Dead(f"gradients do not reach every adapter: {told[0]}{more}", 0)
    measured = [step for step in record.steps if not step.warmup]
    if record.status != "completed" or not measured:
        return None
    still = still_steps(record)
    if still:
        first = measured[-still].index
        where = f"in all {still} measured steps" if still == len(measured) else f"in the last {still} steps"
        return Dead(f"the gradient norm is exactly 0 {where}, from step {first} on", first)
    dead = dead_tensors(record)
    if not dead:
        return None
    more = f" and {len(dead) - NAMED_TENSORS} more" if len(dead) > NAMED_TENSORS else ""
    named = ", ".join(dead[:NAMED_TENSORS]) + more
    reason = f"the gradient of {len(dead)} LoRA tensor(s) is exactly 0 in every measured step: {named}"
    return Dead(reason, measured[0].index)


def still_steps(record: Record) -> int:
    """Measured steps at the end whose gradient norm is exactly zero, where they are all or enough to tell."""
    measured = [step for step in record.steps if not step.warmup]
    still = next((n for n, s in enumerate(reversed(measured)) if s.gradient_norm != 0), len(measured))
    return still if still >= STILL_STEPS or still == len(measured) else 0


def dead_tensors(record: Record) -> tuple[str, ...] | None:
    """Names of LoRA tensors that had a gradient of exactly zero in every measured step.

    Of an A only steps count in which its B had left zero: those after an update that was applied and in which
    B's gradient was not zero. None: the steps were not probed, so nothing is known tensor by tensor.
    """
    names = record.lora.names if record.lora else ()
    probed = [step for step in record.steps if step.probe is not None]
    if not names or not any(not step.warmup for step in probed):
        return None
    return tuple(_dead(names, probed))


def unreached(record: Record) -> tuple[str, ...]:
    """What the proof says of adapters that the first backward did not reach, one sentence each."""
    if record.proof.gradients_reach_adapters is not False:
        return ()
    told = tuple(breach for breach in record.proof.breaches if "gradient" in breach)
    return told or ("the first backward did not reach every adapter tensor",)


def _dead(names: Sequence[str], probed: Sequence[Step]) -> Iterator[str]:
    measured = [step for step in probed if not step.warmup]
    # Whatever other steps decide over a tensor, the last one does; nearly all have a gradient there.
    last = max(measured, key=lambda step: step.index)
    norms = last.probe.tensor_norms if last.probe else ()
    if 0 not in norms:
        return
    still = {place for place, norm in enumerate(norms) if norm == 0 and _is_zero(last, place)}
    place_of = {name: place for place, name in enumerate(names)}
    for name, place in place_of.items():
        if place not in still:
            continue
        deciding = measured
        if name.endswith(A):
            partner = place_of.get(name.removesuffix(A) + B)
            moved = None if partner is None else _first_moved(partner, probed)
            # B is still zero in the step that moves it.
            deciding = [step for step in deciding if moved is not None and step.index > moved]
        if deciding and all(_is_zero(step, place) for step in deciding):
            yield name


def _first_moved(place: int, probed: Sequence[Step]) -> int | None:
    """The first step whose applied update moved the tensor away from where it began."""
    moving = (step.index for step in probed if step.applied and _is_nonzero(step, place))
    return next(moving, None)


def _is_zero(step: Step, place: int) -> bool:
    norm, zeros = _at(step, place)
    return norm == 0 and zeros != 0


def _is_nonzero(step: Step, place: int) -> bool:
    norm, _ = _at(step, place)
    return norm is not None and norm != 0


def _at(step: Step, place: int) -> tuple[float | None, int | None]:
    """Norm and zeros of one tensor in one step; None where the probe does not tell."""
    probe = step.probe
    if probe is None or place >= len(probe.tensor_norms):
        return None, None
    zeros = probe.zero_values[place] if place < len(probe.zero_values) else None
    return probe.tensor_norms[place], zeros
