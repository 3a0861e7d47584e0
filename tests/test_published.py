import re

import pytest

from bench.ask.plan import ModelRequest
from bench.ask.preset import load_preset
from bench.judge.comparison import compare
from bench.load.registry import find_backends
from bench.show.columns import MISSING
from bench.show.fit_beside import beside_published
from bench.show.page import page
from bench.show.published import published_figures, published_for, size_of
from tests.fit_factory import QWEN_72B, backend_forecast, forecast, on_cards
from tests.record_factory import digest, record

QWEN_7B = load_preset("qwen2-7b").architecture or {}
PROXY = load_preset("proxy").architecture or {}


def test_every_figure_is_whole():
    figures = published_figures()
    assert {figure.size for figure in figures} == {"7B", "70B"}
    for figure in figures:
        assert figure.model
        assert figure.format
        assert figure.setup
        assert figure.source
        assert figure.reproduced is False
        assert figure.backend is None or figure.backend in find_backends()
        assert figure.memory or figure.tokens_per_second or figure.other, figure
        assert (figure.memory is None) == (figure.memory_unit is None)
        if figure.memory is not None:
            assert re.fullmatch(r"\d+(\.\d+)?(\+\d+(\.\d+)?)?", figure.memory)
            assert figure.memory_unit in ("GB", "GiB")
        assert figure.memory_measure is None or figure.memory is not None
        assert figure.tokens_per_second is None or type(figure.tokens_per_second) is int
        assert not figure.tokens_per_second_derived or figure.tokens_per_second is not None
    assert len({(f.model, f.format, f.setup, f.source) for f in figures}) == len(figures)


def test_derived_tokens_per_second_follow_from_the_figures_beside_them():
    """8 micro-batches an iteration, as the conditions say; else 1024 samples of 2048 tokens in the whole time."""
    checked = 0
    for figure in published_figures():
        if not figure.tokens_per_second_derived or figure.other is None:
            continue
        seconds = float(re.match(r"[\d.,]+", figure.other).group().replace(",", ""))
        if "per iteration" in figure.other:
            tokens = 8 * int(re.search(r"(\d+) tokens", figure.setup).group(1))
        else:
            assert "2048 tokens, 1024 samples" in figure.setup
            tokens = 1024 * 2048
        assert figure.tokens_per_second == pytest.approx(tokens / seconds, abs=0.6), figure
        checked += 1
    assert checked == 12


def test_the_anchors_of_one_card_are_there():
    seen = {
        (f.model, f.memory, f.memory_unit, f.tokens_per_second, f.tokens_per_second_derived)
        for f in published_figures()
    }
    assert {
        ("Qwen-72B (v1)", "61.4", "GB", 130, True),
        ("Qwen-72B (v1)", "64.1", "GB", 275, True),
        ("Llama-2-70B", "63.4", "GiB", 464, False),
    } <= seen


@pytest.mark.parametrize(
    ("name", "architecture", "size"),
    [
        ("anything", QWEN_72B.architecture, "70B"),
        ("anything", QWEN_7B, "7B"),
        ("pretends-to-be-72B", PROXY, None),
        ("meta-llama/Llama-2-70b-hf", {}, "70B"),
        ("unknown", {"hidden_size": 8192}, "70B"),
        ("Qwen/Qwen2-7B-Instruct", {}, "7B"),
        ("meta-llama/Llama-3.1-8B", {}, "7B"),
        ("HuggingFaceTB/SmolLM2-1.7B", {}, None),
        ("Qwen/Qwen2-0.5B", {}, None),
        ("a-170b", {}, None),
    ],
)
def test_the_size_of_a_model_is_told_by_its_parameters_first(name, architecture, size):
    assert size_of(name, architecture) == size


def model(name, architecture):
    return ModelRequest(name=name, weights="synthetic", fingerprint=digest(name), architecture=architecture)


def test_a_report_shows_only_figures_for_models_of_its_size():
    small = record("hqq", ask={"model": model("small", QWEN_7B)})
    assert {figure.size for figure in published_for(compare([small]), None)} == {"7B"}
    assert {figure.size for figure in published_for(compare([on_cards("hqq")]), None)} == {"70B"}
    proxy = compare([record("hqq", ask={"model": model("proxy", PROXY)})])
    assert published_for(proxy, None) == ()
    # The forecast of a folder is of the model of its records.
    assert published_for(proxy, forecast()) == ()
    assert {figure.size for figure in published_for(compare([]), forecast())} == {"70B"}
    assert "Beside what others published" not in page(proxy)


def test_our_figures_stand_beside_with_their_conditions():
    beside = beside_published(
        compare([on_cards("bnb-nf4"), on_cards("gptq", 1, 78.5)]), forecast(backend_forecast("hqq"))
    )
    several, alone = beside.measured
    for word in ("7 x NVIDIA GeForce RTX 3090", "placement split", "synthetic weights", "batch 1 x 512 tokens", "bfloat16",
                 "LoRA rank 8", "7 projections"):  # fmt: skip
        assert word in several.setup
    assert several.memory.endswith(" GiB")
    assert several.memory_measure == "peak reserved on the fullest card"
    assert alone.memory_measure == "peak reserved"
    (expected,) = beside.forecast
    assert "80 layers from slices of 2, 4" in expected.setup
    assert expected.memory_measure == "peak of resident memory of the process"
    step = backend_forecast("hqq").line("step", "step")
    assert float(expected.tokens_per_second) == pytest.approx(512 / step.predicted, rel=0.01)


def test_a_cut_model_says_that_it_is_cut():
    cut = QWEN_72B.model_copy(update={"layers": 2})
    made = on_cards("hqq", 1, 78.5, ask={"model": cut})
    (row,) = beside_published(compare([made]), None).measured
    assert "the first 2 decoder layers only" in row.setup


def test_every_memory_on_the_page_has_its_unit():
    beside = beside_published(compare([on_cards("bnb-nf4")]), forecast())
    rows = [*beside.measured, *beside.forecast, *beside.published]
    assert len(rows) > 40
    assert all(row.memory == MISSING or row.memory.split()[-1] in ("GB", "GiB") for row in rows)
