import math
import re
import sys
from xml.etree import ElementTree

import pytest

from bench.judge.comparison import compare
from bench.record.memory import Memory
from bench.record.stability import LayerFidelity
from bench.show.plots import plots
from bench.show.styles import STYLES, assign_styles
from tests.record_factory import (
    eight_backends,
    failed,
    fidelity,
    margin_runs,
    memory,
    probed,
    record,
    step,
    steps,
)

NAMES = [
    "pareto",
    "memory-per-card",
    "memory-by-phase",
    "bytes-by-kind",
    "step-time",
    "throughput",
    "loss",
    "gradient-norm",
]
STABILITY = ["headroom-forward", "headroom-backward", "gradient-fidelity", "margin"]


def named(comparison):
    return {plot.name: plot for plot in plots(comparison)}


def test_all_figures_are_well_formed_and_said_in_words():
    found = plots(compare(eight_backends()))
    assert [plot.name for plot in found] == NAMES
    for plot in found:
        root = ElementTree.fromstring(plot.svg)
        assert root.get("role") == "img"
        assert root.get("aria-label") == plot.alternative
        assert "bf16" in plot.alternative
        ElementTree.fromstring(plot.standalone.split("?>", 1)[1].strip())


def everything():
    compared = [probed(made).model_copy(update={"fidelity": fidelity()}) for made in eight_backends()]
    return compare([*compared, *margin_runs("hqq", 11)])


def test_what_the_probes_and_the_margins_gave_is_drawn_too():
    found = plots(everything())
    assert [plot.name for plot in found] == NAMES + STABILITY
    for plot in found:
        ElementTree.fromstring(plot.svg)


def test_equal_data_gives_equal_bytes():
    first, second = plots(everything()), plots(everything())
    assert [plot.svg for plot in first] == [plot.svg for plot in second]


def test_figures_bring_no_style_no_font_and_no_date_and_share_no_id():
    ids = []
    for plot in plots(everything()):
        assert "style" not in plot.svg
        assert "<metadata" not in plot.svg
        assert "DejaVu" not in plot.svg
        assert "currentColor" in plot.svg
        ids += re.findall(r'\bid="([^"]*)"', plot.svg)
        targets = set(re.findall(r'href="#([^"]*)"', plot.svg)) | set(
            re.findall(r"url\(#([^)]*)\)", plot.svg)
        )
        assert targets <= set(ids)
    assert len(ids) == len(set(ids))


def test_a_backend_has_one_colour_in_all_figures():
    found = named(compare(eight_backends()))
    for name in ("memory-by-phase", "step-time", "throughput", "loss", "gradient-norm"):
        for style in STYLES.values():
            assert style.color in found[name].svg.lower()


def luminance(color):
    parts = [int(color[place : place + 2], 16) / 255 for place in (1, 3, 5)]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]


@pytest.mark.parametrize("paper", ["#fcfcfa", "#14171a"])
@pytest.mark.parametrize("backend", STYLES)
def test_colours_are_legible_on_light_and_on_dark(backend, paper):
    light, dark = sorted((luminance(STYLES[backend].color), luminance(paper)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 3


def test_no_two_backends_look_alike_without_colour():
    assert len({(style.marker, style.line) for style in STYLES.values()}) == len(STYLES)


def test_backends_from_elsewhere_take_free_styles():
    styles = assign_styles(["bf16", "mine", "other"])
    assert styles["bf16"] == STYLES["bf16"]
    assert len(set(styles.values())) == 3


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_drawn_as_crosses_and_said(bad):
    broken = list(steps("gptq"))
    for index in (5, 6):
        broken[index] = step(index, losses=(bad,), gradient_norm=bad, seconds=0.5)
    clean = named(compare([record("bf16"), record("gptq")]))
    found = named(compare([record("bf16"), record("gptq", steps=tuple(broken))]))
    for name in ("loss", "gradient-norm"):
        assert "2 of 8 steps not finite" in found[name].alternative
        assert found[name].svg.count("<use") == clean[name].svg.count("<use")
        assert len(markers(found[name].svg)) > len(markers(clean[name].svg))


def markers(svg):
    return set(re.findall(r'<path id="([^"]*)"', svg))


@pytest.mark.parametrize("value", [math.nan, 0.0])
def test_a_run_with_no_value_that_has_a_place_is_still_drawn(value):
    made = record("hqq", steps=tuple(step(index, gradient_norm=value) for index in range(8)))
    assert "gradient-norm" in named(compare([made]))


@pytest.mark.parametrize(("value", "told"), [(0.0, "0"), (math.inf, "Infinity"), (math.nan, "NaN")])
def test_the_ends_of_repeated_runs_are_told_as_they_are(value, told):
    made = [record("hqq", repeat=repeat, steps=tuple(step(index, gradient_norm=value) for index in range(8)))
            for repeat in range(3)]  # fmt: skip
    assert f"hqq, 3 runs, from {told} to {told}" in named(compare(made))["gradient-norm"].alternative


def test_a_figure_without_data_is_not_drawn():
    assert plots(compare([failed("hqq", "unavailable", "load", "x")])) == ()
    assert plots(compare([])) == ()
    assert "memory-by-phase" not in named(compare([record("hqq", memory=Memory())]))


def test_a_failed_run_with_data_is_drawn_with_its_outcome():
    made = failed("hqq", "out_of_memory", "train", "x", steps=steps("hqq")[:3], memory=memory("hqq"))
    found = named(compare([record("bf16"), made]))
    for name in ("memory-by-phase", "loss", "throughput"):
        assert "hqq (out of memory)" in found[name].svg


def test_the_first_request_of_a_backend_keeps_its_style():
    styles = assign_styles(["gptq (group_size=64)", "gptq (group_size=128)", "bf16"])
    assert styles["gptq (group_size=64)"] == STYLES["gptq"]
    assert len(set(styles.values())) == 3


def test_a_failed_request_leaves_its_style_to_a_completed_one():
    crashed = failed("gptq", "crashed", "load", "x", ask={"options": {"group_size": 128}})
    assert STYLES["gptq"].color in named(compare([crashed, record("gptq")]))["loss"].svg


def test_a_legend_of_long_names_stays_inside_its_figure():
    ask = {"options": {"a_rather_long_option_name": 1}}
    records = [record(backend, ask=extra) for backend in ("hqq", "gptq", "awq") for extra in ({}, ask)]
    svg = named(compare(records))["loss"].svg
    width = float(re.search(r'viewBox="0 0 ([\d.]+)', svg).group(1))
    entries = re.findall(r'<text font-size="10px"[^>]*? x="([-\d.]+)"[^>]*>([^<]*)', svg)
    assert len(entries) == 6
    for start, text in entries:
        assert 0 <= float(start) <= width - 5 * len(text)


# ---- fidelity and margins


def of_errors(errors):
    return tuple(LayerFidelity(cosine=0.9, norm_ratio=1.0, relative_error=error) for error in errors)


def test_fidelity_is_a_line_of_errors_by_layer_said_in_words():
    made = record("hqq", fidelity=fidelity(layers=of_errors([0.1, 0.4, 0.2])))
    plot = named(compare([made, record("bf16")]))["gradient-fidelity"]
    assert plot.alternative == "Relative error of the LoRA gradient by decoder layer. hqq 0.100 to 0.400."
    assert STYLES["hqq"].color in plot.svg.lower()
    assert STYLES["bf16"].color not in plot.svg.lower()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_layers_that_are_not_finite_are_crosses_and_those_without_a_value_gaps(bad):
    whole = named(compare([record("hqq", fidelity=fidelity(layers=of_errors([0.1, 0.2, 0.3])))]))
    broken = named(compare([record("hqq", fidelity=fidelity(layers=of_errors([0.1, bad, None])))]))
    assert "1 of 3 layers not finite" in broken["gradient-fidelity"].alternative
    assert len(markers(broken["gradient-fidelity"].svg)) == len(markers(whole["gradient-fidelity"].svg)) + 1
    assert "gradient-fidelity" not in named(compare([record("hqq", fidelity=fidelity(layers=()))]))


def test_margins_are_bars_with_their_bits_and_a_sign_where_they_are_bounds():
    plot = named(compare([*margin_runs("hqq", 11), *margin_runs("bnb-nf4", 24)]))["margin"]
    assert plot.alternative == "Stability margin. hqq, fp16: 11 bits; bnb-nf4, fp16: ≥ 24 bits."
    assert ">11</text>" in plot.svg
    assert ">≥ 24</text>" in plot.svg


def test_runs_of_a_bisection_do_not_hide_the_backends():
    drawn = named(compare([record("hqq"), record("bf16"), *margin_runs("hqq", 11)]))
    assert drawn["loss"].alternative.count(" from ") == 2
    assert "stress" not in drawn["loss"].svg
    # A bisection alone has its control to show.
    alone = named(compare(margin_runs("hqq", 11)))
    assert alone["loss"].alternative.count(" from ") == 1


def test_two_factors_are_no_bisection_and_both_are_drawn():
    two = margin_runs("hqq", 24, tried=(0,))
    assert named(compare(two))["loss"].alternative.count(" from ") == 2


def test_a_name_longer_than_the_figure_is_elided_in_it():
    ask = {"stress": {f"model.layers.{layer}.mlp.up_proj": 2.0 for layer in range(9)}}
    found = named(compare([record("hqq", ask=ask), record("hqq")]))
    assert "hqq (stress.model.la…lp.up_proj=2.0)" in found["memory-by-phase"].svg
    assert "up_proj=2.0)" in found["loss"].svg


def test_pyplot_and_its_global_state_stay_out():
    plots(compare(eight_backends()))
    assert "matplotlib.pyplot" not in sys.modules
