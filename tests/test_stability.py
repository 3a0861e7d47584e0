import math

import pytest

from bench.judge.stability import SYNTHETIC, judge_stability
from tests.record_factory import failed, record, step, steps


def with_step(index, **changes):
    found = list(steps("hqq"))
    found[index] = step(index, **changes)
    return tuple(found)


def test_a_run_of_finite_values_is_healthy_and_the_reason_has_its_norms():
    verdict = judge_stability(record("hqq"))
    assert verdict.verdict == "healthy"
    assert "8 steps are finite" in verdict.reason


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"losses": (1.0, math.nan)}, "the loss is NaN at step 5"),
        ({"losses": (math.inf,)}, "the loss is Infinity at step 5"),
        ({"gradient_norm": -math.inf}, "the gradient norm is -Infinity at step 5"),
        ({"losses": (math.nan,), "gradient_norm": math.inf}, "the loss is NaN at step 5"),
        ({"gradient_norm": math.inf, "applied": False}, "whose update the loss scaler skipped"),
    ],
)
def test_any_value_that_is_not_finite_is_named_with_its_step(changes, words):
    verdict = judge_stability(record("hqq", steps=with_step(5, **changes)))
    assert verdict.verdict == "non_finite"
    assert words in verdict.reason
    assert "1 of 8 steps" in verdict.reason


def test_a_warmup_step_that_is_not_finite_counts_and_the_first_one_is_named():
    found = list(with_step(6, losses=(math.nan,)))
    found[0] = step(0, losses=(math.nan,))
    verdict = judge_stability(record("hqq", steps=tuple(found)))
    assert verdict.verdict == "non_finite"
    assert "at step 0" in verdict.reason


def test_trained_weights_that_are_not_finite_outrank_everything():
    verdict = judge_stability(
        record("hqq", trainable_weights_finite=False, steps=with_step(3, losses=(math.nan,)))
    )
    assert verdict.verdict == "poisoned"
    assert "step 3" in verdict.reason


def test_gradients_of_exactly_zero_in_every_measured_step_are_dead():
    still = tuple(step(index, gradient_norm=0.0) for index in range(2, 8))
    alive = steps("hqq")[:2]
    assert judge_stability(record("hqq", steps=alive + still)).verdict == "dead"
    assert judge_stability(record("hqq", steps=with_step(4, gradient_norm=0.0))).verdict == "healthy"
    tiny = tuple(step(index, gradient_norm=1e-30) for index in range(8))
    assert judge_stability(record("hqq", steps=tiny)).verdict == "healthy"


def test_one_measured_step_is_not_enough():
    verdict = judge_stability(record("hqq", steps=steps("hqq")[:3]))
    assert verdict.verdict == "not_judged"
    assert "1 measured step" in verdict.reason


def test_synthetic_weights_are_not_judged_but_what_went_wrong_is_told():
    assert judge_stability(record("hqq", weights="synthetic")).reason == SYNTHETIC
    verdict = judge_stability(record("hqq", weights="synthetic", steps=with_step(4, losses=(math.nan,))))
    assert verdict.verdict == "not_judged"
    assert verdict.reason.startswith(SYNTHETIC)
    assert "NaN at step 4" in verdict.reason


def test_a_run_that_did_not_complete_is_judged_only_on_what_is_not_finite():
    finite = failed("hqq", "crashed", "train", "signal 9", steps=steps("hqq")[:4])
    assert judge_stability(finite).verdict == "not_judged"
    assert "did not complete" in judge_stability(finite).reason
    broken = failed("hqq", "crashed", "train", "signal 9", steps=with_step(3, losses=(math.nan,)))
    assert judge_stability(broken).verdict == "non_finite"
    assert judge_stability(failed("hqq", "unavailable", "load", "missing")).verdict == "not_judged"


def test_weights_that_were_not_checked_are_not_called_finite():
    assert "not checked" in judge_stability(record("hqq", trainable_weights_finite=None)).reason
