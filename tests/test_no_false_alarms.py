"""Healthy runs of the toy, under every backend, dtype and several seeds: none may be called anything else.

Each is a real training (``tests/rig.py``), judged as a run of real weights is. A model is built once for each
backend and dtype; its adapters are drawn anew for each seed.
"""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from bench.judge.stability import judge_stability
from bench.record.schema import Record
from tests.rig import BACKENDS, DTYPES_ASKED, Rig, ask, judged, quiet, settled
from tests.thinned import thinned

__all__ = ["settled"]  # a fixture for this whole module

pytestmark = quiet

SEEDS = (0, 1, 2)


@pytest.fixture(scope="module", params=[(b, d) for b in BACKENDS for d in DTYPES_ASKED], ids="-".join)
def rig(request: pytest.FixtureRequest) -> Iterator[Rig]:
    backend, dtype = request.param
    yield Rig(ask(backend, dtype=dtype))


def assert_healthy(made: Record) -> None:
    verdict = judge_stability(made)
    assert verdict.verdict == "healthy", verdict.reason
    assert made.first_failure is None or made.first_failure.skipped_by_scaler, made.first_failure
    assert made.trainable_weights_finite
    assert made.proof.weights_finite
    assert not made.proof.breaches
    assert all(step.probe is not None for step in made.steps)
    assert not [measure for measure in verdict.evidence if measure.exceeded]


@pytest.mark.parametrize("seed", thinned(SEEDS, len(SEEDS)))
def test_a_healthy_run_is_called_healthy(rig: Rig, seed: int) -> None:
    outcome = rig.train(seed)
    assert outcome.record.request.model.weights == "real"
    assert outcome.record.request.seed == seed
    assert len(outcome.record.steps) == 4
    assert_healthy(outcome.record)


def test_another_seed_is_another_run_and_the_same_seed_the_same() -> None:
    rig = Rig(ask("bnb-nf4"))
    first, other, again = (rig.train(seed).record for seed in (0, 1, 0))
    assert first.lora
    assert other.lora
    assert first.lora.initial_digest != other.lora.initial_digest
    assert first.steps[1].gradient_norm != other.steps[1].gradient_norm
    assert first.lora == again.lora
    assert [step.losses for step in first.steps] == [step.losses for step in again.steps]


@pytest.mark.parametrize("checkpointing", ["none", "reentrant", "non_reentrant"])
@pytest.mark.parametrize("attention", ["sdpa", "sdpa_math", "eager"])
@pytest.mark.parametrize("backend", thinned(["bnb-nf4", "hqq", "awq"], 3))
def test_no_way_of_checkpointing_or_attending_raises_an_alarm(
    backend: str, attention: str, checkpointing: str
) -> None:
    assert_healthy(Rig(ask(backend, attention=attention, checkpointing=checkpointing)).train().record)


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("traced", {"trace": True}),
        ("accumulation", {"work": {"gradient_accumulation_steps": 3}}),
        ("batch of two, padded left", {"work": {"micro_batch_size": 2, "padding": "left"}}),
        ("batch of two, padded right", {"work": {"micro_batch_size": 2, "padding": "right"}}),
        ("eager, padded left", {"attention": "eager", "work": {"micro_batch_size": 2, "padding": "left"}}),
        ("adapters in float32", {"lora": {"precision": "float32"}}),
        ("adapters in the compute dtype", {"lora": {"precision": "compute"}}),
        ("no clipping", {"optimizer": {"max_gradient_norm": None}}),
        ("few projections", {"lora": {"target_modules": ("q_proj", "v_proj"), "rank": 4}}),
        ("more layers", {"layers": 5}),
        ("longer", {"work": {"steps": 12}}),
        ("dialled", {"stress": {"model.layers.*.mlp.up_proj": 16.0}}),
    ],
)
def test_no_ordinary_setting_raises_an_alarm(name: str, changes: dict[str, object]) -> None:
    assert_healthy(Rig(ask("bnb-nf4", **changes)).train().record)


def test_a_run_of_synthetic_weights_is_not_judged() -> None:
    """What keeps the others honest: they are judged since their request says that their weights are real."""
    made = Rig(ask()).train().record
    model = made.request.model.model_copy(update={"weights": "synthetic"})
    request = made.request.model_copy(update={"model": model})
    assert judged(made.model_copy(update={"request": request})).verdict.verdict == "not_judged"
