import math
import random

import pytest

from bench.judge.stability import judge_stability
from bench.judge.step_spikes import loss_rise, norm_spike, robust_z
from bench.record.schema import Record
from tests.committed import committed
from tests.record_factory import record, step


def of_norms(norms):
    return tuple(step(index, gradient_norm=norm) for index, norm in enumerate(norms))


def of_losses(losses, tokens=300):
    return tuple(step(i, losses=(loss,), loss_tokens=tokens) for i, loss in enumerate(losses))


# ---- healthy runs


REAL = {
    "packed, SmolLM2-135M": [0.813, 0.66, 1.016, 0.795, 0.743, 0.707, 0.622, 0.696],
    "rows of 50 tokens": [1.283, 1.007, 1.266, 0.895, 1.846, 1.364, 1.324, 0.982, 1.236, 0.873],
    "rows of 20 tokens": [2.163, 2.186, 1.899, 3.491, 1.802, 1.842, 1.906, 2.479, 1.91, 3.483, 1.946, 2.839],
    "learning rate 0.001": [2.32, 2.231, 2.045, 3.815, 1.752, 1.56, 1.895, 2.436, 1.482, 1.38, 2.493, 2.346],
    "learning rate 0.003": [1.266, 1.058, 0.931, 1.073, 1.267, 1.148, 1.393, 1.495],
    "falls to a quarter": [4.0, 3.1, 1.9, 1.4, 1.1, 1.05, 1.0, 1.02],
    "rises to fourfold": [1.0, 1.9, 3.0, 3.7, 4.1, 4.0, 3.9, 4.0],
    "level to the bit": [0.5] * 8,
    "level but for one": [0.5, 0.5, 0.5, 0.51, 0.5, 0.5, 0.5, 0.5],
    "a low start": [0.1, 1.0, 1.1, 0.9, 1.0, 1.05, 0.95, 1.0],
    "four steps": [1.0, 0.9, 1.6, 0.8],
}


@pytest.mark.parametrize("name", REAL)
def test_ordinary_norms_are_no_spike(name):
    spike = norm_spike(of_norms(REAL[name]))
    assert spike is not None
    assert not spike.exceeds


def healthy_norms(source, count):
    """Log-normal scatter on a drift by up to 4 over the first steps."""
    drift, settled = source.choice([0.25, 0.5, 1, 2, 4]), source.randint(1, 3)
    return [math.exp(source.gauss(0, 0.3)) * drift ** max(0.0, 1 - index / settled) for index in range(count)]


@pytest.mark.parametrize("count", [4, 6, 8, 12, 20])
def test_fewer_than_one_simulated_healthy_run_in_a_thousand_alarms(count):
    source = random.Random(count)
    runs = 4000
    alarms = sum(norm_spike(of_norms(healthy_norms(source, count))).exceeds for _ in range(runs))
    assert alarms < runs / 1000


@pytest.mark.parametrize("count", [4, 8, 20])
def test_a_jump_by_twenty_in_a_level_run_is_always_found(count):
    source = random.Random(count)
    for _ in range(500):
        norms = [math.exp(source.gauss(0, 0.2)) for _ in range(count)]
        norms[source.randrange(1, count)] *= 20
        assert norm_spike(of_norms(norms)).exceeds


def test_every_real_record_of_the_repository_is_free_of_spikes():
    read = [Record.model_validate_json(file.read_text(encoding="utf-8")) for file in committed()]
    # One has an overflow planted.
    files = [made for made in read if not made.request.stress]
    assert 16 <= len(files) == len(read) - 1
    for made in files:
        assert not norm_spike(made.steps).exceeds, made.key
        assert not loss_rise(made.steps).exceeds, made.key
        real = made.request.model.weights == "real"
        assert judge_stability(made).verdict == ("healthy" if real else "not_judged"), made.key


# ---- spikes


@pytest.mark.parametrize("place", range(1, 8))
def test_a_spike_is_found_in_whichever_step_it_stands(place):
    norms = [0.81, 0.66, 1.02, 0.79, 0.74, 0.71, 0.62, 0.7]
    norms[place] *= 25
    spike = norm_spike(of_norms(norms))
    assert spike.exceeds
    assert spike.step == place


@pytest.mark.parametrize("place", [3, 4, 6])
def test_a_jump_that_stays_is_found_where_it_begins(place):
    norms = [1.0, 1.1, 0.9, 1.05, 0.95, 1.0, 1.1, 0.9]
    jumped = [norm * (20 if index >= place else 1) for index, norm in enumerate(norms)]
    spike = norm_spike(of_norms(jumped))
    assert spike.exceeds


def test_both_thresholds_must_be_exceeded():
    wide = norm_spike(of_norms([1.0, 0.2, 3.0, 0.3, 12.0, 2.0]))
    assert wide.ratio > 8
    assert not wide.exceeds
    narrow = norm_spike(of_norms([1.0, 1.0, 1.0, 1.001, 1.0, 2.0, 1.0]))
    assert narrow.robust_z > 14
    assert not narrow.exceeds


def test_the_ratio_is_to_the_mean_of_the_norms_before():
    assert norm_spike(of_norms([1.0, 3.0, 2.0, 10.0, 1.0])).ratio == pytest.approx(5.0)


def test_norms_that_are_not_finite_and_zeros_are_no_yardstick():
    spike = norm_spike(of_norms([0.0, math.nan, 1.0, math.inf, 1.0, 1.1, 0.9, 25.0]))
    assert spike.step == 7
    assert spike.ratio == pytest.approx(25.0)
    assert spike.exceeds


def test_too_few_steps_have_no_robust_z_and_no_spike():
    spike = norm_spike(of_norms([1.0, 1.0, 40.0]))
    assert spike.robust_z is None
    assert not spike.exceeds
    assert norm_spike(of_norms([1.0])) is None
    assert norm_spike(()) is None


def test_robust_z_by_hand():
    # Median 3, absolute deviations 2 1 0 1 2, so a MAD of 1.
    assert robust_z(13.0, [1.0, 2.0, 3.0, 4.0, 5.0]) == pytest.approx(6.745)
    assert robust_z(1.0, [1.0, 1.0, 1.0]) == 0
    assert robust_z(2.0, [1.0, 1.0, 1.0]) == math.inf


# ---- the loss


@pytest.mark.parametrize(
    ("losses", "tokens"),
    [
        ([1.788, 2.48, 3.127, 1.993, 3.454, 1.905, 2.561, 3.03], 107),
        ([1.892, 1.281, 1.932, 1.098, 4.183, 3.557, 1.722, 1.412, 1.706, 1.08], 50),
        ([2.491, 2.002, 4.56, 5.141, 2.362, 1.984, 4.422, 3.481, 2.044, 1.799, 3.634, 4.767], 17),
        ([0.1, 7.0, 0.2, 0.1], 1),
        ([12.1, 11.9, 12.0, 15.2, 12.1], 300),
        ([2.0, 1.9, 1.8, 1.7], 300),
    ],
)
def test_ordinary_losses_do_not_alarm(losses, tokens):
    assert not loss_rise(of_losses(losses, tokens)).exceeds


@pytest.mark.parametrize(
    "losses",
    [
        [1.892, 2.248, 7.607, 18.427, 11.656],
        [1.892, 4.631, 26.839, 36.486],
        [1.892, 13.205, 25.639, 39.674, 18.289],
        [2.0, 2.0, 2.0, 2.0, 9.0, 2.0],
        [2.0, 12.0, 12.0, 12.0, 12.0, 12.0],
    ],
)
def test_losses_that_ran_away_alarm(losses):
    rise = loss_rise(of_losses(losses, 60))
    assert rise.exceeds
    assert rise.rise == rise.loss - rise.start


def test_few_loss_tokens_are_allowed_more():
    few, many = (loss_rise(of_losses([2.0, 6.5], tokens)) for tokens in (4, 4000))
    assert not few.exceeds
    assert many.exceeds


def test_losses_that_are_not_finite_are_left_to_another_verdict():
    assert loss_rise(of_losses([2.0, math.nan, math.inf, 2.1])).rise == pytest.approx(0.1)
    assert loss_rise(of_losses([math.nan])) is None


def test_the_stability_of_a_spike_is_spiking():
    made = record("hqq", steps=of_norms([1.0, 1.1, 0.9, 1.0, 22.0, 1.0, 1.0, 1.0]))
    assert judge_stability(made).verdict == "spiking"
