"""The ratio to a baseline and its interval: properties, and how often it holds the truth."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bench.judge.intervals import (
    LEVEL,
    NOISE_MARGIN,
    Interval,
    Ratio,
    differs,
    paired_ratio,
    paired_ratios,
    unpaired_ratios,
)

figures = st.floats(1e-6, 1e6)
pairs = st.lists(st.tuples(figures, figures), min_size=1, max_size=8)


def unpaired_ratio(values: list[float], base: list[float]) -> Ratio:
    """Of one pair of sessions."""
    return unpaired_ratios([(values, base)])[0]


def close(one: Ratio, other: Ratio) -> bool:
    ends = [(one.estimate, other.estimate)]
    if one.interval and other.interval:
        ends += [(one.interval.low, other.interval.low), (one.interval.high, other.interval.high)]
    same = (one.interval is None) == (other.interval is None)
    return same and all(math.isclose(a, b, rel_tol=1e-6) for a, b in ends)


def reciprocal(ratio: Ratio) -> Ratio:
    ends = ratio.interval and Interval(1 / ratio.interval.high, 1 / ratio.interval.low)
    return Ratio(1 / ratio.estimate, ends, ratio.pairs)


@settings(max_examples=60, deadline=None)
@given(pairs)
def test_the_ratio_of_swapped_figures_is_the_reciprocal(found: list[tuple[float, float]]) -> None:
    ratio, swapped = paired_ratio(found), paired_ratio([(base, value) for value, base in found])
    if ratio.interval and not 1e-150 < ratio.interval.low <= ratio.interval.high < 1e150:
        return  # beyond what a float holds the reciprocal of
    assert close(reciprocal(ratio), swapped)
    turned = {"lower": "higher", "higher": "lower", None: None}
    assert differs(swapped, NOISE_MARGIN) == turned[differs(ratio, NOISE_MARGIN)]


@settings(max_examples=40, deadline=None)
@given(st.lists(figures, min_size=1, max_size=6), st.lists(figures, min_size=1, max_size=6))
def test_unpaired_ratios_turn_over_as_well(values: list[float], base: list[float]) -> None:
    ratio, swapped = unpaired_ratio(values, base), unpaired_ratio(base, values)
    assert math.isclose(ratio.estimate, 1 / swapped.estimate, rel_tol=1e-9)
    assert ratio.pairs == swapped.pairs == min(len(values), len(base))
    assert (ratio.interval is None) == (min(len(values), len(base)) < 2)


@settings(max_examples=40, deadline=None)
@given(pairs, st.floats(1e-3, 1e3))
def test_a_unit_changes_nothing(found: list[tuple[float, float]], unit: float) -> None:
    scaled = [(value * unit, base * unit) for value, base in found]
    one, other = paired_ratio(found), paired_ratio(scaled)
    assert math.isclose(one.estimate, other.estimate, rel_tol=1e-9)


@settings(max_examples=40, deadline=None)
@given(pairs)
def test_the_estimate_lies_in_its_interval_and_a_wider_level_gives_a_wider_one(
    found: list[tuple[float, float]],
) -> None:
    ratio, wider = paired_ratio(found), paired_ratio(found, 0.99)
    if ratio.interval and wider.interval:
        assert ratio.interval.low <= ratio.estimate <= ratio.interval.high
        assert wider.interval.low <= ratio.interval.low
        assert wider.interval.high >= ratio.interval.high


def test_many_at_once_are_what_each_is_alone() -> None:
    rng = random.Random(3)
    many = [
        [(rng.gauss(2, 0.1), rng.gauss(1, 0.1)) for _ in range(count)] for count in (1, 2, 5, 3, 5, 2, 7)
    ]
    many.insert(2, [(2.0, 1.0)] * 4)
    many.insert(3, [(math.nan, 1.0), (1.0, 1.0)])
    alone = [paired_ratio(found) for found in many]
    assert repr(paired_ratios(many)) == repr(alone)
    assert repr(alone) == repr([paired_ratio(found) for found in many]), "the resampling has no seed"


def test_many_pairs_of_sessions_at_once_are_what_each_is_alone() -> None:
    rng = random.Random(5)
    sizes = [(5, 5), (3, 4), (5, 5), (1, 3), (2, 2), (5, 5)]
    many = [tuple([math.exp(rng.gauss(0, 0.1)) for _ in range(size)] for size in pair) for pair in sizes]
    many += [([2.0, 2.0], [1.0, 1.0]), ([1.0, math.nan], [1.0, 2.0])]
    alone = [unpaired_ratio(values, base) for values, base in many]
    assert repr(unpaired_ratios(many)) == repr(alone)
    assert [ratio.interval is None for ratio in alone] == [False] * 3 + [True] + [False] * 3 + [True]


def test_one_pair_has_no_interval_and_concludes_nothing() -> None:
    ratio = paired_ratio([(3.0, 2.0)])
    assert (ratio.estimate, ratio.interval, ratio.pairs) == (pytest.approx(1.5), None, 1)
    assert differs(ratio, 0) is None
    assert not ratio.excludes_one(0)
    assert unpaired_ratio([3.0], [2.0, 2.1]).interval is None


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 0.0, -1.0])
def test_what_has_no_logarithm_is_not_dropped(bad: float) -> None:
    for ratio in (
        paired_ratio([(1.0, 1.0), (bad, 1.0), (1.0, 1.0)]),
        paired_ratio([(1.0, 1.0), (1.0, bad), (1.0, 1.0)]),
        unpaired_ratio([1.0, bad], [1.0, 1.0, 1.0]),
        unpaired_ratio([1.0, 1.0, 1.0], [1.0, bad]),
    ):
        assert math.isnan(ratio.estimate)
        assert ratio.interval is None
        assert differs(ratio, 0) is None


def test_equal_ratios_are_a_point() -> None:
    ratio = paired_ratio([(0.3, 0.1), (3.0, 1.0), (0.9, 0.3)])
    assert ratio.interval is not None
    assert math.isclose(ratio.estimate, 3)
    assert ratio.interval.low == ratio.interval.high == ratio.estimate
    assert unpaired_ratio([2.0, 2.0], [2.0, 2.0, 2.0]).interval == Interval(1.0, 1.0)
    # One side scatters: there is an interval.
    spread = unpaired_ratio([2.0, 2.2], [1.0, 1.0, 1.0]).interval
    assert spread is not None
    assert spread.low < 2.1 < spread.high


def test_the_margin_is_a_factor_on_both_sides() -> None:
    def point(value: float) -> Ratio:
        return Ratio(value, Interval(value, value), 5)

    assert differs(point(1.009), 0.01) is None
    assert differs(point(1.011), 0.01) == "higher"
    assert differs(point(1 / 1.009), 0.01) is None
    assert differs(point(1 / 1.011), 0.01) == "lower"
    assert differs(point(1.000001), 0) == "higher"
    assert differs(point(1.0), 0) is None
    assert differs(Ratio(1.2, Interval(1.0, 1.4), 5), 0.01) is None


def test_nothing_gives_no_ratio() -> None:
    for call in (lambda: paired_ratio([]), lambda: unpaired_ratio([], [1.0]), lambda: unpaired_ratio([1.0], [])):
        with pytest.raises(ValueError, match="at least one"):
            call()


def test_figures_far_apart_overflow_to_infinity_and_not_into_an_error() -> None:
    ratio = paired_ratio([(1e300, 1e-300), (1e-300, 1e300)])
    assert ratio.interval is not None
    assert ratio.interval.high == math.inf
    assert ratio.interval.low == 0


# ---- how often the interval holds the truth ------------------------------------------------------


def normal(rng: random.Random) -> float:
    return rng.gauss(0, 0.03)


def skewed(rng: random.Random) -> float:
    """Slow-downs only, as a busy machine makes them."""
    return rng.expovariate(1) * 0.03


def spiked(rng: random.Random) -> float:
    return rng.gauss(0, 0.01) + (0.2 if rng.random() < 0.1 else 0)


@pytest.mark.parametrize("noise", [normal, skewed, spiked])
@pytest.mark.parametrize("count", [3, 5, 10])
def test_the_interval_holds_the_true_ratio_about_as_often_as_it_says(
    noise: Callable[[random.Random], float], count: int
) -> None:
    rng = random.Random(11)
    truth, trials = 1.3, 500

    def figure(true: float) -> float:
        return true * math.exp(noise(rng))

    ratios = paired_ratios([[(figure(truth), figure(1)) for _ in range(count)] for _ in range(trials)])
    held = sum(r.interval.low <= truth <= r.interval.high for r in ratios if r.interval) / trials
    assert held >= LEVEL - 0.02
    # It must not be true by being useless: most say that there is a difference of 30 %, even of three repeats.
    assert sum(differs(ratio, NOISE_MARGIN) == "higher" for ratio in ratios) / trials > 0.6


@pytest.mark.parametrize("count", [3, 5, 10])
def test_noise_of_one_side_only_is_covered_somewhat_less_often(count: int) -> None:
    """As the docstring admits: this must not become worse unnoticed."""
    rng = random.Random(13)
    truth = math.exp(0.03)
    many = [[(math.exp(skewed(rng)), math.exp(rng.gauss(0, 0.002))) for _ in range(count)] for _ in range(600)]
    held = sum(r.interval.low <= truth <= r.interval.high for r in paired_ratios(many) if r.interval)
    assert 0.86 <= held / 600 <= 0.95


@pytest.mark.parametrize("count", [3, 5, 10])
def test_two_sessions_of_the_same_rarely_differ(count: int) -> None:
    rng = random.Random(12)
    trials = 120
    found = []
    for _ in range(trials):
        one, other = ([math.exp(normal(rng)) for _ in range(count)] for _ in range(2))
        found.append(differs(unpaired_ratio(one, other), NOISE_MARGIN))
    assert sum(direction is not None for direction in found) / trials <= 1 - LEVEL


def test_importing_it_waits_for_no_statistics_library() -> None:
    code = "import sys, bench.judge.comparison; print('scipy' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]
