import math
import re
from xml.etree import ElementTree

import pytest

from bench.judge.comparison import compare
from bench.show.heat_map import COLOR, OPACITIES, PANELS, headroom_maps
from bench.show.heat_map_cells import EDGES
from tests.record_factory import LAYERS, overflowing, probe, probed, quantization, record, step
from tests.test_plots import luminance


def maps(*records):
    return {plot.name: plot for plot in headroom_maps(compare(records).rows)}


def in_float16(backend="hqq", layers=LAYERS, steps=8, **of_steps):
    made = record(
        backend,
        quantization=quantization(backend, effective_dtype="float16"),
        steps=tuple(step(index) for index in range(steps)),
    )
    return probed(made, layers, **of_steps)


def boxes(svg):
    """(opacity or "hatch", layers, rows) of every rectangle of cells in a figure of one panel."""
    width = (460 - 30) / LAYERS
    found = []
    for fill, path in re.findall(r'<path (fill="[^>]*?) d="([^"]*)"/>', svg):
        opacity = re.search(r'fill-opacity="([\d.]+)"', fill)
        for wide, high in re.findall(r"h([\d.]+)v([\d.]+)", path):
            kind = float(opacity.group(1)) if opacity else "hatch"
            found.append((kind, round(float(wide) / width), round(float(high) / 8)))
    return found


def test_there_is_a_map_for_each_direction_said_in_words():
    found = maps(in_float16("bf16"), in_float16("hqq"))
    assert list(found) == ["headroom-forward", "headroom-backward"]
    for plot in found.values():
        root = ElementTree.fromstring(plot.svg)
        assert root.get("role") == "img"
        assert root.get("aria-label") == plot.alternative
        assert "bf16: lowest" in plot.alternative
        assert "bits of float16 at layer" in plot.alternative
        assert "style" not in plot.svg
        ElementTree.fromstring(plot.standalone.split("?>", 1)[1].strip())


def test_panels_of_another_depth_have_an_axis_of_their_own():
    def axes(*depths):
        made = (in_float16(name, layers) for name, layers in zip(("bf16", "hqq", "eetq"), depths, strict=True))
        return maps(*made)["headroom-forward"].svg.count(">decoder layer<")

    assert axes(LAYERS, LAYERS, LAYERS) == 1
    assert axes(LAYERS, LAYERS, 2 * LAYERS) == 2
    assert axes(LAYERS, 2 * LAYERS, LAYERS) == 3


def test_equal_neighbours_are_one_rectangle():
    level = {f"step_{i}": probe(i, activation_abs_max=(10_000.0,) * LAYERS) for i in range(8)}
    svg = maps(in_float16(**level))["headroom-forward"].svg
    assert boxes(svg) == [(0.62, LAYERS, 8)]


@pytest.mark.parametrize(
    ("bits", "opacity"),
    [
        (-1, 1.0),
        (0.9, 1.0),
        (1.1, 0.8),
        (2.1, 0.62),
        (4.1, 0.46),
        (8.1, 0.33),
        (16.1, 0.22),
        (32.1, 0.13),
        (64.1, 0.06),
    ],
)
def test_less_headroom_is_a_stronger_shade(bits, opacity):
    value = 65504 / 2**bits
    level = {f"step_{i}": probe(i, activation_abs_max=(value,) * LAYERS) for i in range(8)}
    assert boxes(maps(in_float16(**level))["headroom-forward"].svg) == [(opacity, LAYERS, 8)]
    assert len(OPACITIES) == len(EDGES) + 1
    assert list(OPACITIES) == sorted(OPACITIES, reverse=True)


def test_what_is_not_finite_is_hatched_and_said_and_no_colour():
    plot = maps(overflowing())["headroom-forward"]
    assert ("hatch", LAYERS - 10, 3) in boxes(plot.svg)
    assert (
        f"not finite in {3 * (LAYERS - 10)} of {8 * LAYERS} cells, first at layer 10, step 5"
        in plot.alternative
    )
    assert 'fill="url(#headroom-forward-hatch)"' in plot.svg
    clean = maps(in_float16())["headroom-forward"]
    assert not [box for box in boxes(clean.svg) if box[0] == "hatch"]
    assert "not finite in" not in clean.alternative


def test_cells_without_a_value_stay_empty():
    none = {f"step_{i}": probe(i, gradient_abs_max=(None, *[1.0] * (LAYERS - 1))) for i in range(8)}
    assert boxes(maps(in_float16(**none))["headroom-backward"].svg) == [(0.33, LAYERS - 1, 8)]
    nothing = {f"step_{i}": probe(i, gradient_abs_max=(None,) * LAYERS) for i in range(8)}
    assert list(maps(in_float16(**nothing))) == ["headroom-forward"]


def test_many_steps_share_rows_that_show_the_worst_of_them():
    one_bad = in_float16(steps=100, step_57=probe(57, activation_abs_max=(math.inf, *[1.0] * (LAYERS - 1))))
    low = in_float16(steps=100, step_57=probe(57, activation_abs_max=(60_000.0, *[1.0] * (LAYERS - 1))))
    assert ("hatch", 1, 1) in boxes(maps(one_bad)["headroom-forward"].svg)
    assert (1.0, 1, 1) in boxes(maps(low)["headroom-forward"].svg)
    assert ">99</text>" in maps(low)["headroom-forward"].svg


def test_eighty_layers_of_eight_runs_stay_light():
    def scattered(backend, place):
        seen = {
            f"step_{i}": probe(
                i, 80, activation_abs_max=tuple(2.0 ** ((7 * i + 5 * n + place) % 16) for n in range(80))
            )
            for i in range(8)
        }
        return in_float16(backend, 80, **seen)

    names = ("bf16", "bnb-nf4", "bnb-nf4-dq", "bnb-int8", "hqq", "gptq", "awq", "eetq")
    plot = maps(*(scattered(name, place) for place, name in enumerate(names)))["headroom-forward"]
    assert plot.svg.count("<") < 400
    assert len(plot.svg) < 150_000


def test_repeats_are_left_out_first_and_the_rest_is_counted():
    runs = [in_float16(name) for name in ("bf16", "hqq")]
    repeats = [
        made.model_copy(
            update={"request": made.request.model_copy(update={"repeat": repeat, "seed": repeat})}
        )
        for repeat in range(1, 10)
        for made in runs
    ]
    plot = maps(*repeats, *runs)["headroom-forward"]
    assert plot.svg.count('-opacity=".45"') == PANELS + 1
    assert f"{20 - PANELS} more runs are not drawn" in plot.alternative
    assert "bf16" in plot.alternative and "hqq" in plot.alternative


def test_names_are_escaped():
    made = in_float16().model_copy(
        update={"request": in_float16().request.model_copy(update={"backend": "<b>&"})}
    )
    assert "&lt;b&gt;&amp;" in maps(made)["headroom-forward"].svg


@pytest.mark.parametrize("paper", ["#fcfcfa", "#14171a"])
def test_the_strongest_shade_is_legible_on_both_papers(paper):
    light, dark = sorted((luminance(COLOR), luminance(paper)), reverse=True)
    assert (light + 0.05) / (dark + 0.05) >= 3


def test_without_probes_there_is_no_map():
    assert maps(record("hqq")) == {}
