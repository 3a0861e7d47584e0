"""Ranks over simulated figures: equal backends tie, different ones do not."""

from __future__ import annotations

import math
import random

import pytest

from bench.errors import UserError
from bench.judge.comparison import compare
from bench.judge.intervals import LEVEL, NOISE_MARGIN
from bench.judge.ranking import Ranking, rank_figure
from bench.record.schema import Record
from tests.record_factory import FIGURES, eight_backends, failed, record, step


def simulated(rng: random.Random, truths: dict[str, float], count: int, noise: float) -> dict[str, dict[int, float]]:
    return {
        label: {repeat: truth * math.exp(rng.gauss(0, noise)) for repeat in range(count)}
        for label, truth in truths.items()
    }


def ranked(truths: dict[str, float], *, count: int = 5, noise: float = 0.01, seed: int = 1) -> Ranking:
    return rank_figure(simulated(random.Random(seed), truths, count, noise), "a", "lowest", NOISE_MARGIN)


def in_words(ranking: Ranking) -> dict[str, str]:
    return {label: f"{one.rank}{'=' if one.tied else ''}" for label, one in ranking.standings.items()}


def test_clear_differences_are_ranked_and_the_first_is_marked() -> None:
    ranking = ranked({"a": 1.0, "b": 0.5, "c": 2.0})
    assert in_words(ranking) == {"a": "2", "b": "1", "c": "3"}
    assert ranking.best == ("b",)
    highest = rank_figure(
        simulated(random.Random(1), {"a": 1.0, "b": 0.5, "c": 2.0}, 5, 0.01), "a", "highest", NOISE_MARGIN
    )
    assert in_words(highest) == {"a": "2", "b": "3", "c": "1"}


def test_all_that_tie_for_the_first_place_are_marked() -> None:
    ranking = ranked({"a": 1.0, "b": 0.5, "c": 0.5, "d": 2.0})
    assert in_words(ranking) == {"a": "3", "b": "1=", "c": "1=", "d": "4"}
    assert ranking.best == ("b", "c")


def test_where_nobody_is_surely_better_nobody_is_marked() -> None:
    ranking = ranked({"a": 1.0, "b": 1.0, "c": 1.0})
    assert in_words(ranking) == {"a": "1=", "b": "1=", "c": "1="}
    assert ranking.best == ()


def test_two_ranks_may_share_a_neighbour_that_neither_can_be_told_from() -> None:
    values = {
        "a": {0: 1.0, 1: 1.0},
        "b": {0: 2.0, 1: 2.04},
        "c": {0: 2.01, 1: 2.16},
        "d": {0: 2.4, 1: 2.401},
    }
    ranking = rank_figure(values, "a", "lowest", 0.0)
    assert {label: one.rank for label, one in ranking.standings.items()}["a"] == 1
    assert ranking.standings["c"].tied


def test_within_the_margin_even_certain_differences_tie() -> None:
    values = {"a": {0: 1.0, 1: 1.0}, "b": {0: 1.009, 1: 1.009}}
    assert in_words(rank_figure(values, "a", "lowest", NOISE_MARGIN)) == {"a": "1=", "b": "1="}
    assert in_words(rank_figure(values, "a", "lowest", 0.0)) == {"a": "1", "b": "2"}


def test_one_repeat_ranks_nothing() -> None:
    ranking = rank_figure({"a": {0: 1.0}, "b": {0: 9.0}}, "a", "lowest", NOISE_MARGIN)
    assert ranking.best is None
    assert ranking.resolution is None
    assert all(one.rank is None for one in ranking.standings.values())
    assert ranking.standings["b"].ratio is not None
    assert ranking.standings["b"].ratio.estimate == pytest.approx(9)


def test_a_figure_without_a_better_end_has_ratios_and_no_rank() -> None:
    ranking = rank_figure({"a": {0: 1.0, 1: 1.1}, "b": {0: 9.0, 1: 9.2}}, "a", None, NOISE_MARGIN)
    assert ranking.standings["b"].rank is None
    assert ranking.standings["b"].ratio is not None
    assert ranking.standings["b"].ratio.interval is not None


def test_repeats_are_paired_by_their_number_and_not_by_their_place() -> None:
    # The machine becomes twice as slow each time, and b always takes twice as long.
    base = {repeat: 2.0**repeat for repeat in range(5)}
    values = {"a": base, "b": {repeat: 2 * base[repeat] for repeat in (4, 1, 3)}}
    ratio = rank_figure(values, "a", "lowest", NOISE_MARGIN).standings["b"].ratio
    assert ratio is not None
    assert ratio.pairs == 3
    assert ratio.interval is not None
    assert (ratio.estimate, ratio.interval.low, ratio.interval.high) == pytest.approx((2, 2, 2))


def test_who_shares_no_repeat_with_the_baseline_has_no_ratio() -> None:
    standing = rank_figure({"a": {0: 1.0}, "b": {1: 1.0}}, "a", "lowest", 0.0).standings["b"]
    assert (standing.ratio, standing.rank) == (None, None)


def test_a_value_that_is_not_finite_has_no_rank_and_stays_visible() -> None:
    values = {"a": {0: 1.0, 1: 1.1}, "b": {0: math.nan, 1: 1.0}, "c": {0: 5.0, 1: 5.1}}
    ranking = rank_figure(values, "a", "lowest", 0.0)
    assert ranking.standings["b"].ratio is not None
    assert math.isnan(ranking.standings["b"].ratio.estimate)
    assert [ranking.standings[label].rank for label in "abc"] == [1, None, 2]


@pytest.mark.parametrize("count", [3, 5, 10])
@pytest.mark.parametrize("labels", [2, 8])
def test_equal_backends_are_ranked_apart_no_more_often_than_it_says(count: int, labels: int) -> None:
    rng = random.Random(5)
    trials = 200
    truths = dict.fromkeys("abcdefgh"[:labels], 1.0)
    apart = 0
    for _ in range(trials):
        ranking = rank_figure(simulated(rng, truths, count, 0.03), "a", "lowest", NOISE_MARGIN)
        apart += any(one.rank != 1 for one in ranking.standings.values())
    # Binomial: more than this at a true rate of 5 % happens in fewer than 1 of 100 such simulations.
    assert apart / trials <= (1 - LEVEL) + 2.4 * math.sqrt(LEVEL * (1 - LEVEL) / trials)


def test_a_difference_twice_as_large_as_the_resolution_is_told() -> None:
    ranking = ranked(dict.fromkeys("abcd", 1.0))
    assert ranking.resolution is not None
    assert 1.01 < ranking.resolution < 1.2
    truths = {"a": 1.0, "b": ranking.resolution**2, "c": 1.0, "d": 1.0}
    assert ranked(truths, seed=2).standings["b"].rank != 1


# ---- in a comparison


def noisy(repeats: int, *, noise: float = 0.004, backends: tuple[str, ...] = tuple(FIGURES)) -> list[Record]:
    rng = random.Random(9)
    made = []
    for one in eight_backends(repeats=repeats):
        if one.request.backend in backends:
            factor = math.exp(rng.gauss(0, noise))
            slow = tuple(s.model_copy(update={"seconds": s.seconds * factor}) for s in one.steps)
            made.append(one.model_copy(update={"steps": slow}))
    return made


def test_the_baseline_is_the_unquantized_backend_wherever_it_stands() -> None:
    records = noisy(3, backends=("bnb-nf4", "bf16", "hqq"))
    group = compare(sorted(records, key=lambda one: one.request.backend, reverse=True)).groups[0]
    assert group.baseline == "bf16"
    standing = group.standing("step_seconds_median", "bnb-nf4")
    assert standing is not None
    assert standing.ratio is not None
    assert standing.ratio.estimate == pytest.approx(0.301 / 0.212, rel=0.01)
    assert compare(noisy(3, backends=("hqq", "gptq"))).groups[0].baseline == "hqq"


def test_another_baseline_may_be_named() -> None:
    group = compare(noisy(3), baseline="hqq").groups[0]
    assert group.baseline == "hqq"
    first = group.best["step_seconds_median"]
    assert first == compare(noisy(3)).groups[0].best["step_seconds_median"]


def test_a_baseline_that_is_not_there_is_refused_with_the_nearest() -> None:
    records = [*noisy(2, backends=("bf16", "bnb-nf4")), failed("hqq", "crashed", "load", "signal 9")]
    for wanted, words in (
        ("bnb-nf5", "unknown baseline 'bnb-nf5'; did you mean 'bnb-nf4'?"),
        ("hqq", "baseline 'hqq' has no completed run; completed: bf16, bnb-nf4"),
    ):
        with pytest.raises(UserError) as refused:
            compare(records, baseline=wanted)
        assert str(refused.value) == words


def test_counted_bits_are_ranked_without_a_margin_and_memory_with_one() -> None:
    group = compare(noisy(3), allow={"dtype"}).groups[0]
    bits = {label: one.rank for label, one in group.rankings["storage_bits_per_weight"].standings.items()}
    assert (bits["bnb-nf4-dq"], bits["gptq"], bits["awq"]) == (1, 2, 2)
    memory = group.rankings["peak_memory_bytes"].standings
    # 8.61 and 8.66 GiB, always: within 1 % of one another.
    assert memory["bnb-nf4"].rank == memory["hqq"].rank
    assert memory["bnb-nf4"].tied


def test_the_baseline_of_a_failed_repeat_leaves_the_others() -> None:
    records = [one for one in noisy(4) if (one.request.backend, one.request.repeat) != ("bf16", 2)]
    standing = compare(records).groups[0].standing("step_seconds_median", "hqq")
    assert standing is not None
    assert standing.ratio is not None
    assert standing.ratio.pairs == 3


def test_a_loss_of_nan_in_one_repeat_leaves_a_ratio_that_says_so() -> None:
    broken = record("hqq", repeat=1, steps=tuple(step(i, losses=(math.nan,)) for i in range(8)))
    records = [record("bf16"), record("bf16", repeat=1), record("hqq"), broken]
    standing = compare(records).groups[0].standing("last_loss", "hqq")
    assert standing is not None
    assert standing.ratio is not None
    assert math.isnan(standing.ratio.estimate)
    assert standing.ratio.interval is None
