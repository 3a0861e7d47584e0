"""Slices of a plan: together they are the plan, and nothing of it is in two of them."""

from __future__ import annotations

import functools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.ask.experiment import Experiment
from bench.ask.plan import ModelRequest, RunRequest, plan
from bench.ask.slices import Slice, deal
from tests.front import Ended, Front

MODEL = ModelRequest(
    name="local/tiny", weights="synthetic", fingerprint="f", architecture={"model_type": "qwen2"}
)
BACKENDS = ("awq", "bf16", "bnb-int8", "bnb-nf4", "bnb-nf4-dq", "eetq", "gptq", "hqq")


@functools.cache
def planned(backends: tuple[str, ...], repeats: int) -> list[RunRequest]:
    return plan(
        Experiment(preset="tiny", backends=backends, repeats=repeats),
        dict.fromkeys(backends, MODEL),
        device="cpu",
        cpu_threads=2,
        options={name: {} for name in backends},
        environments=dict.fromkeys(backends, "current"),
        versions={name: {} for name in backends},
        calibrations=dict.fromkeys(backends),
    )


plans = st.builds(planned, st.integers(1, len(BACKENDS)).map(lambda count: BACKENDS[:count]), st.integers(1, 7))


@given(plans, st.integers(1, 40))
def test_slices_are_the_plan_and_nothing_twice(whole: list[RunRequest], count: int) -> None:
    slices = [Slice(place, count).of(whole) for place in range(1, count + 1)]
    keys = [request.key for part in slices for request in part]
    assert sorted(keys) == sorted(request.key for request in whole)
    order = {request.key: place for place, request in enumerate(whole)}
    for part in slices:
        places = [order[request.key] for request in part]
        assert places == sorted(places), "a slice is not in the order of the plan"


@given(plans, st.integers(1, 12))
def test_where_there_is_a_round_for_each_machine_a_round_stays_on_one(
    whole: list[RunRequest], count: int
) -> None:
    rounds = {request.repeat for request in whole}
    if len(rounds) < count:
        return
    homes = {(request.repeat, place) for place, part in enumerate(deal(whole, count)) for request in part}
    assert len(homes) == len(rounds)


def test_with_fewer_rounds_than_machines_no_machine_has_always_the_same_backend() -> None:
    slices = deal(planned(BACKENDS[:4], repeats=3), 4)
    assert [len(part) for part in slices] == [3, 3, 3, 3]
    assert all(len({request.backend for request in part}) == 3 for part in slices)


def dry_run(*flags: str) -> Ended:
    return Front().run("run", "--preset", "proxy", "--repeats", "3", "--dry-run", "--json", *flags)


def keys(*flags: str) -> list[str]:
    done = dry_run(*flags)
    assert done.code == 0, done.err
    return [RunRequest.model_validate(body).key for body in json.loads(done.out)]


def test_the_command_line_s_slices_are_its_plan() -> None:
    parts = [keys("--shard", f"{place}/4") for place in range(1, 5)]
    assert sorted(key for part in parts for key in part) == sorted(keys())
    assert all(parts)


@pytest.mark.parametrize(
    ("given_shard", "said"),
    [
        ("5/4", "--shard 5/4: I must be from 1 to 4"),
        ("0/4", "--shard 0/4: I must be from 1 to 4"),
        ("1/0", "--shard 1/0: N must be from 1 to"),
        ("1/99999", "--shard 1/99999: N must be from 1 to"),
        ("1of4", "--shard '1of4' is not of the form I/N; for example --shard 1/4"),
        ("-1/4", "--shard '-1/4' is not of the form I/N"),
        ("", "--shard '' is not of the form I/N"),
    ],
)
def test_what_is_no_slice_is_refused_in_one_line(given_shard: str, said: str) -> None:
    done = dry_run("--shard", given_shard)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert said in line
