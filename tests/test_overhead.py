"""The overhead of the harness: what is judged from step times, and the real thing through the front door."""

from __future__ import annotations

import json
import math
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from bench.judge.overhead import TARGET, judge_overhead, minimum_detectable
from bench.record.overhead import WAYS, OverheadTimes, ProcessTimes
from bench.run.overhead import ORDERS
from bench.show.overhead import overhead_lines, overhead_values
from tests.command import Command
from tests.record_factory import request


def measured(
    rounds: int, *, overhead: float = 0.0, noise: float = 0.0, seed: int = 0, **changes: Any
) -> OverheadTimes:
    """``noise``: standard deviation of a process's step time, as a share; ``overhead``: the harness's."""
    draw = random.Random(seed)
    processes = []
    for number in range(rounds):
        for place, way in enumerate(ORDERS[number % len(ORDERS)]):
            seconds = 2.0 * math.exp(draw.gauss(0, noise)) * (1 + overhead * (way == "harness"))
            values = {
                "way": way,
                "round": number,
                "place": place,
                "step_seconds": (seconds * 0.9, seconds, seconds * 1.5),
                "between_seconds": (seconds, seconds),
                "losses": (2.0, 1.9, 1.8, 1.7),
                "wall_seconds": 20.0,
            }
            processes.append(ProcessTimes(**values))
    return OverheadTimes(request=request("bnb-nf4"), environment=None, processes=tuple(processes),
                         started_at="2026-01-01T00:00:00+00:00", wall_seconds=60.0 * rounds, **changes)  # fmt: skip


def test_six_rounds_put_every_way_in_every_place_and_after_every_other_equally_often() -> None:
    places = Counter((place, way) for order in ORDERS for place, way in enumerate(order))
    after = Counter(pair for order in ORDERS for pair in pairwise(order))
    assert set(places.values()) == {2} and len(places) == 9
    assert set(after.values()) == {2} and len(after) == 6
    for half in (ORDERS[:3], ORDERS[3:]):
        assert len({(place, way) for order in half for place, way in enumerate(order)}) == 9


def test_a_planted_overhead_is_measured_and_exceeds_the_target() -> None:
    for cost in judge_overhead(measured(6, overhead=0.05, noise=0.003)).costs:
        assert cost.overhead.interval is not None
        assert cost.overhead.interval.low < 1.05 < cost.overhead.interval.high
        assert (cost.verdict, cost.within_noise) == ("exceeded", False)


def test_no_overhead_on_a_quiet_machine_is_held() -> None:
    for cost in judge_overhead(measured(6, noise=0.002)).costs:
        assert cost.verdict == "held"
        assert cost.minimum_detectable is not None
        assert 0 < cost.minimum_detectable < TARGET


def test_a_noisy_machine_leaves_the_verdict_open() -> None:
    (step, _) = judge_overhead(measured(5, noise=0.05)).costs
    assert (step.verdict, step.within_noise) == ("undecided", True)
    assert step.minimum_detectable is not None
    assert step.minimum_detectable > TARGET


def test_the_minimum_detectable_effect_is_detected_as_often_as_it_says() -> None:
    """4,000 measurements with an overhead of just that size: four in five exclude 1 in Student's interval."""
    from scipy.stats import t

    rounds, noise, draw = 6, 0.01, random.Random(1)
    error = noise * math.sqrt(1.5 / rounds)
    reach = t.ppf(0.975, rounds - 1) + t.ppf(0.8, rounds - 1)
    # From the true noise, not from that of one sample, which scatters widely itself.
    true_effect = reach * error
    found = 0
    for _ in range(4000):
        logs = [true_effect + draw.gauss(0, noise * math.sqrt(1.5)) for _ in range(rounds)]
        mean = math.fsum(logs) / rounds
        deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in logs) / (rounds - 1))
        found += abs(mean) > t.ppf(0.975, rounds - 1) * deviation / math.sqrt(rounds)
    assert 0.77 < found / 4000 < 0.83
    # And the function gives that effect for noise of that size: alternating values have it exactly.
    spread = noise * math.sqrt(2) * math.sqrt((rounds - 1) / rounds)
    given = minimum_detectable([spread, -spread] * (rounds // 2))
    assert given == pytest.approx(math.expm1(true_effect), rel=1e-9)


def test_one_round_has_no_interval_and_says_so() -> None:
    times = measured(1, overhead=0.2)
    found = judge_overhead(times)
    assert all(cost.verdict == "undecided" and cost.noise_floor is None for cost in found.costs)
    text = "\n".join(overhead_lines(found))
    assert "no interval" in text and "Fewer than 5 rounds" in text
    assert json.loads(json.dumps(overhead_values(times, found), allow_nan=False))["rounds"] == 1


def test_an_unfinished_round_is_not_counted() -> None:
    times = measured(3)
    cut = times.model_copy(update={"processes": times.processes[:-1]})
    assert len(cut.rounds()) == 2
    assert judge_overhead(cut).rounds == 2


@pytest.mark.parametrize("loss", [1.71, math.nan])
def test_loops_that_did_not_train_the_same_are_told_apart(loss: float) -> None:
    times = measured(2)
    last = times.processes[-1].model_copy(update={"losses": (2.0, 1.9, 1.8, loss)})
    changed = times.model_copy(update={"processes": (*times.processes[:-1], last)})
    found = judge_overhead(changed)
    assert not found.same_work
    assert "did not train the same" in "\n".join(overhead_lines(found))
    json.dumps(overhead_values(changed, found), allow_nan=False)


@pytest.mark.soak  # three fresh processes; `make overhead` is eighteen of each model
def test_a_real_round_trains_the_same_by_hand_and_in_the_harness(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "overhead.json"
    done = command.run("overhead", "--preset", "tiny", "--backend", "bnb-nf4", "--rounds", "1", "--json", file)
    assert done.returncode == 0, done.stdout + done.stderr
    body = json.loads(file.read_text())
    processes = body["measured"]["processes"]
    assert [process["way"] for process in processes] == list(WAYS)
    assert body["same_work"] is True
    bare, again, harness = (process["losses"] for process in processes)
    assert bare == again
    assert harness[0] == bare[0]
    assert {len(process["step_seconds"]) for process in processes} == {3}
    assert {len(process["between_seconds"]) for process in processes} == {2}
    for process in processes:
        # The whole loop takes longer than its timed part.
        assert min(process["step_seconds"]) > 0
        assert sum(process["between_seconds"]) > sum(process["step_seconds"][1:]) * 0.9
    assert body["measured"]["environment"]["cpu_threads"] >= 1
    assert "verdict" in done.stdout


def test_a_file_that_cannot_be_written_is_refused_before_half_an_hour_of_measuring(
    command: Command, tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    refused = command.refused("overhead", "--preset", "tiny", "--json", tmp_path / "file" / "below.json")
    assert "cannot write the figures" in refused


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--backend", "bnb-nf4,hqq"), "2 backends were asked for"),
        (("--backend", "gptq"), "reads packed checkpoints"),
        (("--backend", "bnb-nf"), "did you mean 'bnb-nf4'"),
        (("--steps", "3", "--set", "workload.warmup_steps=2"), "no time between steps"),
        (("--rounds", "0"), "0"),
    ],
)
def test_what_cannot_be_compared_is_refused(command: Command, flags: tuple[str, ...], words: str) -> None:
    assert words in command.refused("overhead", "--preset", "tiny", *flags)
