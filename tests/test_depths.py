"""Depths that take turns in one process: each computes what a model of that depth computes alone."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from bench.probe.ranges import WRAPPER
from bench.record.depths import SELDOM, Turns, read_times, save_times, times_key
from bench.run.arrange import arrange
from bench.run.asked import Asked
from bench.run.building import Builder
from bench.run.depths import ShallowTrainer, cut
from bench.run.isolation import WatchedVariables
from bench.run.launch import time_depths
from bench.run.order import Order
from bench.run.training import one_step
from tests.forecast_factory import six, times
from tests.rig import Kept, ask, packed, quiet, settled  # noqa: F401 - a fixture of its own

pytestmark = quiet


def builder_of(asked) -> Builder:
    order = Order(request=asked, model_folder=None)
    if asked.calibration is not None:
        order = order.model_copy(update={"packed_folder": packed(order)})
    return Builder(order, Kept(), WatchedVariables())


# ---- the turns -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("backend", "dtype", "checkpointing"),
    [
        ("bf16", "bfloat16", "non_reentrant"),
        ("bf16", "float16", "reentrant"),
        ("bnb-nf4-dq", "bfloat16", "non_reentrant"),
        ("bnb-int8", "bfloat16", "none"),
        ("hqq", "bfloat16", "non_reentrant"),
        ("gptq", "bfloat16", "non_reentrant"),
        ("awq", "bfloat16", "non_reentrant"),
        ("eetq", "bfloat16", "non_reentrant"),
    ],
)
def test_every_step_of_a_cut_model_is_that_of_a_model_of_that_depth_to_the_bit(backend, dtype, checkpointing):
    """Loss, gradient norm and the adapters afterwards, in three rounds of turns."""
    whole = ask(backend, layers=4, dtype=dtype, checkpointing=checkpointing)
    builder = builder_of(whole)
    trainer = builder.trainer_of(whole)
    shallow = {depth: ShallowTrainer.of(trainer, depth, builder) for depth in (1, 2, 4)}
    seen = {depth: [] for depth in shallow}
    for place in range(3):
        for depth, one in shallow.items():
            with one.alone() as turn:
                step, _ = one_step(turn, place)
            seen[depth].append((step.losses, step.gradient_norm, step.applied, step.tokens))
    for depth, one in shallow.items():
        asked = ask(backend, layers=depth, dtype=dtype, checkpointing=checkpointing)
        alone = builder_of(asked).trainer_of(asked)
        steps = [one_step(alone, place)[0] for place in range(3)]
        assert seen[depth] == [(s.losses, s.gradient_norm, s.applied, s.tokens) for s in steps]
        assert set(one.values) == set(alone.adapters.tensors)
        for name, parameter in alone.adapters.tensors.items():
            assert torch.equal(one.values[name], parameter.detach()), (depth, name)
    losses = [seen[depth][0][0] for depth in shallow]
    assert len(set(losses)) == len(losses), "the depths computed the same"


def test_a_model_is_whole_again_after_the_cut():
    asked = ask(layers=3)
    model = builder_of(asked).trainer_of(asked).adapters.model
    layers = model.get_submodule(WRAPPER + "model.layers")
    with cut(model, 2):
        assert len(model.get_submodule(WRAPPER + "model").layers) == 2
        assert model.get_submodule(WRAPPER + "model.layers.1") is layers[1]
    assert model.get_submodule(WRAPPER + "model.layers") is layers
    with pytest.raises(RuntimeError), cut(model, 1):
        raise RuntimeError
    assert len(layers) == 3
    assert model.get_submodule(WRAPPER + "model.layers") is layers


@pytest.mark.parametrize("layers", [0, 4])
def test_a_model_cannot_be_cut_to_what_it_does_not_have(layers):
    asked = ask(layers=3)
    model = builder_of(asked).trainer_of(asked).adapters.model
    with pytest.raises(ValueError, match=f"3 decoder layers cannot be cut to {layers}"), cut(model, layers):
        pass


# ---- the worker ----------------------------------------------------------------------------------


@pytest.mark.soak  # test_forecast does it through the command in `make test`
def test_the_worker_tells_what_models_of_those_depths_compute(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("QLORA_BENCH_CACHE", str(tmp_path / "cache"))
    preset = str(six(tmp_path))
    told = {}
    for depth in (2, 3):
        asked = Asked(preset=preset, backends=("gptq",), layers=depth, steps=3, settings=("cpu_threads=1",))
        sweep = arrange(asked).sweep
        told[depth] = sweep.order(sweep.requests[0])
    turns = Turns(depths=(2, 3), warmup_rounds=1, rounds=2, seldom=3)
    heard = []
    found = time_depths(told[3].model_copy(update={"turns": turns}), heard.append)
    assert (found.status, found.message) == ("completed", None)
    alone = builder_of(told[2].request).trainer_of(told[2].request)
    assert found.losses[2] == tuple(one_step(alone, place)[0].losses[0] for place in range(3))
    assert found.seconds[3][2] is None
    assert all(seconds > 0 for seconds in (*found.seconds[2], *found.seconds[3][:2]))
    assert [set(of_round) for of_round in found.rounds()] == [{2, 3}, {2}]
    assert found.tokens_per_step == 64
    assert {event["event"] for event in heard} >= {"stage", "progress", "depth_step", "outcome"}
    assert [event["name"] for event in heard if event["event"] == "stage"] == ["prepare", "load", "train"]
    # And it is kept.
    save_times(tmp_path, found)
    assert read_times(tmp_path, times_key(told[3].request, turns)) == found


def test_a_depth_that_is_not_there_is_an_outcome(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("QLORA_BENCH_CACHE", str(tmp_path / "cache"))
    asked = Asked(preset=str(six(tmp_path)), backends=("bf16",), layers=2, settings=("cpu_threads=1",))
    sweep = arrange(asked).sweep
    turns = Turns(depths=(1, 5), warmup_rounds=0, rounds=1)
    found = time_depths(sweep.order(sweep.requests[0]).model_copy(update={"turns": turns}))
    assert found.status == "error"
    assert "2 decoder layers cannot be cut to 5" in found.message
    assert found.rounds() == ()


# ---- what was asked and what is kept -------------------------------------------------------------


def test_a_seldom_depth_has_a_turn_in_the_warm_up_and_in_every_second_round():
    turns = Turns(depths=(2, 4, 24), warmup_rounds=1, rounds=4, seldom=24)
    assert [24 in turns.of_round(place) for place in range(5)] == [True, True, False, True, False]
    assert turns.of_round(0) == (2, 4, 24)
    assert SELDOM == 2


@pytest.mark.parametrize("depths", [(), (4, 2), (2, 2), (0, 1)])
def test_depths_rise(depths):
    with pytest.raises(ValidationError):
        Turns(depths=depths, warmup_rounds=0, rounds=1)


def test_a_round_that_was_cut_short_does_not_count():
    made = times([{2: 9.0, 4: 9.0}, {2: 0.4, 4: 0.6}, {2: 0.4, 4: 0.6}], warmup=1)
    broken = made.model_copy(update={"seconds": {2: (9.0, 0.4, 0.5), 4: (9.0, 0.6)}})
    assert made.rounds() == ({2: 0.4, 4: 0.6},) * 2
    assert broken.rounds() == ({2: 0.4, 4: 0.6},)


def test_times_that_were_interrupted_are_measured_again(tmp_path: Path):
    made = times([{2: 0.4, 4: 0.6}], status="interrupted", message="stopped by the user")
    save_times(tmp_path, made)
    assert read_times(tmp_path, made.key) is None
    assert read_times(tmp_path, "another") is None
