import contextlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import ValidationError

from bench.ask.experiment import SETTABLE, Experiment, build_experiment, parse_setting
from bench.errors import BadValue

BACKENDS = ("bf16", "bnb-nf4", "hqq")
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=12)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
)
KEYS = st.sampled_from([*Experiment.model_fields, "workloads", "seeds"])


def values(**changes):
    return {"preset": "tiny", "backends": ["bf16"], **changes}


def problem(**changes):
    with pytest.raises(BadValue) as caught:
        build_experiment(values(**changes))
    return str(caught.value)


def test_a_preset_and_a_backend_are_enough():
    made = build_experiment(values())
    assert (made.dtype, made.lora.rank, made.workload.steps) == ("bfloat16", 8, 8)


def test_all_problems_are_reported_at_once():
    text = problem(dtype="bfloat61", seed=-1, lora={"rank": 0}, workload={"steps": "many"})
    for name in ("dtype", "seed", "lora.rank", "workload.steps"):
        assert name in text


def test_a_wrong_choice_names_the_nearest_and_all_valid_ones():
    text = problem(dtype="bfloat61")
    assert "did you mean 'bfloat16'?" in text
    assert "valid: bfloat16, float16, float32" in text


def test_an_unknown_key_names_the_nearest_key():
    assert "unknown key 'repeat'; did you mean 'repeats'?" in problem(repeat=3)


def test_an_unknown_nested_key_names_the_nearest_key_of_its_group():
    text = problem(workload={"sequence_lenght": 8})
    assert "unknown key 'workload.sequence_lenght'; did you mean 'sequence_length'?" in text


def test_an_unknown_projection_names_the_nearest():
    assert "did you mean 'q_proj'?" in problem(lora={"target_modules": ["q_porj"]})


def test_no_projection_at_all_is_refused():
    assert "at least one projection" in problem(lora={"target_modules": []})


def test_a_run_must_have_a_measured_step():
    assert "warmup_steps (4) must be below steps (4)" in problem(workload={"steps": 4, "warmup_steps": 4})


def test_the_value_that_was_given_is_shown():
    assert "(got -3)" in problem(repeats=-3)


def test_a_very_long_value_is_shortened_in_the_message():
    assert len(problem(repeats="x" * 5000)) < 300


@pytest.mark.parametrize("number", [float("nan"), float("inf"), -float("inf")])
def test_settings_that_are_not_finite_are_refused(number):
    assert "optimizer.learning_rate" in problem(optimizer={"learning_rate": number})


def test_an_experiment_cannot_be_changed_afterwards():
    with pytest.raises(ValidationError):
        build_experiment(values()).seed = 3


@pytest.mark.parametrize(
    ("text", "path", "value"),
    [
        ("lora.rank=16", ("lora", "rank"), 16),
        ("optimizer.max_gradient_norm=null", ("optimizer", "max_gradient_norm"), None),
        ("attention=eager", ("attention",), "eager"),
        (" lora.alpha = 2.5 ", ("lora", "alpha"), 2.5),
        ('lora.target_modules=["q_proj"]', ("lora", "target_modules"), ["q_proj"]),
        ("hqq.group_size=128", ("options", "hqq", "group_size"), 128),
        ("bnb-nf4.double_quantization=true", ("options", "bnb-nf4", "double_quantization"), True),
        ("workload.data=a=b.jsonl", ("workload", "data"), "a=b.jsonl"),
    ],
)
def test_a_setting_is_split_into_its_path_and_its_value(text, path, value):
    assert parse_setting(text, BACKENDS) == (path, value)


@pytest.mark.parametrize("text", ["lora.rank", "", "=3", "   =3"])
def test_a_setting_without_key_or_value_is_refused(text):
    with pytest.raises(BadValue, match="KEY=VALUE"):
        parse_setting(text, BACKENDS)


def test_an_unknown_setting_names_the_nearest():
    with pytest.raises(BadValue, match=r"did you mean 'lora\.rank'"):
        parse_setting("lora.rnak=3", BACKENDS)


def test_a_backend_without_an_option_is_no_setting():
    with pytest.raises(BadValue, match="unknown key 'hqq'"):
        parse_setting("hqq=3", BACKENDS)


def test_every_settable_key_is_a_field_of_the_experiment():
    for key in SETTABLE:
        group, _, name = key.rpartition(".")
        model = Experiment.model_fields[group].annotation if group else Experiment
        assert name in model.model_fields


@given(
    st.text(max_size=40) | st.builds("{}={}".format, st.sampled_from(sorted(SETTABLE)), st.text(max_size=30))
)
def test_any_text_is_a_setting_or_a_bad_value(text):
    try:
        path, _ = parse_setting(text, BACKENDS)
    except BadValue:
        return
    assert path[0] in Experiment.model_fields


def test_a_deeply_nested_value_is_a_setting_or_a_bad_value():
    with contextlib.suppress(BadValue):
        parse_setting("lora.rank=" + "[" * 100_000, BACKENDS)


@given(st.dictionaries(KEYS | st.text(max_size=10), VALUES, max_size=4))
def test_any_values_make_an_experiment_or_a_bad_value(changes):
    try:
        made = build_experiment(values(**changes))
    except BadValue as error:
        assert "\n" not in str(error)
        return
    assert isinstance(made, Experiment)


@given(st.sampled_from(sorted(SETTABLE)), st.text(max_size=20) | VALUES.map(json.dumps))
def test_any_setting_makes_an_experiment_or_a_bad_value(key, text):
    with contextlib.suppress(BadValue):
        (*groups, last), value = parse_setting(f"{key}={text}", BACKENDS)
        build_experiment(values(**({groups[0]: {last: value}} if groups else {last: value})))
