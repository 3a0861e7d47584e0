"""What is planted, run by run: each function runs one session and yields what became of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from statistics import median

from bench.judge.rows import make_rows
from tests.truth import memory, verdicts
from tests.truth.adapters import MIB, TWINS
from tests.truth.session import Session
from tests.truth.verdicts import Finding

DELAY = 0.05
"""Of the step."""
DELAY_STEPS = 100
"""A shared machine is slower for seconds at a time, by more than what is planted: a process must outlast that."""
DELAY_REPEATS, DELAY_REPEATS_AT_MOST = 16, 64
"""So many at a time, until the interval reaches no further than this to either side, or there are so many."""
DELAY_REACH = 0.016
"""With it, 5 % is told from the margin of 1 % in 99 of 100 sessions. Pairs scattered by 6.6 % around the ratio (two
cores of a Xeon), of which 16 leave 3.5 %: half of such sessions would tell nothing (tests/test_truth.py)."""
HELD_MIB = 64
MEMORY_REPEATS, MEMORY_REPEATS_AT_MOST = 10, 40
"""Processes that do the same differ in resident memory: an interval needs some of them. So many at a time, until no
interval reaches further than this to either side, or there are so many."""
MEMORY_REACH = HELD_MIB * MIB / 8
"""Half of what an answer may be off (`memory.NARROW`): chance then has the other half. Pairs scattered by 4 to 10 MiB
(two cores of a Xeon): with 10 of them one session in three would be wrong, so in one in 70 (tests/test_truth.py)."""
HELD = {"planted-holds-load": "loaded", "planted-holds-forward": "forward",
        "planted-holds-backward": "backward", "planted-holds-optimizer": "optimizer_step"}  # fmt: skip
LEAK_MIB = 2
PLAIN = TWINS[0]


@dataclass(frozen=True)
class Amount:
    """How much of it: the same adapter twice costs the most by far."""

    comparisons: int = 20
    repeats: int = 5
    """Of each comparison."""


def the_same_twice(session: Session, amount: Amount) -> Iterator[Finding]:
    records = session.run("twice", TWINS, repeats=amount.comparisons * amount.repeats)
    yield from verdicts.judge_ties(records, TWINS, amount.repeats)


def delay(session: Session, amount: Amount) -> Iterator[Finding]:
    """Calibrated by two runs; what was planted is then taken as a share of the step beside it."""
    steps = f"workload.steps={DELAY_STEPS}"
    before = make_rows(session.run("before-delay", [PLAIN], repeats=2, settings=[steps]))
    step = median(row.step_seconds_median or 0.0 for row in before)
    layers = before[0].record.quantization.layers if before[0].record.quantization else 0
    seconds = DELAY * step / layers
    settings = [steps, f"planted-delay.delay_seconds={seconds:.9f}"]
    for repeats in range(DELAY_REPEATS, DELAY_REPEATS_AT_MOST + 1, DELAY_REPEATS):
        records = session.run("delay", [PLAIN, "planted-delay"], repeats=repeats, settings=settings)
        # By its width alone, and not by where it lies: nothing is picked (Chow and Robbins 1965).
        if verdicts.reach(records, PLAIN, "planted-delay") <= DELAY_REACH:
            break
    yield verdicts.judge_delay(records, PLAIN, "planted-delay", seconds * layers)


def held(session: Session, amount: Amount) -> Iterator[Finding]:
    settings = [f"{name}.mebibytes={HELD_MIB}" for name in HELD]
    for repeats in range(MEMORY_REPEATS, MEMORY_REPEATS_AT_MOST + 1, MEMORY_REPEATS):
        records = session.run("held", [PLAIN, *HELD], repeats=repeats, settings=settings)
        # By their width alone, as in `delay`.
        if memory.widest_reach(records, PLAIN, HELD) <= MEMORY_REACH:
            break
    for name, phase in HELD.items():
        yield memory.judge_held(records, PLAIN, name, phase, HELD_MIB * MIB)


def leak(session: Session, amount: Amount) -> Iterator[Finding]:
    records = session.run("leak", [PLAIN, "planted-leaks"], settings=[f"planted-leaks.mebibytes={LEAK_MIB}"])
    yield verdicts.judge_leak(records, PLAIN, "planted-leaks", LEAK_MIB * MIB)


def refused(session: Session, amount: Amount) -> Iterator[Finding]:
    """What is proven to be another training than it says, and refused."""
    changed = ("planted-other-data-behind-the-reader", "planted-other-ids-in-the-model")
    liars = ("bad-secretly-dense", "planted-skips-layers", "planted-trains-the-base", "bad-cuts-the-graph",
             *changed)  # fmt: skip
    records = session.run("refused", liars)
    yield verdicts.judge_refused(
        records, "bad-secretly-dense", "16 bits per weight under the name of 4.5", "quantized",
        "holds 16.000 bits per weight, the arithmetic says 4.500",
    )  # fmt: skip
    yield verdicts.judge_refused(
        records, "planted-skips-layers", "every second layer left unquantized", "quantized",
        "holds 16.000 bits per weight",
    )  # fmt: skip
    yield verdicts.judge_refused(
        records, "planted-trains-the-base", "the norms' weights are trained too", "base_frozen",
        "norm.weight is not frozen",
    )  # fmt: skip
    yield verdicts.judge_refused(
        records, "bad-cuts-the-graph", "no gradient passes a layer", "gradients_reach_adapters", "gradient",
    )  # fmt: skip
    for name in changed:
        yield verdicts.judge_refused(
            records, name, "other ids than those of the digest", "data_consumed", "not those of the digest"
        )


def hidden_weights(session: Session, amount: Amount) -> Iterator[Finding]:
    records = session.run("hidden", [PLAIN, "planted-hidden-dense-copy"], repeats=MEMORY_REPEATS)
    yield memory.judge_hidden_weights(records, PLAIN, "planted-hidden-dense-copy")


def other_data(session: Session, amount: Amount) -> Iterator[Finding]:
    records = session.run("other-data", [*TWINS, "planted-other-data"])
    yield verdicts.judge_split(
        records, "planted-other-data", "trains on other conversations",
        "token ids, labels and masks (digest)", session.report("other-data"),
    )  # fmt: skip


def other_adapters(session: Session, amount: Amount) -> Iterator[Finding]:
    records = session.run("other-adapters", [*TWINS, "planted-other-adapters"])
    yield verdicts.judge_split(
        records, "planted-other-adapters", "LoRA drawn from another seed",
        "initial LoRA values (digest)", session.report("other-adapters"),
    )  # fmt: skip


PLANTS: dict[str, Callable[[Session, Amount], Iterator[Finding]]] = {
    "other-data": other_data,
    "other-adapters": other_adapters,
    "refused": refused,
    "hidden-weights": hidden_weights,
    "leak": leak,
    "held": held,
    "delay": delay,
    "twice": the_same_twice,
}
"""Name -> what runs it, the quick ones first."""
