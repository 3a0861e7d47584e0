"""What is called a regression: planted changes are found and named, and nothing else is."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from bench.errors import UserError
from bench.judge.regression_limits import load_limits
from bench.judge.stability import judge_stability
from bench.record.stability import WeightError
from tests.record_factory import (
    FIGURES,
    GIB,
    MIB,
    digest,
    eight_backends,
    failed,
    fidelity,
    overflowing,
    probed,
    quantization,
    record,
    step,
)
from tests.regression_factory import compared, each, failing, finding, inside, later, rounds, timed


def limits(tmp_path: Path, text: str):
    path = tmp_path / "limits.toml"
    path.write_text(text)
    return load_limits(path)


# ---- nothing planted ---------------------------------------------------------------------------------


def test_the_same_records_twice_are_not_worse_in_anything():
    made = eight_backends(repeats=3)
    found = compared(made, made)
    assert not found.failed
    assert not found.of("worse", "incomparable", "better", "changed")
    assert any("same harness with the same libraries" in note for note in found.notes)


def test_two_sessions_of_one_harness_tie_twenty_times_out_of_twenty():
    """Five rounds of a machine whose runs scatter by 3 %."""
    for session in range(20):
        base = rounds("hqq", seed=2 * session, scatter=0.03)
        new = rounds("hqq", seed=2 * session + 1, scatter=0.03)
        assert not failing(compared(base, new)), session


# ---- slower ------------------------------------------------------------------------------------------


def test_a_slower_backend_is_the_only_one_named_with_its_interval():
    base = [one for backend in FIGURES for one in rounds(backend, seed=1)]
    new = later(one for backend in FIGURES for one in rounds(backend, seed=2, times=1.2 if backend == "hqq" else 1.0))
    found = compared(base, new)
    assert failing(found) == {("hqq", "step time, median"), ("hqq", "throughput")}
    slower = finding(found, "step time, median", "hqq")
    assert slower.interval.low > 1.05 and slower.interval.low < 1.2 < slower.interval.high
    assert slower.factor == pytest.approx(1.2, rel=0.02)
    assert finding(found, "throughput", "hqq").factor == pytest.approx(1 / 1.2, rel=0.02)


@pytest.mark.parametrize("session", range(5))
def test_a_planted_delay_of_fifteen_percent_is_found_in_every_session(session):
    base, new = rounds(seed=2 * session, scatter=0.02), rounds(seed=2 * session + 1, scatter=0.02, times=1.15)
    assert ("hqq", "step time, median") in failing(compared(base, new))


def test_slower_by_less_than_is_allowed_is_unchanged():
    found = compared(rounds(seed=1, scatter=0.001), rounds(seed=2, scatter=0.001, times=1.03))
    assert finding(found, "step time, median").result == "same"
    assert not found.failed


def test_a_noisy_machine_cannot_tell_and_says_so():
    found = compared(rounds(seed=1, scatter=0.2), rounds(seed=2, scatter=0.2, times=1.1))
    told = finding(found, "step time, median")
    assert told.result == "untold"
    assert not found.failed


def test_faster_is_an_improvement_and_no_reason_to_fail():
    found = compared(rounds(seed=1), rounds(seed=2, times=0.8))
    assert finding(found, "step time, median").result == "better"
    assert not found.failed


@pytest.mark.parametrize(("times", "result"), [(1.3, "untold"), (1.6, "worse"), (0.6, "better"), (1.0, "untold")])
def test_one_run_a_side_has_no_interval_and_tells_great_changes_only(times, result):
    base, new = rounds(count=1, seed=1, scatter=0), rounds(count=1, seed=1, scatter=0, times=times)
    found = compared(base, new)
    told = finding(found, "step time, median")
    assert (told.result, told.interval) == (result, None)
    assert "one run" in told.note
    assert told.beyond is (times > 1.05)
    assert any("one run gives no interval" in note for note in found.notes)


def test_one_run_on_one_side_has_no_interval_either():
    found = compared(rounds(count=5), rounds(count=1, times=1.2))
    assert finding(found, "step time, median").interval is None
    assert finding(found, "step time, median").result == "untold"


def test_a_slower_load_from_the_cache_is_no_slower_load():
    base = each(rounds(), inside("load", from_cache=True, reload_seconds=2.0))
    new = each(rounds(), inside("load", from_cache=True, reload_seconds=3.0))
    found = compared(base, new)
    assert failing(found) == {("hqq", "load time from the cache")}


# ---- bigger ------------------------------------------------------------------------------------------


def reserved(one, device: str, extra: int):
    readings = tuple(
        reading.model_copy(update={"peak_reserved_bytes": reading.peak_reserved_bytes + extra})
        if reading.device == device else reading
        for reading in one.memory.readings
    )  # fmt: skip
    return {"memory": one.memory.model_copy(update={"readings": readings})}


def on_two_cards(one):
    second = tuple(reading.model_copy(update={"device": "cuda:1"}) for reading in one.memory.readings)
    return {"memory": one.memory.model_copy(update={"readings": (*one.memory.readings, *second)})}


def test_memory_is_held_against_its_limit_card_by_card():
    base = each(rounds(), on_two_cards)
    new = each(base, lambda one: reserved(one, "cuda:1", GIB // 2))
    assert failing(compared(base, new)) == {("hqq", "peak memory, cuda:1")}


def test_a_few_mebibytes_more_are_within_the_limit():
    base = rounds()
    new = each(base, lambda one: reserved(one, "cuda:0", 64 * MIB))
    found = compared(base, new)
    assert finding(found, "peak memory, cuda:0").result == "same"
    assert finding(found, "peak memory, cuda:0").factor > 1


def test_a_leak_shows_in_the_last_step_though_the_phases_were_read_early():
    def leaking(rate: int):
        return lambda one: {
            "steps": tuple(
                made.model_copy(update={"peak_reserved_bytes": 8 * GIB + rate * made.index}) for made in one.steps
            )
        }

    base, new = each(rounds(), leaking(0)), each(rounds(), leaking(64 * MIB))
    assert failing(compared(base, new)) == {("hqq", "memory in the last step")}


def test_resident_memory_is_another_quantity_with_another_limit():
    base = rounds(cpu=True)
    new = each(base, lambda one: {
        "memory": one.memory.model_copy(update={"readings": tuple(
            reading.model_copy(update={"peak_resident_bytes": int(reading.peak_resident_bytes * 1.03)})
            for reading in one.memory.readings
        )})
    })  # fmt: skip
    assert finding(compared(base, new), "peak memory, cpu").figure == "peak_resident_memory"
    assert not compared(base, new).failed


def test_a_counted_bit_more_needs_no_interval():
    base = rounds(count=1)
    new = each(base, lambda one: {"quantization": quantization("hqq", storage_bits_per_weight=4.51)})
    found = compared(base, new)
    assert failing(found) == {("hqq", "storage bits per weight")}


def test_tensor_bytes_are_named_by_kind_where_one_changed():
    base = rounds(count=1)
    half = base[0].memory.bytes_by_kind[0].optimizer_state // 2
    new = each(base, lambda one: {
        "memory": one.memory.model_copy(update={"bytes_by_kind": (
            one.memory.bytes_by_kind[0].model_copy(update={"optimizer_state": half, "lora": 90_000_000}),
        )})
    })  # fmt: skip
    found = compared(base, new)
    assert failing(found) == {("hqq", "tensor bytes, lora")}
    assert finding(found, "tensor bytes, optimizer state").result == "better"
    assert finding(compared(base, base), "tensor bytes").result == "same"


def test_bytes_where_there_were_none_are_infinitely_more():
    base = rounds("bf16", count=1)
    new = each(base, lambda one: {
        "memory": one.memory.model_copy(update={"bytes_by_kind": (
            one.memory.bytes_by_kind[0].model_copy(update={"quantization_metadata": 10}),
        )})
    })  # fmt: skip
    found = finding(compared(base, new), "tensor bytes, quantization metadata")
    assert (found.result, found.factor) == ("worse", math.inf)


# ---- less stable -------------------------------------------------------------------------------------


def test_a_healthy_run_that_overflows_is_a_regression_with_its_evidence():
    base = [probed(record("gptq", ask={"dtype": "float16"}, quantization=quantization(
        "gptq", requested_dtype="float16", effective_dtype="float16")))]  # fmt: skip
    assert judge_stability(base[0]).verdict == "healthy"
    found = compared(base, [overflowing("gptq")])
    told = finding(found, "stability")
    assert (told.result, told.base_words, told.new_words) == ("worse", "healthy", "poisoned")
    assert "held an infinity in the forward of step 5" in told.note
    assert "steps whose loss or gradient norm is not finite: 3 (of 8), allowed 0" in told.note


def test_what_heals_is_an_improvement():
    base = [overflowing("gptq")]
    new = [probed(record("gptq", ask={"dtype": "float16"}, quantization=quantization(
        "gptq", requested_dtype="float16", effective_dtype="float16")))]  # fmt: skip
    assert finding(compared(base, new), "stability").result == "better"


def test_synthetic_weights_leave_the_verdict_open_and_a_new_nan_is_told_all_the_same():
    def broken(one):
        return {"steps": (*one.steps[:5], step(5, losses=(math.nan,), gradient_norm=math.nan), *one.steps[6:])}

    base = rounds(count=3, weights="synthetic", scatter=0)
    new = each(base, broken)
    told = finding(compared(base, new), "stability")
    assert (told.base_words, told.new_words) == ("not judged (3 of 3 runs)",) * 2
    assert told.result == "worse"
    assert finding(compared(new, new), "stability").result == "same"


@pytest.mark.parametrize(("cosine", "result"), [(0.981, "same"), (0.975, "changed"), (0.96, "worse"), (0.995, "better")])
def test_the_gradients_cosine_may_fall_by_so_much(cosine, result):
    base = rounds(count=1, fidelity=fidelity(0.981))
    found = compared(base, rounds(count=1, fidelity=fidelity(cosine)))
    assert finding(found, "gradient cosine to the reference").result == result


def test_an_error_of_the_stored_weights_is_counted():
    def with_error(error: float):
        errors = (WeightError(projection="q_proj", relative_error=error, worst_module="a", worst_relative_error=error),)
        return rounds(count=1, fidelity=fidelity(weight_errors=errors))

    assert failing(compared(with_error(0.09), with_error(0.092))) == {("hqq", "error of the stored weights")}
    healed = finding(compared(with_error(math.nan), with_error(0.09)), "error of the stored weights")
    assert (healed.result, healed.note) == ("better", "it was not finite")
    assert failing(compared(with_error(0.09), with_error(math.nan))) == {("hqq", "error of the stored weights")}


def test_the_lowest_headroom_may_fall_by_one_bit():
    def hotter(times: float):
        def change(one):
            return {"steps": tuple(
                made.model_copy(update={"probe": made.probe.model_copy(update={
                    "activation_abs_max": tuple(value * times for value in made.probe.activation_abs_max)
                })})
                for made in one.steps
            )}  # fmt: skip
        return change

    base = [probed(one) for one in rounds(count=1)]
    assert failing(compared(base, each(base, hotter(4)))) == {("hqq", "lowest headroom")}
    assert not compared(base, each(base, hotter(1.5))).failed


# ---- the first loss ----------------------------------------------------------------------------------


def with_first_loss(one, change):
    first = one.steps[0]
    losses = tuple(change(loss) for loss in first.losses)
    return {"steps": (first.model_copy(update={"losses": losses}), *one.steps[1:])}


@pytest.mark.parametrize(
    ("times", "result"), [(1.0, "same"), (1 + 2**-40, "changed"), (1.002, "changed"), (1.02, "worse"), (0.98, "worse")]
)  # fmt: skip
def test_a_first_loss_that_moved_is_a_numeric_change_in_either_direction(times, result):
    base = rounds(count=2, scatter=0)
    new = each(base, lambda one: with_first_loss(one, lambda loss: loss * times))
    told = finding(compared(base, new), "first loss")
    assert told.result == result
    assert ("numeric change" in told.note) is (result != "same")
    assert (told.note == "equal to the bit") is (result == "same")


def test_a_first_loss_that_became_nan_is_a_regression_and_one_that_was_is_none():
    base = rounds(count=1)
    new = each(base, lambda one: with_first_loss(one, lambda _: math.nan))
    assert ("hqq", "first loss") in failing(compared(base, new))
    assert finding(compared(new, base), "first loss").result == "better"
    assert finding(compared(new, new), "first loss").result == "same"


@pytest.mark.parametrize("after", [3.4, math.nan])
def test_a_first_loss_that_healed_hides_no_regression_beside_it(after):
    base = rounds(count=2, scatter=0)
    new = [*each(base[:1], lambda one: with_first_loss(one, lambda _: 2.3)),
           *each(base[1:], lambda one: with_first_loss(one, lambda _: after))]  # fmt: skip
    base = [*each(base[:1], lambda one: with_first_loss(one, lambda _: math.nan)), base[1]]
    assert ("hqq", "first loss") in failing(compared(base, new))


def test_a_cosine_that_healed_hides_no_fall_beside_it():
    def cosines(*values: float):
        return [rounds(count=2, fidelity=fidelity(value))[repeat] for repeat, value in enumerate(values)]

    title = "gradient cosine to the reference"
    assert finding(compared(cosines(math.nan, 0.98), cosines(0.97, 0.9)), title).result == "worse"
    assert finding(compared(cosines(math.nan, 0.98), cosines(0.97, 0.98)), title).result == "better"
    assert finding(compared(cosines(0.98, 0.97), cosines(0.98, 0.999)), title).result == "better"


def test_kernels_that_do_not_repeat_themselves_are_no_numeric_change_of_the_program():
    def round_of(loss: float):
        return each(rounds(count=1), lambda one: with_first_loss(one, lambda _: loss))

    told = finding(compared([*round_of(2.0), *round_of(2.0001)], [*round_of(2.0002), *round_of(2.0)]), "first loss")
    assert told.result == "changed"
    assert "BASE's own runs on equal data are not equal to the bit either" in told.note


# ---- outcomes ----------------------------------------------------------------------------------------


def test_a_run_that_ran_out_of_memory_is_a_regression_with_its_reason():
    new = [failed("hqq", "out_of_memory", "train", "CUDA out of memory: 2 GiB asked for")]
    told = finding(compared([record("hqq")], new), "outcome")
    assert (told.result, told.base_words, told.new_words) == ("worse", "1 x completed", "1 x out of memory (train)")
    assert "2 GiB asked for" in told.note


def test_one_of_several_runs_that_failed_is_enough():
    base = rounds(count=3)
    new = [*rounds(count=2), failed("hqq", "crashed", "train", "signal 11", repeat=2)]
    assert failing(compared(base, new)) == {("hqq", "outcome")}


@pytest.mark.parametrize(
    ("base", "new", "result"),
    [
        ("out_of_memory", "completed", "better"),
        ("out_of_memory", "out_of_memory", "same"),
        ("out_of_memory", "crashed", "changed"),
        ("completed", "unavailable", "worse"),
        ("completed", "timeout", "worse"),
    ],
)
def test_how_a_run_ended_before_and_how_it_ends_now(base, new, result):
    def ended(status: str):
        return record("hqq") if status == "completed" else failed("hqq", status, "load", "why")

    others = [record("bf16")]
    assert finding(compared([ended(base), *others], [ended(new), *others]), "outcome", "hqq").result == result


def test_a_failure_that_base_shows_too_is_told_and_fails_nothing():
    """Two of five against one of five: so few cannot tell."""
    crash = failed("hqq", "crashed", "train", "signal 11")
    base, new = [*rounds(count=4), crash], [*rounds(count=3), crash, crash]
    told = finding(compared(base, new), "outcome")
    assert told.result == "changed"


def test_where_none_completes_any_more_it_is_a_regression_though_base_knew_the_failure():
    crashes = [failed("hqq", "crashed", "train", "signal 11", repeat=repeat) for repeat in range(5)]
    found = compared([*rounds(count=4), crashes[4]], crashes)
    assert failing(found) == {("hqq", "outcome")}
    assert "signal 11" in finding(found, "outcome").note


def test_interrupted_runs_say_nothing_and_are_counted():
    base = [*rounds(), failed("hqq", "interrupted", "train", "stopped")]
    found = compared(base, rounds())
    assert not found.failed
    assert any("BASE has 1 interrupted run" in note for note in found.notes)


# ---- only one side has it ----------------------------------------------------------------------------


def test_a_backend_that_is_gone_is_a_regression_and_one_that_came_is_not():
    found = compared([record("hqq"), record("awq")], [record("hqq"), record("eetq")])
    assert failing(found) == {("awq", "runs")}
    assert finding(found, "runs", "eetq").result == "changed"


def test_a_backend_that_never_completed_may_go():
    found = compared([record("hqq"), failed("awq", "crashed", "load", "x")], [record("hqq")])
    assert not found.failed


def test_a_gate_may_only_report(tmp_path):
    base, new = [record("hqq"), record("awq")], [failed("hqq", "crashed", "train", "x")]
    own = limits(tmp_path, '[gate]\nmissing = "report"\nfailures = "report"')
    found = compared(base, new, own)
    assert not found.failed
    assert {one.label for one in found.of("changed")} == {"hqq", "awq"}


# ---- like with like ----------------------------------------------------------------------------------


def test_what_differs_in_versions_and_commit_is_paired_and_named():
    base = rounds("bnb-nf4", environment_changes={"versions": {"torch": "2.13.0", "bitsandbytes": "0.50.2"}, "commit": "a" * 40},
                  ask={"versions": {"torch": "2.13.0"}})  # fmt: skip
    new = rounds("bnb-nf4", environment_changes={"versions": {"torch": "2.14.1", "bitsandbytes": "0.50.2"}, "commit": "b" * 40},
                 ask={"versions": {"torch": "2.14.1"}})  # fmt: skip
    assert base[0].key != new[0].key
    found = compared(base, new)
    assert {(one.name, one.base, one.new) for one in found.changes} == {
        ("torch", "2.13.0", "2.14.1"), ("harness commit", "a" * 12, "b" * 12)
    }  # fmt: skip
    assert finding(found, "step time, median").label == "bnb-nf4"


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (inside("workload", digest=digest("other text")), "token ids, labels and masks (digest)"),
        (inside("lora", initial_digest=digest("other adapters")), "initial LoRA values (digest)"),
        (inside("load", weights_digest=digest("other weights")), "unquantized weights (digest)"),
        (inside("workload", attention="eager"), "attention"),
        (inside("quantization", effective_dtype="float16"), "effective dtype"),
        (inside("environment", cpu_threads=4), "CPU threads"),
    ],
)
def test_runs_that_did_other_work_are_not_compared_and_what_differs_is_named(change, named):
    others = rounds("bf16", count=2)
    found = compared([*rounds(count=2), *others], [*each(rounds(count=2), change), *others])
    told = finding(found, "work")
    assert told.result == "incomparable"
    assert named in told.note
    assert found.failed
    assert not [one for one in found.findings if one.label == "hqq" and one.title == "step time, median"]


def test_where_nothing_did_the_same_work_the_first_difference_is_named():
    new = each(rounds(count=2), inside("environment", cpu_threads=4))
    with pytest.raises(UserError, match=r"no run of NEW did the same work .*CPU threads: 8 -> 4"):
        compared(rounds(count=2), new)


def test_where_nothing_was_asked_the_same_the_labels_are_named():
    with pytest.raises(UserError, match=r"no run of NEW was asked the same .*BASE: hqq; NEW: awq"):
        compared([record("hqq")], [record("awq")])


def test_another_dtype_is_another_question():
    found = compared(
        [record("hqq"), record("bf16")],
        [record("hqq", ask={"dtype": "float16"}), record("bf16")],
    )
    assert {one.label for one in found.findings} == {"hqq (dtype=bfloat16)", "hqq (dtype=float16)", "bf16"}
    assert failing(found) == {("hqq (dtype=bfloat16)", "runs")}


def test_a_difference_that_is_allowed_is_compared_and_stands_at_every_figure():
    new = each(rounds(), inside("environment", cpu_threads=4))
    found = compared(rounds(), new, allow={"device"})
    (label,) = {one.label for one in found.findings if one.title != "outcome"}
    assert label == "hqq [CPU threads: 8 -> 4]"
    assert ("CPU threads", "8", "4") in {(one.name, one.base, one.new) for one in found.changes}


def test_what_was_asked_differently_may_be_allowed_too():
    new = rounds(ask={"attention": "eager"})
    new = each(new, inside("workload", attention="eager"))
    with pytest.raises(UserError):
        compared(rounds(), new)
    found = compared(rounds(), new, allow={"attention"})
    assert finding(found, "step time, median").label == "hqq (attention=sdpa) [attention: sdpa -> eager]"


def test_two_environments_of_packages_are_compared_as_two_versions_are():
    found = compared(rounds(), rounds(ask={"environment": "legacy"}))
    assert not found.failed
    assert finding(found, "step time, median").label.endswith("[environment: current -> legacy]")
    # Where both sides have both, each is compared with itself.
    both = [*rounds(), *rounds(ask={"environment": "legacy"})]
    labels = {one.label for one in compared(both, both).findings if one.title == "step time, median"}
    assert labels == {"hqq (environment=current)", "hqq (environment=legacy)"}


def test_step_times_with_the_reading_of_the_probes_in_them_are_other_figures():
    def as_before(one):
        return {"steps": tuple(made.model_copy(update={"watching_seconds": None}) for made in one.steps)}

    new = each(rounds(), lambda one: {"steps": tuple(
        made.model_copy(update={"watching_seconds": 0.001}) for made in one.steps
    )})  # fmt: skip
    with pytest.raises(UserError, match="reading of the probes within the time of a step: yes -> no"):
        compared(each(new, as_before), new)


def test_runs_of_two_machines_in_one_folder_are_compared_machine_by_machine():
    """BASE is slow on the one and NEW holds both: nothing is averaged over two machines."""
    here, there = rounds(count=3, seed=1), each(rounds(count=3, seed=2, times=9), inside("environment", cpu_threads=4))
    found = compared([*here, *there], [*rounds(count=3, seed=3), *each(rounds(count=3, seed=4, times=9), inside("environment", cpu_threads=4))])
    assert not found.failed
    labels = {one.label for one in found.findings if one.title == "step time, median"}
    assert labels == {"hqq [CPU threads: 8]", "hqq [CPU threads: 4]"}


def test_a_machine_that_only_base_has_is_missing():
    there = each(rounds(count=3), inside("environment", cpu_threads=4))
    found = compared([*rounds(count=3), *there], rounds(count=3))
    assert failing(found) == {("hqq [CPU threads: 4]", "runs")}


def test_rounds_of_one_repeat_with_several_seeds_are_paired():
    def taking_turns(count: int):
        return [
            record("hqq", ask={"seed": seed}).model_copy(update={
                "workload": record("hqq", repeat=seed).workload, "lora": record("hqq", repeat=seed).lora
            })
            for seed in range(count)
        ]  # fmt: skip

    found = compared(taking_turns(5), taking_turns(3))
    assert not found.failed
    assert len(finding(found, "step time, median").base) == 5


def test_repeats_that_share_no_seed_are_unlike():
    with pytest.raises(UserError, match="no seed is shared: 0, 1 -> 2, 3"):
        compared(rounds(count=4)[:2], rounds(count=4)[2:])


def test_an_option_that_only_one_harness_knows_does_not_keep_runs_apart():
    new = rounds(ask={"options": {"group_size": 64, "axis": 1}})
    found = compared(rounds(), new)
    assert not found.failed
    assert ("option hqq.axis", "no such option", "1") in {(one.name, one.base, one.new) for one in found.changes}


def test_an_option_with_another_value_does():
    with pytest.raises(UserError, match=r"BASE: hqq \(group_size=64\); NEW: hqq \(group_size=32\)"):
        compared(rounds(count=1), rounds(count=1, ask={"options": {"group_size": 32}}))


def test_the_same_model_and_data_under_another_path_are_the_same():
    def at(folder: str):
        base = record("hqq")
        model = base.request.model.model_copy(update={"name": f"{folder}/model"})
        workload = base.request.workload.model_copy(update={"data": f"{folder}/text.jsonl"})
        ask = {"model": model, "workload": workload, "data_digest": digest("text")}
        return [record("hqq", ask=ask)]

    found = compared(at("/old"), at("/new"))
    assert not found.failed
    assert {one.label for one in found.findings} == {"hqq"}


def test_whether_gradients_were_compared_with_a_reference_is_no_part_of_the_question():
    base = rounds(fidelity=fidelity(), ask={"fidelity": True})
    found = compared(base, rounds(ask={"fidelity": False}))
    assert finding(found, "gradient cosine to the reference").note == "BASE recorded it and NEW did not"
    assert not found.failed


def test_a_figure_of_other_weights_is_not_said_to_be_missing():
    base = rounds(fidelity=fidelity())
    new = each(base, inside("load", weights_digest=digest("another dtype")))
    new = each(new, inside("quantization", effective_dtype="float16"))
    told = finding(compared(base, new, allow={"dtype"}), "gradient cosine to the reference")
    assert told.note == "no runs on equal data, adapters and weights"
    assert len(told.new) == len(told.base) == 5


# ---- what to keep in mind ----------------------------------------------------------------------------


def test_sessions_one_after_the_other_are_warned_of_and_turns_are_not():
    def at(records, times):
        return [one.model_copy(update={"started_at": f"2026-10-01T{time:02d}:00:00Z"}) for one, time in zip(records, times, strict=True)]

    apart = compared(at(rounds(count=3), (1, 2, 3)), later(at(rounds(count=3), (4, 5, 6))))
    turns = compared(at(rounds(count=3), (1, 3, 5)), later(at(rounds(count=3), (2, 4, 6))))
    assert any("drift" in note for note in apart.notes)
    assert not any("drift" in note for note in turns.notes)


def test_runs_of_two_commits_on_one_side_are_warned_of():
    found = compared([*rounds(count=2), *later(rounds(count=2))], rounds(count=2))
    assert any(note.startswith("BASE holds runs of several commits") for note in found.notes)


# ---- limits ------------------------------------------------------------------------------------------


def test_a_file_overrides_the_keys_that_it_names(tmp_path):
    own = limits(tmp_path, "step_seconds = 1.5\n[one_run]\nstep_seconds = 3\n")
    packaged = load_limits()
    assert (own.step_seconds, own.one_run.step_seconds) == (1.5, 3)
    assert own.tokens_per_second == packaged.tokens_per_second
    assert own.one_run.tokens_per_second == packaged.one_run.tokens_per_second
    found = compared(rounds(seed=1), rounds(seed=2, times=1.2), own)
    assert finding(found, "step time, median").result == "same"
    assert failing(found) == {("hqq", "throughput")}


def test_what_is_off_is_shown_and_not_judged(tmp_path):
    own = limits(tmp_path, 'step_seconds = "off"\ntokens_per_second = "off"\nstorage_bits = "off"')
    new = each(rounds(seed=2, times=2), lambda one: {"quantization": quantization("hqq", storage_bits_per_weight=5)})
    found = compared(rounds(seed=1), new, own)
    assert not found.failed
    assert finding(found, "step time, median").factor == pytest.approx(2, rel=0.05)
    assert finding(found, "storage bits per weight").result == "changed"


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("step_secnds = 1.1", "unknown key 'step_secnds'; did you mean 'step_seconds'?"),
        ("[one_run]\nload_second = 2", "did you mean 'load_seconds'?"),
        ("step_seconds = 0.9", "step_seconds: Input should be greater than or equal to 1 (got 0.9)"),
        ("step_seconds = nan", "step_seconds"),
        ("step_seconds = inf", "step_seconds"),
        ("step_seconds = true", 'a number is expected, or "off" (got True)'),
        ('step_seconds = "1.1"', 'a number is expected, or "off"'),
        ('headroom_drop_bits = -1', "headroom_drop_bits"),
        ('[gate]\nmissing = "fial"', "did you mean 'fail'?"),
        ("one_run = 3", "one_run: a table is expected"),
        ("step_seconds 1.1", "are not TOML"),
    ],
)
def test_a_bad_file_of_limits_is_refused_with_what_is_wrong(tmp_path, text, named):
    with pytest.raises(UserError) as refused:
        limits(tmp_path, text)
    assert named in str(refused.value)
    assert "limits.toml" in str(refused.value)


@pytest.mark.parametrize("make", [lambda path: None, lambda path: path.mkdir(), lambda path: path.write_bytes(b"\xff")])
def test_a_file_of_limits_that_cannot_be_read_is_named(tmp_path, make):
    make(tmp_path / "limits.toml")
    with pytest.raises(UserError, match=r"limits\.toml"):
        load_limits(tmp_path / "limits.toml")


def test_every_packaged_limit_stands_with_a_reason():
    from bench.judge.regression_limits import packaged_limits

    lines = packaged_limits().splitlines()
    keys = [place for place, line in enumerate(lines) if " = " in line and not line.startswith("#")]
    assert len(keys) == 22
    shared = {"tensor_bytes", "tokens_per_second"}
    for place in keys:
        key = lines[place].split(" = ")[0]
        assert lines[place - 1].startswith("# ") or key in shared, key


def test_timed_changes_the_steps_and_nothing_else():
    """The plant itself."""
    one = record("hqq")
    assert [made.seconds for made in timed(one, 2).steps] == [2 * made.seconds for made in one.steps]
    assert timed(one, 1.0) == one
