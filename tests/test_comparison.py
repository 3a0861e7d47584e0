import dataclasses
import math

import pytest

from bench.ask.experiment import Workload
from bench.judge.comparison import compare
from bench.judge.doubts import ONE_RUN, REPEATED, SOME_ONE_RUN
from bench.record.memory import BytesByKind, Memory, MemoryReading
from bench.record.schema import Record
from tests.record_factory import (
    AWQ_NOTE,
    FIGURES,
    digest,
    eight_backends,
    environment,
    failed,
    quantization,
    record,
    step,
    steps,
)


def row(made: Record):
    return compare([made]).rows[0]


def changed(made: Record, part: str, **changes):
    return made.model_copy(update={part: getattr(made, part).model_copy(update=changes)})


# ---- figures


def test_times_and_throughput_are_of_measured_steps_only():
    made = record(
        steps=(
            step(0, seconds=99.0),
            step(1, seconds=50.0),
            step(2, seconds=1.0, tokens=100),
            step(3, seconds=4.0, tokens=300),
            step(4, seconds=2.0, tokens=300),
        )
    )
    found = row(made)
    assert (found.step_seconds_median, found.step_seconds_min, found.step_seconds_max) == (2.0, 1.0, 4.0)
    assert found.tokens_per_second == pytest.approx(700 / 7)
    assert found.measured_steps == 3


def test_a_loss_is_the_mean_over_its_micro_batches():
    found = row(record(steps=(step(0, losses=(1.0, 3.0)), step(2, losses=(0.5, 0.7, 0.9)))))
    assert found.first_loss == 2.0
    assert found.last_loss == pytest.approx(0.7)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_is_never_dropped(bad):
    norms = [0.5, bad, 0.7, 0.6]
    made = record(steps=tuple(step(index + 2, gradient_norm=norm) for index, norm in enumerate(norms)))
    found = row(made)
    assert found.gradient_norm_max == pytest.approx(bad, nan_ok=True)
    assert found.non_finite_steps == 1
    if math.isnan(bad):
        assert math.isnan(found.gradient_norm_median)


def test_the_median_of_one_nan_among_many_is_nan_wherever_it_stands():
    for place in range(5):
        norms = [0.1, 0.2, 0.3, 0.4]
        norms.insert(place, math.nan)
        found = row(record(steps=tuple(step(i + 2, gradient_norm=norm) for i, norm in enumerate(norms))))
        assert math.isnan(found.gradient_norm_median)


def test_peak_memory_on_cards_is_reserved_by_device_and_of_the_training_phases():
    def reading(phase, device, peak):
        return MemoryReading(
            phase=phase,
            device=device,
            peak_reserved_bytes=peak,
            nvml_used_bytes=peak + 7,
            resident_bytes=10**15,
        )

    readings = (
        reading("loaded", "cuda:0", 9_000),
        reading("forward", "cuda:0", 100),
        reading("backward", "cuda:0", 300),
        reading("optimizer_step", "cuda:1", 250),
        MemoryReading(phase="backward", device="cpu", peak_resident_bytes=10**12),
    )
    found = row(record(memory=Memory(readings=readings)))
    assert [(p.device, p.measure, p.peak_bytes) for p in found.peak_by_device] == [
        ("cuda:0", "reserved", 300),
        ("cuda:1", "reserved", 250),
    ]
    assert found.peak_memory_bytes == 300
    assert found.peak_by_device[0].nvml_used_bytes == 307


def test_peak_memory_on_a_cpu_is_resident():
    found = row(record("hqq", cpu=True))
    assert found.peak_by_device[0].measure == "resident"
    assert found.peak_memory_bytes == int(FIGURES["hqq"][4] * 2**30)


def test_bytes_by_kind_are_summed_over_devices_and_unknown_where_one_does_not_tell():
    kind = {"quantized_weights": 5, "quantization_metadata": 1, "unquantized_weights": 2, "lora": 3}
    kinds = (
        BytesByKind(device="cuda:0", **kind, gradients=4),
        BytesByKind(device="cuda:1", **kind, gradients=None),
    )
    found = row(record(memory=Memory(bytes_by_kind=kinds)))
    assert found.tensor_bytes["quantized_weights"] == 10
    assert found.tensor_bytes["gradients"] is None


def test_what_a_failed_run_did_not_reach_is_none_and_never_zero():
    found = row(failed("hqq", "unavailable", "load", "hqq is not installed"))
    reached = {"record", "label", "name", "verdict", "words"}
    given = {
        item.name: getattr(found, item.name) for item in dataclasses.fields(found) if item.name not in reached
    }
    assert given.pop("measured_steps") == 0
    assert given.pop("peak_by_device") == ()
    assert set(given.pop("tensor_bytes").values()) == {None}
    assert set(given.values()) == {None}


# ---- alike or not


def test_a_dtype_that_was_honoured_differently_stands_in_a_group_of_its_own():
    comparison = compare(eight_backends())
    assert [[row.label for row in group.rows] for group in comparison.groups][1:] == [["awq"]]
    assert [(item.name, item.kind) for item in comparison.differences] == [("effective dtype", "breaking")]
    assert {value.text: value.names for value in comparison.differences[0].values}["float16"] == ("awq",)
    assert f"awq: {AWQ_NOTE}" in comparison.warnings


BREAKING = {
    "token ids, labels and masks (digest)": lambda r: changed(r, "workload", digest=digest("other")),
    "initial LoRA values (digest)": lambda r: changed(r, "lora", initial_digest=digest("other")),
    "LoRA shapes (digest)": lambda r: changed(r, "lora", shapes_digest=digest("other")),
    "unquantized weights (digest)": lambda r: changed(r, "load", weights_digest=digest("other")),
    "attention": lambda r: changed(r, "workload", attention="eager"),
    "device names": lambda r: changed(
        r, "environment", devices=(r.environment.devices[0].model_copy(update={"name": "NVIDIA L4"}),)
    ),
    "power limit of the cards (W)": lambda r: changed(
        r, "environment", devices=(r.environment.devices[0].model_copy(update={"power_limit_watts": 300.0}),)
    ),
    "driver of the cards": lambda r: changed(
        r, "environment", devices=(r.environment.devices[0].model_copy(update={"driver": "580.10"}),)
    ),
    "processor": lambda r: changed(r, "environment", cpu="Intel Xeon"),
    "CPU threads": lambda r: changed(r, "environment", cpu_threads=4),
    "allocator settings": lambda r: changed(
        r, "environment", allocator_settings="expandable_segments:True"
    ),
    "placement": lambda r: changed(r, "request", placement="split"),
    "optimizer.learning_rate": lambda r: changed(
        r, "request", optimizer=r.request.optimizer.model_copy(update={"learning_rate": 1e-3})
    ),
    "every operation watched (--trace)": lambda r: changed(r, "request", trace=True),
    "reading of the probes within the time of a step": lambda r: r.model_copy(
        update={"steps": tuple(step.model_copy(update={"watching_seconds": 0.03}) for step in r.steps)}
    ),
    "effective dtype": lambda r: changed(r, "quantization", effective_dtype="float16"),
    "torch version": lambda r: changed(r, "environment", versions=r.environment.versions | {"torch": "2.15"}),
    "qlora-bench version": lambda r: changed(
        r, "environment", versions=r.environment.versions | {"qlora-bench": "0.2"}
    ),
    "Python version": lambda r: changed(r, "environment", python="3.12.1"),
    "CUDA version": lambda r: changed(r, "environment", cuda="12.8"),
    "harness commit": lambda r: changed(r, "environment", commit="abc"),
    "workload.sequence_length": lambda r: changed(r, "request", workload=Workload(sequence_length=8)),
    "checkpointing": lambda r: changed(r, "request", checkpointing="none"),
    "seed": lambda r: changed(r, "request", seed=77),
    "weights": lambda r: changed(
        r, "request", model=r.request.model.model_copy(update={"weights": "synthetic"})
    ),
    "layers kept": lambda r: changed(r, "request", model=r.request.model.model_copy(update={"layers": 2})),
}


@pytest.mark.parametrize("name", BREAKING)
def test_a_breaking_difference_splits_the_rows_largest_group_first(name):
    records = [record(backend) for backend in FIGURES]
    records[4] = BREAKING[name](records[4])
    comparison = compare(records)
    assert name in [item.name for item in comparison.differences if item.kind == "breaking"]
    assert [len(group.rows) for group in comparison.groups] == [7, 1]
    assert comparison.groups[1].rows[0].label == "hqq"
    assert any("split into 2 groups" in warning for warning in comparison.warnings)
    # Alone in its group, hqq is the lowest of nothing.
    assert not any(comparison.groups[1].best.values())


DECLARED = {
    "uncommitted changes in the harness": lambda r: changed(r, "environment", dirty=True),
    "quantized model loaded from cache": lambda r: changed(r, "load", from_cache=True),
    "requested dtype": lambda r: changed(r, "request", dtype="float16"),
}


@pytest.mark.parametrize("name", DECLARED)
def test_a_declared_difference_is_said_and_splits_nothing(name):
    records = [record("bf16"), record("bnb-nf4"), DECLARED[name](record("hqq"))]
    comparison = compare(records)
    assert [item.name for item in comparison.differences] == [name]
    assert len(comparison.groups) == 1
    assert any(name in warning for warning in comparison.warnings)


def test_a_missing_digest_does_not_pass_for_an_equal_one():
    comparison = compare([record("bf16"), changed(record("hqq"), "workload", digest=None)])
    assert len(comparison.groups) == 2
    assert [value.text for value in comparison.differences[0].values].count("not recorded") == 1


def test_digests_of_placed_weights_are_compared_within_one_effective_dtype():
    awq = changed(record("awq", quantization=quantization("awq", effective_dtype="float16")), "load",
                  weights_digest=digest("rounded"))  # fmt: skip
    comparison = compare([record("bf16"), awq], {"dtype"})
    assert len(comparison.groups) == 1
    assert [item.name for item in comparison.differences] == ["effective dtype"]


def test_calibration_may_scale_what_is_left_unquantized():
    other = changed(record("awq"), "load", weights_digest=digest("scaled norms"))
    assert len(compare([record("bf16"), changed(other, "quantization", calibration=None)]).groups) == 2
    assert len(compare([record("bf16"), changed(other, "quantization", calibration="awq")]).groups) == 1


@pytest.mark.parametrize("calibration", ["rtn", "random"])
def test_a_checkpoint_made_of_another_draw_of_the_weights_is_another_model(calibration):
    other = changed(record("gptq"), "load", weights_digest=digest("drawn on a CPU, and the others on a card"))
    other = changed(other, "quantization", calibration=calibration)
    comparison = compare([record("bf16"), other])
    assert [item.name for item in comparison.differences] == ["unquantized weights (digest)"]


def test_failed_runs_are_rows_and_in_no_group():
    comparison = compare([record("bf16"), failed("hqq", "crashed", "load", "signal 9")])
    assert [found.label for found in comparison.rows] == ["bf16", "hqq"]
    assert [found.label for found in comparison.failures] == ["hqq"]
    assert sum(len(group.rows) for group in comparison.groups) == 1
    assert not comparison.differences


# ---- repeats and marks


def test_one_run_claims_no_rank():
    comparison = compare(eight_backends())
    assert comparison.caveat == ONE_RUN
    assert "interval" in comparison.caveat
    assert not any("winner" in text or "best" in text for text in (comparison.caveat, *comparison.warnings))
    best = comparison.groups[0].best
    assert best["tokens_per_second"] == ("bf16",)
    assert best["peak_memory_bytes"] == ("bnb-nf4-dq",)
    assert "last_loss" not in best


def test_repeats_give_the_median_and_the_range_over_runs():
    comparison = compare(eight_backends(repeats=3), {"dtype"})
    assert comparison.caveat == REPEATED
    assert len(comparison.groups) == 1
    assert [item.name for item in comparison.differences] == ["effective dtype"]
    summary = next(item for item in comparison.groups[0].summaries if item.label == "hqq")
    values = sorted(found.step_seconds_median for found in summary.rows)
    figure = summary.figures["step_seconds_median"]
    assert (figure.low, figure.median, figure.high, figure.runs) == (*values, 3)


def test_a_nan_in_one_repeat_stays_visible_in_the_summary():
    second = record("hqq", repeat=1, steps=tuple(step(i, losses=(math.nan,)) for i in range(8)))
    summary = compare([record("hqq"), second]).groups[0].summaries[0]
    assert math.isnan(summary.figures["last_loss"].median)
    assert math.isnan(summary.figures["last_loss"].high)
    assert summary.verdict.verdict == "non_finite"
    assert summary.verdict.reason.startswith("1 of 2 runs")


def test_uneven_repeats_are_said():
    comparison = compare([record("hqq"), record("hqq", repeat=1), record("bf16")])
    assert SOME_ONE_RUN in comparison.caveat


def test_runs_that_share_no_repeat_are_not_put_side_by_side():
    comparison = compare([record("hqq", repeat=0), record("bf16", repeat=1)])
    assert len(comparison.groups) == 2
    assert any("share no repeat" in warning for warning in comparison.warnings)


def test_a_backend_that_ran_in_all_repeats_joins_those_that_did_not():
    records = [record("bf16"), record("bnb-nf4", repeat=1), record("hqq"), record("hqq", repeat=1)]
    assert [len(group.rows) for group in compare(records).groups] == [4]


def test_one_repeat_with_other_work_keeps_all_repeats_of_its_backend_apart():
    odd = changed(record("hqq", repeat=1), "workload", digest=digest("other"))
    groups = compare([record("bf16"), record("bf16", repeat=1), record("hqq"), odd]).groups
    assert [[found.label for found in group.rows] for group in groups] == [["bf16"] * 2, ["hqq"] * 2]


@pytest.mark.parametrize(
    ("asks", "labels"),
    [
        (
            [{"options": {"group_size": 64}}, {"options": {"group_size": 128}}],
            ["hqq (group_size=64)", "hqq (group_size=128)"],
        ),
        ([{"dtype": "float16"}, {"dtype": "bfloat16"}], ["hqq (dtype=float16)", "hqq (dtype=bfloat16)"]),
        ([{"options": {"x": 1}}, {"options": {}}], ["hqq (x=1)", "hqq (x=unset)"]),
        ([{"seed": 1, "timeout_seconds": 1.0, "preset": "a"}, {}], ["hqq", "hqq"]),
        (
            [
                {"versions": {"hqq": "1"}, "dtype": "float16"},
                {"versions": {"hqq": "2"}, "dtype": "float16"},
                {"versions": {"hqq": "2"}},
            ],
            [
                "hqq (dtype=float16, hqq=1)",
                "hqq (dtype=float16, hqq=2)",
                "hqq (dtype=bfloat16, hqq=2)",
            ],
        ),
    ],
)
def test_requests_of_one_backend_are_told_apart_by_as_few_settings_as_do_it(asks, labels):
    comparison = compare([record("bf16"), *(record("hqq", ask=ask) for ask in asks)])
    assert [found.label for found in comparison.rows] == ["bf16", *labels]


def test_runs_of_two_requests_are_not_summarized_together():
    comparison = compare([record("hqq"), record("hqq", ask={"options": {"group_size": 128}})])
    assert len(comparison.groups[0].summaries) == 2


def test_repeats_are_named_where_there_are_several():
    comparison = compare([record("hqq"), record("hqq", repeat=1), record("bf16")])
    assert [found.name for found in comparison.rows] == ["hqq (repeat 0)", "hqq (repeat 1)", "bf16"]


@pytest.mark.parametrize(
    ("part", "changes", "name", "text"),
    [
        ("environment", {"versions": {}}, "torch version", "not recorded"),
        ("environment", {"versions": {"torch": None}}, "torch version", "not installed"),
        ("environment", {"commit": None}, "harness commit", "outside a checkout"),
        ("environment", {"dirty": True}, "uncommitted changes in the harness", "yes"),
        ("workload", {"digest": None}, "token ids, labels and masks (digest)", "not recorded"),
        ("request", {}, "layers kept", "all"),
    ],
)
def test_a_null_is_told_from_what_was_not_recorded(part, changes, name, text):
    found = {item.name: item for item in compare([changed(record(), part, **changes)]).conditions}
    assert [value.text for value in found[name].values] == [text]
    assert found[name].shown_identical == (text != "not recorded")


def test_two_equal_cards_are_counted_and_are_another_machine_than_one():
    one = record()
    two = changed(record("hqq"), "environment", devices=one.environment.devices * 2)
    (found,) = compare([one, two]).differences
    name = one.environment.devices[0].name
    assert [value.text for value in found.values] == [name, f"2 x {name}"]


def test_equal_values_have_no_lowest():
    comparison = compare([record("hqq"), record("bnb-nf4")])
    assert comparison.groups[0].best["storage_bits_per_weight"] == ()


def test_no_records_and_no_completed_records():
    assert compare([]).rows == ()
    assert "nothing to compare" in compare([failed("hqq", "error", "load", "x")]).caveat


# ---- warnings


@pytest.mark.parametrize(
    ("made", "words"),
    [
        (record("hqq", steps=steps("hqq")[:5]), "--steps 7"),
        (record("hqq", steps=(*steps("hqq")[:-1], step(7, seconds=9.0))), "Close other programs"),
        (record("hqq", environment=environment(dirty=True)), "Commit and run again"),
        (record("hqq", cpu=True), "Run the same command on the card"),
        (record("hqq", weights="synthetic"), "--weights real"),
        (record("hqq", quantization=quantization("hqq", notes=("group size 64 became 32",))), "became 32"),
        (record("hqq", steps=(*steps("hqq")[:-1], step(7, seconds=0.35, applied=False))), "skipped"),
        (
            record("hqq", steps=(*steps("hqq")[:-1], step(7, peak_reserved_bytes=2**50, seconds=0.35))),
            "higher",
        ),
    ],
)
def test_doubtful_figures_are_warned_about_with_what_to_do(made, words):
    assert any(words in warning for warning in compare([made]).warnings)


def test_what_the_load_left_is_no_later_step():
    first = step(0, peak_reserved_bytes=2**50, warmup=True)
    (warning,) = compare([record("hqq", steps=(first, *steps("hqq")[1:]))]).warnings
    assert warning.startswith("hqq: step 0 reserved")
    assert "the load may have left the rest" in warning


def test_a_clean_comparison_has_no_warnings():
    assert compare([record("bf16"), record("hqq")]).warnings == ()


# ---- published checkpoints


WIDTH = 18944


def of_width(made: Record, width: int = WIDTH, **architecture):
    """The run of a model with so many MLP channels."""
    model = made.request.model
    shape = {**model.architecture, "intermediate_size": width, **architecture}
    return changed(made, "request", model=model.model_copy(update={"architecture": shape}))


def published(made: Record, width: int, **architecture):
    """The run of a checkpoint that is published packed."""
    made = of_width(made, width, **architecture)
    model = made.request.model.model_copy(update={"fingerprint": "published"})
    made = changed(made, "request", model=model, calibration="published")
    return changed(made, "lora", shapes_digest="wider", initial_digest="wider")


def test_a_padded_checkpoint_stands_apart_and_it_is_said_why():
    padded = [published(record(name), WIDTH + 128) for name in ("awq", "gptq")]
    comparison = compare([of_width(record("bf16")), of_width(record("hqq")), *padded])
    assert [[s.label for s in group.summaries] for group in comparison.groups] == [
        ["bf16", "hqq"],
        ["awq", "gptq"],
    ]
    text = "\n".join(comparison.warnings)
    assert (
        f"awq, gptq: MLP layers and their adapters are {WIDTH + 128} channels wide instead of {WIDTH} "
        in text
    )
    assert "(bf16, hqq): the published checkpoint pads them" in text
    for name in ("model fingerprint", "LoRA shapes (digest)", "initial LoRA values (digest)"):
        assert name in text
    assert "or run all backends again with one command and --calibration rtn" in text


@pytest.mark.parametrize(
    ("width", "change"), [(WIDTH, {}), (WIDTH - 64, {}), (WIDTH + 128, {"hidden_size": 1})]
)
def test_no_padding_is_claimed_of_an_equal_a_narrower_or_another_shape(width, change):
    comparison = compare([of_width(record("bf16")), published(record("awq"), width, **change)])
    assert len(comparison.groups) == 2
    assert not any("pads them" in warning for warning in comparison.warnings)


def test_runs_that_differ_in_something_else_are_not_sent_to_another_calibration():
    comparison = compare([record("bf16"), changed(record("hqq"), "lora", shapes_digest="wider")])
    assert any("again with one command." in warning for warning in comparison.warnings)
