"""The evidence for a verdict: every measure of a run beside its threshold, whether it is exceeded or not.

``gather(record, course)`` gives what the page shows next to the verdict. A measure that the run cannot give
(no probe, no float16 scaler, too few steps) is left out, or stands there without a value and with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from bench.judge.course import Course
from bench.judge.dead import dead_tensors, still_steps, unreached
from bench.judge.depth import Growth
from bench.judge.scaler import failing_steps, has_scaler, skipped_share, skips_at_the_end
from bench.judge.step_spikes import YARDSTICK_STEPS
from bench.judge.thresholds import (
    ACTIVATION_GROWTH,
    DEAD_TENSORS,
    FROZEN_NOT_FINITE,
    GRADIENT_GROWTH,
    LOSS_RISE,
    NORM_RATIO,
    NOT_FINITE,
    NOT_FINITE_INSIDE,
    ROBUST_Z,
    SKIP_RATE,
    SKIPS_AT_THE_END,
    WEIGHTS_NOT_FINITE,
    Evidence,
    held_against,
)
from bench.record.schema import Record, Step


def gather(record: Record, course: Course) -> tuple[Evidence, ...]:
    """Every measure that ``record`` and its course give, in the order of gravity."""
    return tuple(_all(record, course))


def _all(record: Record, course: Course) -> Iterator[Evidence]:
    finite = record.trainable_weights_finite
    if finite is not None:
        yield held_against(WEIGHTS_NOT_FINITE, int(not finite))
    if record.steps:
        failing = len(failing_steps(record.steps))
        yield held_against(NOT_FINITE, failing, f"of {len(record.steps)}")
        if has_scaler(record.steps):
            yield _skips(record.steps)
            yield held_against(SKIPS_AT_THE_END, skips_at_the_end(record.steps))
        yield from _inside(record)
    yield from _dead(record)
    yield from _spike(course)
    for growth in course.growths:
        yield _growth(growth)


def _skips(steps: Sequence[Step]) -> Evidence:
    share = skipped_share(steps)
    measured = [step for step in steps if not step.warmup]
    skipped = sum(not step.applied for step in measured)
    note = f"{skipped} of {len(measured)} steps" if measured else "no measured step"
    return held_against(SKIP_RATE, share, note)


def _inside(record: Record) -> Iterator[Evidence]:
    if any(step.probe is not None for step in record.steps):
        failure = record.first_failure
        spared = failure is None or failure.value is None or failure.skipped_by_scaler
        note = "" if failure is None or spared else f"step {failure.step}"
        yield held_against(NOT_FINITE_INSIDE, int(not spared), note)
    if record.proof.weights_finite is not None:
        broken = 0 if record.proof.weights_finite else max(1, len(record.proof.non_finite_weights))
        yield held_against(FROZEN_NOT_FINITE, broken)


def _dead(record: Record) -> Iterator[Evidence]:
    told = unreached(record)
    if told:
        yield held_against(DEAD_TENSORS, len(told), "by the proof after the first backward")
        return
    still = still_steps(record)
    if record.lora and still:
        yield held_against(
            DEAD_TENSORS, record.lora.tensors, f"the norm over all of them is 0 in {still} steps"
        )
        return
    dead = dead_tensors(record)
    if dead is not None:
        total = len(record.lora.names) if record.lora else 0
        yield held_against(DEAD_TENSORS, len(dead), f"of {total}")


def _spike(course: Course) -> Iterator[Evidence]:
    spike, rise = course.spike, course.rise
    if spike is not None:
        yield _only_if(spike.exceeds, held_against(NORM_RATIO, spike.ratio, f"step {spike.step}"))
        few = f"fewer than {YARDSTICK_STEPS} other steps"
        note = f"step {spike.step}" if spike.robust_z is not None else few
        yield _only_if(spike.exceeds, held_against(ROBUST_Z, spike.robust_z, note))
    if rise is not None:
        yield held_against(LOSS_RISE, rise.rise, f"step {rise.step}", limit=rise.allowed)


def _only_if(exceeded: bool, evidence: Evidence) -> Evidence:
    """A measure that counts only together with another is not marked by itself."""
    return replace(evidence, exceeded=exceeded)


def _growth(growth: Growth) -> Evidence:
    measure = ACTIVATION_GROWTH if growth.direction == "forward" else GRADIENT_GROWTH
    note = f"step {growth.step}"
    if growth.exponent > growth.limit and not growth.exceeds:
        note += "; within the range of the dtype"
    evidence = held_against(measure, growth.exponent, note, limit=growth.limit)
    return _only_if(growth.exceeds, evidence)
