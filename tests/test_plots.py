import math
import re
import sys
from xml.etree import ElementTree

import pytest

from bench.judge.comparison import compare
from bench.record.schema import Memory
from bench.show.drawing import STYLES, assign_styles
from bench.show.plots import plots
from tests.record_factory import eight_backends, failed, memory, record, step, steps

NAMES = ["memory-by-phase", "bytes-by-kind", "step-time", "throughput", "loss", "gradient-norm"]


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


def test_equal_data_gives_equal_bytes():
    first, second = plots(compare(eight_backends())), plots(compare(eight_backends()))
    assert [plot.svg for plot in first] == [plot.svg for plot in second]


def test_figures_bring_no_style_no_font_and_no_date_and_share_no_id():
    ids = []
    for plot in plots(compare(eight_backends())):
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


def test_pyplot_and_its_global_state_stay_out():
    plots(compare(eight_backends()))
    assert "matplotlib.pyplot" not in sys.modules
