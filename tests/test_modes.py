"""Steps of two kinds: the dip is Hartigan's, and ordinary noise stays silent."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.judge.modes import CRITICAL_DIPS, critical_dip, dip, find_modes


def closest_unimodal(values: list[float]) -> float:
    """The dip by its definition: for each place of the mode a linear program over all distributions that are
    convex before and concave behind it."""
    import numpy

    places, counts = numpy.unique(numpy.asarray(values, float), return_counts=True)
    upto = numpy.cumsum(counts) / counts.sum()
    below = upto - counts / counts.sum()
    return min(with_mode(mode, list(places), list(below), list(upto)) for mode in range(len(places)))


def with_mode(mode: int, places: list[float], below: list[float], upto: list[float]) -> float:
    """The smallest distance of a distribution with its mode there. Unknown are its heights at the places, one
    more right behind the mode (it may jump there), and the distance."""
    from scipy.optimize import linprog

    count = len(places)
    distance = count + 1
    rows: list[list[float]] = []
    limits: list[float] = []

    def at_most(limit: float, *terms: tuple[int, float]) -> None:
        row = [0.0] * (distance + 1)
        for place, factor in terms:
            row[place] += factor
        rows.append(row)
        limits.append(limit)

    for place in range(count):
        behind = count if place == mode else place
        for sign in (1, -1):
            at_most(sign * below[place], (place, sign), (distance, -1))
            at_most(sign * upto[place], (behind, sign), (distance, -1))
    at_most(0, (mode, 1), (count, -1))
    before = [(i, places[i]) for i in range(mode + 1)]
    after = [(count, places[mode]), *((i, places[i]) for i in range(mode + 1, count))]
    for curve, bend in ((before, 1), (after, -1)):
        for (one, _), (other, _) in itertools.pairwise(curve):
            at_most(0, (one, 1), (other, -1))
        for (a, at_a), (b, at_b), (c, at_c) in zip(curve, curve[1:], curve[2:], strict=False):
            first, second = 1 / (at_b - at_a), 1 / (at_c - at_b)
            at_most(0, (b, bend * (first + second)), (a, -bend * first), (c, -bend * second))
    bounds = [(None, None)] * distance + [(0, None)]
    return float(linprog([*[0] * distance, 1], A_ub=rows, b_ub=limits, bounds=bounds).fun)


@pytest.mark.parametrize("seed", range(6))
def test_the_dip_is_the_distance_to_the_nearest_distribution_with_one_mode(seed: int) -> None:
    rng = random.Random(seed)
    count = (4, 5, 6, 8, 10, 12)[seed]
    for values in (
        [rng.random() for _ in range(count)],
        [rng.gauss(place % 2, 0.1) for place in range(count)],
        [float(rng.randint(0, 5)) for _ in range(count)],
    ):
        assert dip(values) == pytest.approx(closest_unimodal(values), abs=1e-9)


@settings(max_examples=100, deadline=None)
@given(st.lists(st.floats(0.1, 10), min_size=2, max_size=30))
def test_the_dip_knows_no_unit_and_no_direction(values: list[float]) -> None:
    found = dip(values)
    assert 1 / (2 * len(values)) - 1e-12 <= found <= 0.25 + 1e-12
    assert dip([8 * value for value in values]) == pytest.approx(found)
    assert dip([-value for value in values]) == pytest.approx(found)


def test_two_points_have_the_largest_dip_there_is() -> None:
    assert dip([1.0, 1.0, 1.0, 2.0, 2.0, 2.0]) == 0.25
    assert dip([1.0] * 6) == pytest.approx(1 / 12)


def test_critical_values_are_the_table_and_between_its_rows_monotonous() -> None:
    assert critical_dip(10) == CRITICAL_DIPS[10]
    found = [critical_dip(count) for count in range(6, 3000)]
    assert all(one > other for one, other in itertools.pairwise(found))


# ---- steps


FAST = [0.300, 0.302, 0.301, 0.303]
SLOW = [0.400, 0.401, 0.403, 0.402]


def test_steps_that_take_turns_are_of_two_kinds() -> None:
    found = find_modes([value for pair in zip(FAST, SLOW, strict=True) for value in pair])
    assert found is not None
    assert (found.fast, found.slow, found.since) == (4, 4, None)
    assert (found.fast_seconds, found.slow_seconds) == pytest.approx((0.3015, 0.4015))


def test_a_change_for_good_is_told_from_taking_turns() -> None:
    found = find_modes(FAST + SLOW)
    assert found is not None
    assert found.since == 4


@pytest.mark.parametrize(
    "seconds",
    [
        FAST,  # too few
        [*FAST, *(value + 0.01 for value in FAST)],  # two kinds that are 3 % apart
        [*FAST, *FAST[:3], 0.6],  # one step that was held up
        [0.3] * 8,
        [0.0, 0.0, 0.0, 0.0, 1.0, 1.0, 1.0, 1.0],
        [*FAST, *SLOW[:3], float("nan")],
    ],
)
def test_what_is_not_two_kinds(seconds: list[float]) -> None:
    assert find_modes(seconds) is None


NOISES: dict[str, Callable[[random.Random], float]] = {
    "normal": lambda rng: 1 + rng.gauss(0, 0.05),
    "log-normal": lambda rng: rng.lognormvariate(0, 0.2),
    "slow-downs": lambda rng: 1 + 0.2 * rng.expovariate(1),
    "uniform": lambda rng: 1 + 0.3 * rng.random(),
    "held up now and then": lambda rng: 1 + rng.gauss(0, 0.02) + (0.5 if rng.random() < 0.08 else 0),
}


@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("count", [6, 8, 18])
def test_ordinary_noise_is_silent(noise: str, count: int) -> None:
    rng = random.Random(count)
    trials = 600
    alarms = sum(find_modes([NOISES[noise](rng) for _ in range(count)]) is not None for _ in range(trials))
    # Of uniform values one in a thousand; more than 4 in 600 of them come by chance once in 300 times.
    assert alarms <= 4


@pytest.mark.parametrize("count", [6, 8, 18])
def test_two_kinds_that_are_clearly_apart_are_found(count: int) -> None:
    rng = random.Random(count)
    found = sum(
        find_modes([(1.0 if place % 2 else 1.3) * (1 + rng.gauss(0, 0.008)) for place in range(count)])
        is not None
        for place in range(100)
    )
    assert found >= 80
