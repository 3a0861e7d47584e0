import math

import pytest

from bench.judge.stability import BAD, GRAVITY, SYNTHETIC, judge_stability
from bench.record.schema import Proof
from tests.record_factory import (
    FAILING_MODULE,
    LAYERS,
    TENSORS,
    failed,
    first_failure,
    overflowing,
    probe,
    probed,
    quantization,
    record,
    replay,
    request,
    step,
    steps,
)


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
        ({"losses": (math.nan,), "applied": False}, "whose update the loss scaler skipped"),
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


# ---- where it failed


def test_the_first_failure_is_told_with_step_phase_module_and_kind():
    reason = judge_stability(overflowing(trainable_weights_finite=True)).reason
    for word in ("step 5", "forward", FAILING_MODULE, "overflow", "micro-batch 0", "65504"):
        assert word in reason
    assert "in the replay it arose in aten.mm (a matrix product)" in reason
    assert "; healed by bfloat16" in reason
    assert "not healed by adapters in float32" in reason
    # What could not be tried neither heals nor does not.
    assert "attention" not in reason


def test_an_operation_that_the_evidence_names_already_is_not_named_again():
    found = first_failure()
    told = found.model_copy(
        update={"evidence": f"{found.evidence}; replayed: a matrix product made an infinity"}
    )
    reason = judge_stability(overflowing(first_failure=told)).reason
    assert reason.count("a matrix product") == 1
    assert "; healed by bfloat16" in reason


def test_what_the_evidence_does_not_name_is_named_beside_it():
    made = overflowing(first_failure=first_failure(evidence="something broke"), replay=None)
    assert (
        f"(step 5, the forward, micro-batch 0, {FAILING_MODULE}): something broke"
        in judge_stability(made).reason
    )


def test_a_replay_that_shows_nothing_says_so():
    made = overflowing(replay=replay(reproduced=False, remedies=()))
    assert "did not show it again" in judge_stability(made).reason
    made = overflowing(replay=replay(reproduced=False, error="ValueError: x", remedies=()))
    assert "the replay failed (ValueError: x)" in judge_stability(made).reason


def test_a_value_inside_that_is_not_finite_is_no_health_though_loss_and_norm_are():
    hidden = record("hqq", first_failure=first_failure(loss=1.7))
    verdict = judge_stability(hidden)
    assert verdict.verdict == "non_finite"
    assert "inside the model" in verdict.reason


def test_broken_frozen_weights_are_no_health_though_loss_and_norm_are_finite():
    proof = Proof(weights_finite=False, non_finite_weights=("model.norm weight: 2 values",))
    verdict = judge_stability(record("hqq", proof=proof))
    assert verdict.verdict == "non_finite"
    assert "model.norm weight: 2 values" in verdict.reason


def test_an_id_outside_the_vocabulary_is_told_and_is_no_number_that_is_not_finite():
    bad = first_failure(kind="bad_batch", value=None, evidence="token id 99 is outside the vocabulary")
    verdict = judge_stability(failed("hqq", "error", "train", "x", first_failure=bad))
    assert verdict.verdict == "not_judged"
    assert "token id 99" in verdict.reason


# ---- the float16 scaler


def scaled(*applied):
    """Steps of a float16 run; one whose update was skipped has a norm that is not finite."""
    made = steps("hqq", count=len(applied))
    return tuple(
        found.model_copy(update={"loss_scale": 65536.0}
                         | ({} if done else {"applied": False, "gradient_norm": math.inf}))
        for found, done in zip(made, applied, strict=True)
    )  # fmt: skip


@pytest.mark.parametrize(
    "applied",
    [
        (1, 1, 1, 1, 1, 1, 1, 1),
        (0, 0, 1, 1, 1, 1, 1, 1),
        (0, 0, 0, 0, 1, 1, 1, 1),
        (1, 1, 1, 1, 1, 0, 1, 1),
        (0, 0, 1, 0, 1, 1, 0, 1),
    ],
)
def test_a_scaler_at_work_is_healthy_and_its_skips_are_counted(applied):
    verdict = judge_stability(record("hqq", steps=scaled(*applied)))
    assert verdict.verdict == "healthy"
    assert (f"skipped {applied.count(0)} of 8 updates" in verdict.reason) == (0 in applied)
    assert "inf" not in verdict.reason.lower().replace("infinity", "")


@pytest.mark.parametrize(
    ("applied", "words"),
    [
        ((0,) * 8, "nothing was trained"),
        ((1, 1, 0, 0, 0, 1, 1, 1), "3 of 6 measured updates, more than 33%"),
        ((1, 1, 1, 1, 1, 0, 0, 0), "3 of 6 measured updates, more than 33%"),
        ((1,) * 60 + (0,) * 17, "skipped the last 17 updates: lowering the scale to 1 did not help"),
    ],
)
def test_a_scaler_that_never_gets_there_is_not_healthy(applied, words):
    made = steps("hqq", count=8)
    many = tuple(
        made[index % 8].model_copy(update={"index": index, "warmup": index < 2})
        for index in range(len(applied))
    )
    found = tuple(
        one.model_copy(
            update={"loss_scale": 65536.0} | ({} if done else {"applied": False, "gradient_norm": math.inf})
        )
        for one, done in zip(many, applied, strict=True)
    )
    verdict = judge_stability(record("hqq", steps=found))
    assert verdict.verdict == "non_finite"
    assert words in verdict.reason
    assert any(item.exceeded for item in verdict.evidence)


@pytest.mark.parametrize(
    ("applied", "words"),
    [
        ((1, 1, 1, 1, 1, 1, 1, 0), "skipped the last update"),
        ((1, 1, 1, 1, 1, 1, 0, 0), "skipped the last 2 updates"),
    ],
)
def test_a_run_that_ends_while_the_scaler_searches_is_neither_failed_nor_healthy(applied, words):
    verdict = judge_stability(record("hqq", steps=scaled(*applied)))
    assert verdict.verdict == "not_judged"
    assert words in verdict.reason


def test_a_cut_model_is_not_called_spiking_but_what_failed_in_it_is():
    """The losses of a model without its last layers jump by themselves."""
    real = request("hqq").model
    cut = {"ask": {"model": real.model_copy(update={"layers": 6})}}
    jump = [step(index, losses=(2.0 if index < 6 else 40.0,)) for index in range(8)]
    assert judge_stability(record("hqq", steps=tuple(jump))).verdict == "spiking"
    verdict = judge_stability(record("hqq", steps=tuple(jump), **cut))
    assert verdict.verdict == "not_judged"
    assert "the loss rose" in verdict.reason
    bad = [step(index, losses=(math.nan,), gradient_norm=math.nan) for index in range(8)]
    assert judge_stability(record("hqq", steps=tuple(bad), **cut)).verdict == "non_finite"


def test_a_loss_that_is_not_finite_is_no_work_of_the_scaler():
    found = list(scaled(1, 1, 1, 1, 1, 1, 1, 1))
    found[3] = step(3, losses=(math.nan,), gradient_norm=math.nan, applied=False, loss_scale=65536.0)
    assert judge_stability(record("hqq", steps=tuple(found))).verdict == "non_finite"


def test_a_norm_that_is_not_finite_without_a_scaler_is_a_failure():
    assert judge_stability(record("hqq", steps=with_step(5, gradient_norm=math.inf))).verdict == "non_finite"


def test_a_failure_that_the_scaler_spared_is_its_work():
    spared = first_failure(
        kind="backward_overflow", phase="backward", step=0, skipped_by_scaler=True, loss=1.9
    )
    made = record("hqq", steps=scaled(0, 1, 1, 1, 1, 1, 1, 1), first_failure=spared)
    assert judge_stability(made).verdict == "healthy"


# ---- dead


def with_tensors(**of_tensors):
    """A probe in every step, in which a tensor named by its place has the norm that is given there."""

    def seen(index):
        norms, zeros = list(probe(index).tensor_norms), list(probe(index).zero_values)
        for name, norm in of_tensors.items():
            place = int(name.removeprefix("t"))
            norms[place], zeros[place] = norm, 4096 if norm == 0 else 0
        return probe(index, tensor_norms=tuple(norms), zero_values=tuple(zeros))

    return probed(record("hqq"), **{f"step_{index}": seen(index) for index in range(8)})


def test_a_zero_gradient_of_a_while_b_is_zero_is_no_alarm():
    made = probed(record("hqq"))
    assert 0.0 in made.steps[0].probe.tensor_norms
    assert judge_stability(made).verdict == "healthy"
    # Without warm-up the step in which B is still zero is a measured one.
    at_once = tuple(found.model_copy(update={"warmup": False}) for found in made.steps)
    assert judge_stability(made.model_copy(update={"steps": at_once})).verdict == "healthy"


@pytest.mark.parametrize("place", [0, 1])
def test_a_tensor_whose_gradient_stays_zero_is_dead_and_named(place):
    verdict = judge_stability(with_tensors(**{f"t{place}": 0.0}))
    assert verdict.verdict == "dead"
    assert TENSORS[place] in verdict.reason
    assert "1 LoRA tensor" in verdict.reason


def test_many_dead_tensors_are_counted_and_the_first_few_named():
    verdict = judge_stability(with_tensors(t1=0.0, t3=0.0, t5=0.0, t7=0.0, t9=0.0))
    assert "5 LoRA tensor" in verdict.reason
    assert "and 2 more" in verdict.reason


def test_a_of_a_dead_b_is_not_counted_for_b_never_left_zero():
    verdict = judge_stability(with_tensors(t0=0.0, t1=0.0))
    assert "1 LoRA tensor" in verdict.reason
    assert TENSORS[1] in verdict.reason


def test_a_is_not_dead_while_no_update_was_applied_to_b():
    made = with_tensors(t0=0.0)
    skipped = tuple(s.model_copy(update={"applied": s.index > 6}) for s in made.steps)
    assert judge_stability(made.model_copy(update={"steps": skipped})).verdict != "dead"


def test_a_norm_that_only_underflowed_is_not_dead():
    made = with_tensors(t1=0.0)
    alive = tuple(
        s.model_copy(update={"probe": s.probe.model_copy(update={"zero_values": (0,) * len(TENSORS)})})
        for s in made.steps
    )
    assert judge_stability(made.model_copy(update={"steps": alive})).verdict == "healthy"


def test_one_step_of_life_is_life():
    made = with_tensors(t1=0.0)
    revived = (*made.steps[:7], made.steps[7].model_copy(update={"probe": probe(7)}))
    assert judge_stability(made.model_copy(update={"steps": revived})).verdict == "healthy"


@pytest.mark.parametrize("status", ["completed", "error"])
def test_adapters_that_the_first_backward_did_not_reach_are_dead_however_the_run_ended(status):
    breaches = (
        "layer x holds 3 bits",
        f"no gradient reached {TENSORS[1]}",
        f"no gradient reached {TENSORS[3]}",
    )
    proof = Proof(gradients_reach_adapters=False, breaches=breaches)
    verdict = judge_stability(record("hqq", status=status, proof=proof, steps=()))
    assert verdict.verdict == "dead"
    assert f"no gradient reached {TENSORS[1]} (and 1 more)" in verdict.reason


# ---- spiking


def test_a_norm_that_jumps_twentyfold_is_spiking_and_named():
    norms = [0.81, 0.66, 1.02, 0.79, 0.74, 16.0, 0.62, 0.7]
    made = record("hqq", steps=tuple(step(i, gradient_norm=norm) for i, norm in enumerate(norms)))
    verdict = judge_stability(made)
    assert verdict.verdict == "spiking"
    assert "jumped to 16 at step 5, 19.9 times the mean" in verdict.reason
    assert [item.measure.short for item in verdict.evidence if item.exceeded] == [
        "norm over mean before",
        "robust z",
    ]


def test_a_loss_that_runs_away_is_spiking():
    # SmolLM2-135M with a learning rate of 0.03 instead of 2e-4, as measured.
    losses = [1.892, 2.248, 7.607, 18.427, 11.656, 17.717, 36.277, 17.568]
    made = record(
        "hqq", steps=tuple(step(i, losses=(loss,), loss_tokens=55) for i, loss in enumerate(losses))
    )
    verdict = judge_stability(made)
    assert verdict.verdict == "spiking"
    assert "the loss rose from" in verdict.reason


def test_gradients_that_double_in_every_layer_are_spiking():
    growing = tuple(1e-3 * 2.1 ** (LAYERS - layer) for layer in range(LAYERS))
    verdict = judge_stability(probed(record("hqq"), step_4=probe(4, gradient_abs_max=growing)))
    assert verdict.verdict == "spiking"
    assert "gradients grow by a factor of 2.0" in verdict.reason
    assert "at step 4" in verdict.reason


# ---- evidence


def test_every_measure_stands_beside_its_threshold_and_source():
    verdict = judge_stability(probed(record("hqq")))
    assert verdict.verdict == "healthy"
    assert len(verdict.evidence) >= 8
    for item in verdict.evidence:
        assert all((item.measure.short, item.measure.name, item.measure.meaning, item.measure.source))
        assert not item.exceeded
        assert item.value is not None and item.value <= item.limit


@pytest.mark.parametrize(
    "made",
    [
        overflowing(),
        record("hqq", steps=scaled(*(0,) * 8)),
        record("hqq", proof=Proof(weights_finite=False)),
        record("hqq", proof=Proof(gradients_reach_adapters=False)),
        record("hqq", steps=tuple(step(index, gradient_norm=0.0) for index in range(8))),
        with_tensors(t1=0.0),
        record("hqq", steps=with_step(5, gradient_norm=30.0)),
        probed(record("hqq", first_failure=first_failure(loss=1.7))),
    ],
)
def test_a_bad_verdict_has_a_measure_beyond_its_threshold(made):
    verdict = judge_stability(made)
    assert verdict.verdict in BAD
    assert any(item.exceeded for item in verdict.evidence)


def test_records_from_before_the_probes_are_judged_as_they_were():
    verdict = judge_stability(record("hqq"))
    assert verdict.verdict == "healthy"
    assert not any(
        "growth" in item.measure.name or "tensors" in item.measure.name for item in verdict.evidence
    )


def test_the_gravest_fault_gives_the_word():
    everything = overflowing(proof=Proof(gradients_reach_adapters=False))
    assert judge_stability(everything).verdict == "poisoned"
    assert list(GRAVITY) == ["poisoned", "non_finite", "dead", "spiking", "not_judged", "healthy"]


def test_synthetic_weights_carry_their_evidence_too():
    made = overflowing(weights="synthetic")
    verdict = judge_stability(made)
    assert verdict.verdict == "not_judged"
    assert FAILING_MODULE in verdict.reason
    assert any(item.exceeded for item in verdict.evidence)


def test_bfloat16_headroom_lets_activations_grow_where_float16_does_not():
    steep = tuple(1e-1 * 1e5 ** (layer / (LAYERS - 1)) * (1 + 9 * layer) for layer in range(LAYERS))
    steep = tuple(value * 30 ** (layer / LAYERS * 2) for layer, value in enumerate(steep))
    made = probed(record("hqq"), step_4=probe(4, activation_abs_max=steep))
    assert judge_stability(made).verdict == "healthy"
    narrow = made.model_copy(update={"quantization": quantization("hqq", effective_dtype="float16")})
    assert judge_stability(narrow).verdict == "spiking"


def test_a_gradient_that_dies_on_the_way_is_dead() -> None:
    still = [step(index) if index < 4 else step(index, gradient_norm=0.0) for index in range(8)]
    verdict = judge_stability(record("hqq", steps=tuple(still)))
    assert verdict.verdict == "dead"
    assert "in the last 4 steps, from step 4 on" in verdict.reason
    once = [step(index, gradient_norm=0.0) if index == 7 else step(index) for index in range(8)]
    assert judge_stability(record("hqq", steps=tuple(once))).verdict != "dead"
