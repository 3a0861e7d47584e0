import math

import pytest

from bench.judge.comparison import compare
from bench.judge.depth import find_growth
from bench.judge.headroom import LARGEST, find_headroom, headroom_bits
from tests.record_factory import LAYERS, fidelity, overflowing, probe, probed, quantization, record, steps


def in_dtype(dtype, **of_steps):
    return probed(record("hqq", quantization=quantization("hqq", effective_dtype=dtype)), **of_steps)


def test_headroom_is_the_doublings_left_to_the_largest_number():
    assert headroom_bits(65504.0, "float16") == 0
    assert headroom_bits(22522.0, "float16") == pytest.approx(1.5403, abs=1e-4)
    assert headroom_bits(1.0, "bfloat16") == pytest.approx(128, abs=0.01)
    assert headroom_bits(141_358.0, "float16") == pytest.approx(-1.1097, abs=1e-4)
    assert headroom_bits(5e-324, "float32") == pytest.approx(1202, abs=0.01)


@pytest.mark.parametrize("value", [None, 0.0, math.nan, math.inf])
def test_what_is_no_size_has_no_headroom(value):
    assert headroom_bits(value, "float16") is None


def test_the_largest_numbers_are_those_of_torch():
    torch = pytest.importorskip("torch")
    for name, largest in LARGEST.items():
        assert torch.finfo(getattr(torch, name)).max == largest


def test_the_grid_has_a_row_for_each_step_and_a_cell_for_each_layer():
    made = in_dtype("float16", step_3=probe(3, activation_abs_max=(32752.0,) * LAYERS))
    found = find_headroom(made)
    assert (found.dtype, found.steps, found.layers) == ("float16", tuple(range(8)), LAYERS)
    assert [len(row) for row in found.forward] == [LAYERS] * 8
    assert found.forward[3][7].bits == 1
    assert found.backward[0][0].bits == pytest.approx(math.log2(65504 / probe(0).gradient_abs_max[0]))


def test_the_lowest_cell_is_named_with_its_place():
    gradients = list(probe(6).gradient_abs_max)
    gradients[4] = 60000.0
    found = find_headroom(in_dtype("float16", step_6=probe(6, gradient_abs_max=tuple(gradients))))
    lowest = found.lowest
    assert (lowest.direction, lowest.layer, lowest.step) == ("backward", 4, 6)
    assert lowest.cell.bits == pytest.approx(math.log2(65504 / 60000))
    assert found.non_finite == ()


def test_what_is_not_finite_is_flagged_and_never_averaged_away():
    found = find_headroom(overflowing())
    assert [(place.direction, place.layer, place.step) for place in found.non_finite[:1]] == [
        ("forward", 10, 5)
    ]
    assert len(found.non_finite) == 3 * (LAYERS - 10) + 3 * LAYERS
    assert found.forward[5][10].bits is None
    assert found.forward[5][10].non_finite
    assert found.lowest.cell.bits is not None


def test_a_layer_that_no_gradient_passed_is_neither_a_number_nor_a_failure():
    found = find_headroom(in_dtype("float16", step_1=probe(1, gradient_abs_max=(None, 0.0, *[1.0] * 26))))
    assert [(cell.bits, cell.non_finite) for cell in found.backward[1][:2]] == [(None, False)] * 2


def test_records_without_probes_have_no_headroom():
    assert find_headroom(record("hqq")) is None
    found = compare([record("hqq")]).rows[0]
    assert (found.headroom, found.lowest_headroom_bits, found.gradient_cosine) == (None, None, None)


def test_the_effective_dtype_counts_and_the_requested_one_where_none_was_seen():
    asked = {"dtype": "float16"}
    assert find_headroom(probed(record("hqq", ask=asked))).dtype == "bfloat16"
    assert find_headroom(probed(record("hqq", ask=asked, quantization=None))).dtype == "float16"
    odd = quantization("hqq", effective_dtype="float8_e4m3fn")
    assert find_headroom(probed(record("hqq", quantization=odd))) is None


def test_a_row_has_the_lowest_headroom_and_the_cosine():
    made = in_dtype("float16").model_copy(update={"fidelity": fidelity(0.98)})
    found = compare([made]).rows[0]
    assert found.lowest_headroom_bits == found.headroom.lowest.cell.bits
    assert found.gradient_cosine == made.fidelity.overall.cosine


# ---- growth by depth


def test_growth_is_the_logarithm_of_last_over_first_by_the_number_of_layers():
    forward = (2.0, 100.0, 5.0, 16.0)
    backward = (27.0, 1.0, 1.0, 3.0)
    made = probed(
        record("hqq", steps=steps("hqq", count=1)),
        4,
        step_0=probe(0, 4, activation_abs_max=forward, gradient_abs_max=backward),
    )
    ahead, back = find_growth(made)
    assert ahead.exponent == pytest.approx(math.log(8) / 4)
    # Backward begins at the last layer.
    assert back.exponent == pytest.approx(math.log(9) / 4)
    assert (back.first_abs_max, back.last_abs_max) == (3.0, 27.0)


def test_a_short_stack_may_grow_by_the_range_of_float16_in_all():
    def growth(factor, layers):
        grown = (1.0, *[1.0] * (layers - 2), factor)
        made = record("hqq", steps=steps("hqq", count=1),
                      quantization=quantization("hqq", effective_dtype="float16"))  # fmt: skip
        return find_growth(probed(made, layers, step_0=probe(0, layers, activation_abs_max=grown)))[0]

    assert not growth(2.0**15, 2).exceeds
    assert growth(2.0**16.5, 2).exceeds
    assert not growth(4000.0, 8).exceeds
    assert growth(2.0**31, 30).exceeds


def test_activations_may_grow_as_far_as_the_dtype_reaches():
    grown = tuple(2.2**layer for layer in range(LAYERS))
    for dtype, alarms in (("bfloat16", False), ("float16", True)):
        assert find_growth(in_dtype(dtype, step_4=probe(4, activation_abs_max=grown)))[0].exceeds is alarms


@pytest.mark.parametrize("first", [0.0, math.nan, math.inf, None])
def test_without_two_finite_ends_there_is_no_growth(first):
    made = probed(
        record("hqq", steps=steps("hqq", count=1)),
        4,
        step_0=probe(0, 4, activation_abs_max=(first, 1.0, 1.0, 1.0)),
    )
    assert [growth.direction for growth in find_growth(made)] == ["backward"]


# ---- doubts


def warned(made):
    return [warning for warning in compare([made]).warnings if "headroom" in warning]


def test_little_headroom_is_warned_about_with_its_place():
    gradients = (20000.0, *probe(6).gradient_abs_max[1:])
    (warning,) = warned(in_dtype("float16", step_6=probe(6, gradient_abs_max=gradients)))
    assert "only 1.71 bits of headroom in float16 (gradients of layer 0 at step 6" in warning
    assert "--dtype bfloat16" in warning
    assert warned(in_dtype("float16", step_6=probe(6, gradient_abs_max=(16000.0, *gradients[1:])))) == []
    assert warned(in_dtype("bfloat16", step_6=probe(6, gradient_abs_max=gradients))) == []


def test_watching_everything_and_an_incomplete_comparison_are_said():
    made = record("hqq", ask={"trace": True}, fidelity=fidelity(note="the reference did not fit"))
    warnings = compare([made]).warnings
    assert any("step times include the watching" in warning for warning in warnings)
    assert any("the reference did not fit" in warning for warning in warnings)


def test_a_rescaled_layer_is_another_experiment_and_its_whole_name_tells_it_apart():
    name = "model.layers.10.mlp.up_proj"
    comparison = compare([record("hqq"), record("hqq", ask={"stress": {name: 16384.0}})])
    assert len(comparison.groups) == 2
    assert "layers rescaled by --stress" in [item.name for item in comparison.differences]
    assert comparison.rows[1].label == f"hqq (stress.{name}=16384.0)"


def test_what_is_watched_tells_runs_apart_last():
    stressed = {"stress": {"model.layers.10.mlp.up_proj": 2.0}}
    asks = [{"fidelity": True}, {"fidelity": False} | stressed, {"fidelity": True, "dtype": "float16"}]
    labels = [found.label for found in compare([record("hqq", ask=ask) for ask in asks]).rows]
    assert labels == [
        "hqq (dtype=bfloat16)", "hqq (dtype=bfloat16, stress.model.layers.10.mlp.up_proj=2.0)", "hqq (dtype=float16)",
    ]  # fmt: skip
    assert compare([record("hqq", ask=ask) for ask in asks[::2]]).rows[0].label == "hqq (dtype=bfloat16)"
    only = compare([record("hqq", ask={"fidelity": told}) for told in (True, False)])
    assert [found.label for found in only.rows] == ["hqq (fidelity=true)", "hqq (fidelity=false)"]


def test_step_times_with_the_watching_in_them_stand_apart():
    records = [record("bf16"), record("hqq", ask={"trace": True})]
    (found,) = compare(records).differences
    assert (found.kind, found.family) == ("breaking", "trace")
    assert [len(compare(records, allow).groups) for allow in ((), {"trace"})] == [2, 1]
