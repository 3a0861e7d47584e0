"""Doubts about the circumstances: each is told with what to do, and ordinary sessions are silent."""

from __future__ import annotations

import math
import random
from typing import Any

import pytest

from bench.judge.comparison import compare
from bench.judge.session_doubts import BUSY_SHARE
from bench.record.memory import Memory
from bench.record.schema import Record
from bench.record.surroundings import CardDuringSteps, Surroundings
from tests.record_factory import FIGURES, record, step, steps


def session(repeats: int, drift: float = 0.0, noise: float = 0.005, backends: int = 8, seed: int = 0) -> list[Record]:
    """Every repeat is slower than the one before by ``drift``, and every run has its own noise."""
    rng = random.Random(seed)
    made = []
    for repeat in range(repeats):
        for backend in list(FIGURES)[:backends]:
            factor = (1 + drift) ** repeat * math.exp(rng.gauss(0, noise))
            timed = [s.model_copy(update={"seconds": s.seconds * factor}) for s in steps(backend)]
            made.append(record(backend, repeat=repeat, steps=tuple(timed)))
    return made


def told(records: list[Record], words: str) -> list[str]:
    return [warning for warning in compare(records).warnings if words in warning]


def around(**values: Any) -> Surroundings:
    return Surroundings(**({"seconds": 2.0, "machine_cores": 4} | values))


def test_a_machine_that_drifts_is_told_once_with_how_far() -> None:
    (warning,) = told(session(4, drift=0.02), "drifted")
    assert "slower for 8 backends alike" in warning
    assert "steps became 6" in warning
    assert "--force" in warning
    (faster,) = told(session(4, drift=-0.02), "drifted")
    assert "faster for 8 backends" in faster


def test_no_drift_is_seen_in_noise() -> None:
    alarms = sum(bool(told(session(3, noise=0.02, seed=seed), "drifted")) for seed in range(25))
    assert alarms <= 1


@pytest.mark.parametrize("records", [session(1, drift=0.5), session(4, drift=0.2, backends=2)])
def test_one_repeat_or_two_backends_say_nothing_of_the_machine(records: list[Record]) -> None:
    assert not told(records, "drifted")


def test_one_backend_that_becomes_slower_is_no_drift_of_the_machine() -> None:
    records = session(3)
    slow = [
        one.model_copy(update={"steps": tuple(s.model_copy(update={"seconds": 9.0}) for s in one.steps)})
        if one.request.backend == "hqq" and one.request.repeat == 2
        else one
        for one in records
    ]
    assert not told(slow, "drifted")


def at(made: Record, minute: int) -> Record:
    return made.model_copy(update={"started_at": f"2026-10-01T12:{minute:02d}:00+00:00"})


def test_repeats_that_did_not_take_turns_with_the_baseline_are_told() -> None:
    def began(hqq: tuple[int, int]) -> list[Record]:
        bf16 = [at(record("bf16", repeat=k), minute) for k, minute in enumerate((0, 10))]
        return [*bf16, *(at(record("hqq", repeat=k), minute) for k, minute in enumerate(hqq))]

    (warning,) = told(began((20, 30)), "not in turns")
    assert warning.startswith("hqq: all repeats ran before or after all those of bf16")
    assert not told(began((1, 11)), "not in turns")
    assert not told(began((20, 30))[:3], "not in turns"), "one run has no ratio's interval"
    odd = [one.model_copy(update={"started_at": "yesterday"}) for one in began((20, 30))]
    assert not told(odd, "not in turns")


def test_a_time_without_a_zone_is_set_beside_one_that_has_it() -> None:
    plain = [one.model_copy(update={"started_at": f"2026-10-01T12:0{one.request.repeat}:00"})
             for one in session(2, backends=2)]  # fmt: skip
    mixed = [one.model_copy(update={"started_at": one.started_at + "+00:00"}) if one.request.backend == "bf16" else one
             for one in plain]  # fmt: skip
    assert told(mixed, "not in turns") == []


def test_steps_of_two_kinds_are_told_with_both_times() -> None:
    turns = (*steps("hqq")[:2], *(step(i, seconds=0.3 + 0.1 * (i % 2) + 0.0001 * i) for i in range(2, 10)))
    (warning,) = told([record("hqq", steps=turns)], "of two kinds")
    assert warning.startswith("hqq: its measured steps are of two kinds, 4 of 0.3 s and 4 of 0.401 s")
    assert "Raise --steps" in warning
    changed = (*steps("hqq")[:2], *(step(i, seconds=0.3 + 0.2 * (i > 5) + 0.0001 * i) for i in range(2, 10)))
    (warning,) = told([record("hqq", steps=changed)], "of two kinds")
    assert "first 4 of 0.3 s, then 4 of 0.501 s" in warning
    assert "changed for good" in warning
    # Said once: not as unsteady steps too.
    assert not told([record("hqq", steps=changed)], "times as long as the fastest")


def test_a_busy_machine_is_one_doubt_however_many_runs_it_met() -> None:
    shares = [0.01, 0.04, 0.06, 0.2, 0.3, 0.1, 0.07]
    records = [
        record(backend, cpu=True, surroundings=around(other_busy_cores=4 * share))
        for backend, share in zip(FIGURES, shares, strict=False)
    ]
    (warning,) = told(records, "Other programs")
    names = list(FIGURES)
    assert f"5 of 7 runs were measured ({names[4]}, {names[3]}, {names[5]} and 2 more; up to 30 %" in warning
    assert "of its 4 cores" in warning
    assert "Close them" in warning


@pytest.mark.parametrize(("cpu", "limit"), [(True, BUSY_SHARE["cpu"]), (False, BUSY_SHARE["cuda"])])
def test_a_card_minds_other_programs_less_than_a_processor(cpu: bool, limit: float) -> None:
    def one(share: float) -> list[Record]:
        return [record("hqq", cpu=cpu, surroundings=around(other_busy_cores=4 * share))]

    assert not told(one(limit * 0.98), "Other programs")
    assert told(one(limit * 1.02), "Other programs")
    assert not told([record("hqq", cpu=cpu, surroundings=around())], "Other programs")
    assert not told([record("hqq", cpu=cpu)], "Other programs")


def test_a_throttled_card_is_told_with_the_reason_and_the_heat() -> None:
    card = CardDuringSteps(
        device="cuda:0", looks=7, throttle_reasons={"temperature (hardware)": 3, "power limit": 7},
        highest_temperature_celsius=91,
    )  # fmt: skip
    (warning,) = told([record("hqq", surroundings=around(cards=(card,))), record("bf16")], "throttled")
    assert "cuda:0 throttled while 1 of 1 runs were measured (temperature (hardware), 91 degrees" in warning
    assert "power limit" not in warning
    assert "cooling" in warning


def test_a_card_that_others_computed_on_is_told() -> None:
    def one(*most: int | None) -> Record:
        cards = [
            CardDuringSteps(device=f"cuda:{place}", looks=7, most_compute_processes=count)
            for place, count in enumerate(most)
        ]
        return record("hqq", surroundings=around(cards=tuple(cards)))

    (warning,) = told([one(1, 2), one(1, 1), record("bf16")], "other compute processes")
    assert "1 of 2 runs" in warning
    assert "--force" in warning
    assert not told([one(1, 1), one(None), one(0)], "other compute processes")


def test_the_power_limit_of_a_busy_card_is_its_ordinary_state() -> None:
    card = CardDuringSteps(device="cuda:0", looks=7, throttle_reasons={"power limit": 7, "idle": 1})
    quiet = CardDuringSteps(device="cuda:0", looks=7)
    for one in (card, quiet):
        assert not told([record("hqq", surroundings=around(cards=(one,)))], "throttled")


@pytest.mark.parametrize(("retries", "words"), [(1, "once"), (12, "12 times")])
def test_retries_of_the_allocator_are_told(retries: int, words: str) -> None:
    memory = record("hqq").memory.model_copy(update={"allocator_retries": retries})
    (warning,) = told([record("hqq", memory=memory)], "allocator")
    assert f"ran out of memory {words} in measured steps" in warning
    assert "expandable_segments" in warning
    for none in (0, None):
        calm = memory.model_copy(update={"allocator_retries": none})
        assert not told([record("hqq", memory=calm)], "allocator")


def test_records_made_before_anybody_looked_have_nulls() -> None:
    body = record("hqq").model_dump(mode="json")
    del body["surroundings"]
    for name in ("allocator_retries", "allocator_ooms"):
        del body["memory"][name]
    old = Record.model_validate(body)
    assert old.surroundings is None
    assert old.memory.allocator_retries is None
    assert Memory().allocator_ooms is None
    assert compare([old, record("bf16")]).warnings == ()
