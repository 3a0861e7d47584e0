"""Where a run first held something that is not finite, in plain words.

``first_failure(record)`` is the clause that the verdict's reason ends with: what kind of failure, where, the
evidence, the operation that the replay found, and what healed it.
"""

from __future__ import annotations

from collections.abc import Mapping

from bench.record.schema import Record
from bench.record.stability import FailureKind, FirstFailure, Remedy, Replay

KINDS: Mapping[FailureKind, str] = {
    "forward_overflow": "overflow in the forward",
    "forward_invalid": "invalid operation in the forward",
    "backward_overflow": "overflow in the backward",
    "backward_invalid": "invalid operation in the backward",
    "broken_weights": "broken frozen weights",
    "bad_batch": "a batch that cannot be trained on",
    "poisoned_weights": "trained weights that were not finite before the step",
    "optimizer_step": "an update that left weights not finite",
}
"""Kind of failure -> what it is called in sentences."""

CHANGES: Mapping[str, str] = {
    "float32_adapters": "adapters in float32",
    "attention": "another attention kernel",
    "bfloat16": "bfloat16",
    "float32": "float32",
}
"""What a remedy changes -> what it is called in sentences."""


def first_failure(record: Record) -> str:
    """The first failure and its replay in one clause; empty where the record has none."""
    failure = record.first_failure
    if failure is None:
        return ""
    parts = [f"first failure: {failure_words(failure)}"]
    if record.replay is not None:
        parts.append(replay_words(record.replay, told=failure.evidence))
    return "; ".join(part for part in parts if part)


def failure_words(failure: FirstFailure) -> str:
    """Kind, place and evidence. The place is spelt out as far as the evidence does not name it itself."""
    where = [f"step {failure.step}", f"the {failure.phase}"]
    if failure.micro_batch is not None:
        where.append(f"micro-batch {failure.micro_batch}")
    if failure.module is not None:
        where.append(failure.module)
    unsaid = [part for part in where if part not in failure.evidence]
    place = f" ({', '.join(unsaid)})" if unsaid else ""
    return f"{KINDS[failure.kind]}{place}: {failure.evidence.rstrip('.')}"


def replay_words(replay: Replay, told: str = "") -> str:
    """The operation that the replay found, and which changes healed the micro-batch and which did not.

    ``told``: what stands before it; an operation that is named there is not named again.
    """
    parts = []
    if replay.error is not None:
        parts.append(f"the replay failed ({replay.error})")
    elif not replay.reproduced:
        parts.append("a replay of the micro-batch did not show it again")
    elif replay.operation is not None and (replay.description or replay.operation) not in told:
        parts.append(f"in the replay it arose in {operation_words(replay)}")
    for heals, text in ((True, "healed by"), (False, "not healed by")):
        names = [remedy_words(remedy) for remedy in replay.remedies if remedy.heals is heals]
        if names:
            parts.append(f"{text} {', '.join(names)}")
    return "; ".join(parts)


def operation_words(replay: Replay) -> str:
    """The operation, its module as far as the description does not name it, and how large its inputs were."""
    what = replay.operation or "an operation"
    if replay.description:
        what += f" ({replay.description})"
    if replay.module and replay.module not in what:
        what += f" in {replay.module}"
    known = replay.input_abs_max
    return what if known is None else f"{what}, from inputs of at most {known:.5g}"


def remedy_words(remedy: Remedy) -> str:
    """What was changed."""
    return CHANGES.get(remedy.change, remedy.change)
