"""The straight line, its intervals, and the step time's own estimate."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.judge.straight_line import medians, resampled, spread, step_line, t_quantile, through

DEPTHS = st.lists(st.integers(1, 200), min_size=2, max_size=5, unique=True)


@given(DEPTHS, st.integers(0, 2**40), st.integers(0, 2**50), st.integers(1, 400))
def test_whole_numbers_on_a_line_come_out_whole_and_exact(depths, per_layer, fixed, full):
    line = through({depth: fixed + per_layer * depth for depth in depths})
    assert line is not None
    assert line.at(full) == fixed + per_layer * full
    assert Fraction(line.per_layer) == per_layer


def test_least_squares_of_three_points():
    # By hand: depths 1, 2, 4 around 7/3; slope 31/7, and the line through the means.
    line = through({1: 10, 2: 13, 4: 23})
    assert line.per_layer == Fraction(31, 7)
    assert line.at(0) == Fraction(46, 3) - Fraction(31, 7) * Fraction(7, 3)


def test_one_point_is_no_line():
    assert through({2: 5}) is None
    assert through({}) is None


# ---- the step time -------------------------------------------------------------------------------


def test_steps_on_a_line_give_that_line():
    line = step_line([{2: 0.4, 4: 0.6}] * 3, (2, 4))
    assert line.at(24) == pytest.approx(2.6)
    assert (line.per_layer, line.fixed) == (pytest.approx(0.1), pytest.approx(0.2))


def test_a_drift_of_the_machine_moves_the_line_and_not_its_slope():
    """Rounds that are slower as a whole: differences within a round do not see it."""
    drifting = [{2: 0.4 + late, 4: 0.6 + late} for late in (0.0, 0.1, 0.2, 0.3, 0.4)]
    assert step_line(drifting, (2, 4)).per_layer == pytest.approx(0.1)


def test_one_round_that_was_disturbed_changes_nothing():
    rounds = [{2: 0.4, 4: 0.6}] * 6 + [{2: 0.4, 4: 5.0}]
    assert step_line(rounds, (2, 4)).at(24) == pytest.approx(2.6)


def test_rounds_without_every_slice_are_left_out():
    rounds = [{2: 0.4, 4: 0.6}, {2: 9.0}]
    assert step_line(rounds, (2, 4)).at(24) == pytest.approx(2.6)
    assert step_line([{2: 9.0}], (2, 4)) is None
    assert step_line([{2: 9.0}], (2,)) is None
    assert medians([{2: 1.0}, {2: 3.0, 4: 5.0}], (2, 4, 8)) == {2: 2.0, 4: 5.0}


def noisy(seed: int, count: int = 12, noise: float = 0.01) -> list[dict[int, float]]:
    draw = random.Random(seed)
    rounds = []
    for _ in range(count):
        drift = draw.gauss(1, 0.05)
        rounds.append({depth: drift * (0.2 + 0.1 * depth) * draw.gauss(1, noise) for depth in (2, 4)})
    return rounds


def test_a_drift_that_comes_and_goes_cancels_better_than_in_a_line_through_medians():
    def off(estimate) -> float:
        return (
            sum((float(estimate(noisy(seed, noise=0.01)).per_layer) - 0.1) ** 2 for seed in range(60)) ** 0.5
        )

    paired = off(lambda rounds: step_line(rounds, (2, 4)))
    assert paired < 0.9 * off(lambda rounds: through(medians(rounds, (2, 4))))


def test_the_interval_covers_the_truth_about_as_often_as_it_says():
    """2.6 s is the truth. A bootstrap of a dozen rounds is known to be a little too narrow."""

    def forecast(rounds):
        return float(step_line(rounds, (2, 4)).at(24))

    intervals = [resampled([noisy(seed)], forecast) for seed in range(40)]
    covered = sum(low <= 2.6 <= high for low, high in intervals)
    assert covered >= 32
    # And it is not so wide that it would cover anything.
    assert all(high - low < 2.0 for low, high in intervals)
    assert sum(low <= 3.4 <= high for low, high in intervals) < 10


def test_more_noise_gives_a_wider_interval_and_the_same_rounds_the_same_one():
    def forecast(rounds):
        return float(step_line(rounds, (2, 4)).at(24))

    quiet, loud = resampled([noisy(1, noise=0.002)], forecast), resampled([noisy(1, noise=0.05)], forecast)
    assert loud[1] - loud[0] > 3 * (quiet[1] - quiet[0])
    assert resampled([noisy(1)], forecast) == resampled([noisy(1)], forecast)


def test_processes_that_differ_widen_the_interval():
    """Each process repeats to the digit, but one is slower than the other."""
    fast, slow = [{2: 0.4, 4: 0.6}] * 5, [{2: 0.5, 4: 0.8}] * 5

    def forecast(rounds):
        return float(step_line(rounds, (2, 4)).at(24))

    low, high = resampled([fast, slow], forecast)
    assert (low, high) == (pytest.approx(2.6), pytest.approx(3.8))


def test_one_round_has_no_interval():
    assert resampled([[{2: 0.4}]], lambda rounds: 1.0) is None
    assert resampled([[], [{2: 0.4}]], lambda rounds: 1.0) is None


# ---- intervals of a mean -------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("freedom", "quantile"), [(1, 12.706), (2, 4.303), (10, 2.228), (11, 2.201), (20, 2.086), (60, 2.000)]
)
def test_quantiles_are_those_of_the_tables(freedom, quantile):
    assert t_quantile(freedom) == pytest.approx(quantile, abs=1.5e-3)


def test_the_spread_of_runs():
    assert spread([1.0]) is None
    assert spread([3.0, 3.0, 3.0]) == 0
    # Two values: half their distance times 12.706.
    assert spread([1.0, 2.0]) == pytest.approx(12.706 / 2)
