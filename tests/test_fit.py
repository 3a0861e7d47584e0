import html
import math
import re
from itertools import pairwise
from xml.etree import ElementTree

import pytest

from bench.errors import BrokenFile
from bench.judge.comparison import compare
from bench.record.forecast import save_forecast
from bench.record.memory import BytesByKind, Memory, MemoryReading
from bench.show.columns import MISSING
from bench.show.fit_plots import fit_plots
from bench.show.fit_section import fit_section
from bench.show.fit_view import CardUse, room_in_words, uses_of
from bench.show.page import page
from bench.show.plots import plots
from bench.show.report import write_report
from bench.show.tables import csv, markdown
from tests.browser import find_browser, launched
from tests.fit_factory import WEIGHT_GIB, backend_forecast, forecast, lines, on_cards, outlook
from tests.record_factory import GIB, eight_backends, failed, memory, record
from tests.test_page import EVIL, opened

FIVE = ("bf16", "bnb-nf4", "bnb-int8", "hqq", "gptq")


def section(text):
    """The section of a page, its entities as characters."""
    found = re.search(r'<section id="fit".*?</section>', text, flags=re.S)
    return html.unescape(found.group(0)) if found else None


def table(text, of):
    """The cells of one table of the section by its id, row by row, without their tags."""
    (found,) = re.findall(rf'<table id="{of}".*?</table>', text, flags=re.S)
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", found, flags=re.S)
    cells = [re.findall(r"<t[hd][^>]*>(.*?)</t[hd]>", row, flags=re.S) for row in rows]
    return [[" ".join(re.sub(r"<[^>]+>", " ", cell).split()) for cell in row] for row in cells]


# ---- cards


def test_a_card_is_taken_apart_exactly():
    (use,) = uses_of(compare([on_cards("bnb-nf4")]))
    assert [card.name for card in use.cards] == [f"cuda:{place}" for place in range(7)]
    made = on_cards("bnb-nf4").memory
    for place, card in enumerate(use.cards):
        device = f"cuda:{place}"
        assert card.peak_bytes == max(r.peak_reserved_bytes for r in made.readings if r.device == device)
        (kinds,) = [kind for kind in made.bytes_by_kind if kind.device == device]
        assert card.counted_bytes == sum(
            getattr(kinds, name)
            for name in ("quantized_weights", "quantization_metadata", "unquantized_weights", "lora", "gradients", "optimizer_state")
        )  # fmt: skip
        assert card.counted_bytes + card.rest_bytes == card.peak_bytes
        assert card.phase == "backward"
        assert card.capacity_bytes == int(23.6 * GIB)
    assert use.fullest.name == "cuda:6"


def test_only_what_exists_in_the_fullest_phase_is_counted():
    kinds = memory("hqq").bytes_by_kind
    loaded = MemoryReading(phase="loaded", device="cuda:0", peak_reserved_bytes=20 * GIB)
    trained = MemoryReading(phase="backward", device="cuda:0", peak_reserved_bytes=8 * GIB)
    (use,) = uses_of(compare([record("hqq", memory=Memory(readings=(loaded, trained), bytes_by_kind=kinds))]))
    (card,) = use.cards
    assert (card.phase, card.peak_bytes) == ("loaded", 20 * GIB)
    assert set(card.parts) == {"quantized_weights", "quantization_metadata", "unquantized_weights"}


def test_what_was_not_observed_is_missing_and_never_zero():
    reading = MemoryReading(phase="forward", device="cuda:0", peak_reserved_bytes=8 * GIB)
    made = record("hqq", memory=Memory(readings=(reading,)), environment=None)
    (use,) = uses_of(compare([made]))
    assert (use.fullest.counted_bytes, use.fullest.rest_bytes, use.fullest.capacity_bytes) == (
        None,
        None,
        None,
    )
    row = table(section(page(compare([made]))), "cards")[1]
    assert row[2:8] == [MISSING, "8.00", MISSING, MISSING, MISSING, MISSING]
    (plot,) = [plot for plot in plots(compare([made])) if plot.name == "memory-per-card"]
    assert "not broken down" in plot.svg
    assert uses_of(compare([record("hqq", memory=Memory())])) == ()


def test_counted_tensors_that_were_not_resident_leave_no_negative_rest():
    card = CardUse("cpu", None, 64 * GIB, 5, "backward", {"quantized_weights": 6}, None)
    assert card.rest_bytes is None


@pytest.mark.parametrize(
    ("peak", "capacity", "words"),
    [(18 * GIB, 24 * GIB, "6.00 GiB, 25 %"), (25 * GIB, 24 * GIB, "1.00 GiB too little"), (1, None, MISSING)],
)
def test_room_in_words(peak, capacity, words):
    assert room_in_words(peak, capacity) == words


def test_of_several_repeats_the_fullest_that_completed_is_shown():
    roomy, full = record("hqq", memory=memory("bnb-nf4")), record("hqq", repeat=1, memory=memory("eetq"))
    broken = record(
        "hqq", repeat=2, status="out_of_memory", stage="train", message="x", memory=memory("bf16")
    )
    (use,) = uses_of(compare([roomy, full, broken]))
    assert use.row.record.key == full.key
    (alone,) = uses_of(compare([broken]))
    assert alone.name == "hqq (out of memory)"


def test_ranks_are_kept_apart_and_logical_devices_of_a_cpu_are_not():
    readings = tuple(
        MemoryReading(
            phase="backward", device=f"cpu:{place}", rank=rank, peak_resident_bytes=(2 + rank) * GIB
        )
        for rank in (0, 1)
        for place in (0, 1)
    )
    kinds = tuple(
        BytesByKind(
            device=f"cpu:{place}", rank=rank, quantized_weights=100, quantization_metadata=10, unquantized_weights=1,
            lora=1, gradients=None, optimizer_state=None,
        )
        for rank in (0, 1)
        for place in (0, 1)
    )  # fmt: skip
    made = record("hqq", cpu=True, memory=Memory(readings=readings, bytes_by_kind=kinds))
    (use,) = uses_of(compare([made]))
    assert [card.name for card in use.cards] == ["rank 0, cpu", "rank 1, cpu"]
    assert [card.counted_bytes for card in use.cards] == [224, 224]
    assert [card.capacity_bytes for card in use.cards] == [64 * GIB, 64 * GIB]
    assert "their figures add up" in section(page(compare([made])))


def test_a_cpu_is_never_called_a_card():
    text = section(page(compare(eight_backends(cpu=True))))
    assert "resident memory of a whole process" in text
    assert "They say nothing of a card" in text
    assert "On a card, a peak is" not in text
    (plot,) = fit_plots(compare([record("bf16", cpu=True)]), None)
    shown = re.sub(r'(id|href|clip-path|fill)="[^"]*"', "", plot.svg)
    assert "card" not in plot.title + plot.alternative + shown
    assert "They say nothing" not in section(page(compare(eight_backends())))


def test_the_page_has_the_fullest_card_of_each_run_and_every_card_below():
    text = section(page(compare([on_cards(backend) for backend in FIVE])))
    fullest, every = table(text, "cards"), table(text, "every-card")
    assert [row[0] for row in fullest[1:]] == list(FIVE)
    assert fullest[1][1].startswith("cuda:6, fullest of 7")
    assert fullest[1][6] == "0.524 GiB too little"
    assert len(every) == 1 + 7 * len(FIVE)
    assert 'id="every-card"' not in section(page(compare([record("bf16")])))


@pytest.mark.parametrize("cards", [1, 2, 8])
def test_any_number_of_cards_is_drawn_with_room_for_each(cards):
    found = fit_plots(compare([on_cards(backend, cards) for backend in WEIGHT_GIB]), None)
    (plot,) = [plot for plot in found if plot.name == "memory-per-card"]
    names = WEIGHT_GIB if cards == 1 else [f"cuda:{place}" for place in range(cards)] * len(WEIGHT_GIB)
    drawn = re.findall(r'text-anchor="end"[^>]* y="([\d.]+)"[^>]*>([^<]*)<', plot.svg)
    places = [float(y) for y, name in drawn if name in set(names)]
    assert [name for _, name in drawn if name in set(names)] == list(names)
    # Points: the names are 9 to 11 high.
    assert min(after - before for before, after in pairwise(places)) >= (20 if cards == 1 else 11.5)
    for backend in WEIGHT_GIB:
        assert f"{backend}: " in plot.alternative
    assert plot.svg.count(">cuda:0<") == (0 if cards == 1 else 8)


# ---- forecast


def test_a_forecast_without_verification_claims_no_error():
    text = section(page(compare([record("bf16")]), forecast=forecast()))
    rows = table(text, "forecast-table")
    assert [row[0] for row in rows[1:]] == ["bnb-nf4", "hqq"]
    step = backend_forecast("bnb-nf4").line("step", "step")
    assert rows[1][5] == f"{step.predicted:.2f} {step.low:.2f} to {step.high:.2f}"
    assert rows[1][6] == f"{512 / step.predicted:.1f}"
    # Tensor bytes have no spread.
    assert "to" not in rows[1][2]
    assert ", error" not in text
    assert "How far off it was" not in text


def test_a_verified_forecast_shows_what_was_measured_and_the_error():
    made = forecast(backend_forecast("bnb-nf4", verify=True))
    rows = table(section(page(compare([record("bf16")]), forecast=made)), "forecast-table")
    line = made.backends[0].line("step", "step")
    assert f"measured {line.measured:.2f}, error +0.90 %" in rows[1][5]
    assert "error 0 %" in rows[1][2]
    assert "error -13.00 %" in rows[1][4]
    checks = table(section(page(compare([record("bf16")]), forecast=made)), "forecast-checks")
    assert checks[1] == ["bnb-nf4", "2, 4", "0; 0", "+2.10; +2.10", "-13.00; -13.00", "+0.90; +0.90"]
    assert checks[2][1] == "2, 8"


def test_every_set_of_cards_says_whether_it_fits_and_on_what_basis():
    made = forecast(*(backend_forecast(backend) for backend in ("bf16", "bnb-nf4")))
    text = section(page(compare([record("bf16")]), forecast=made))
    first, second = re.findall(r"<caption>(\d+x\d+GB.*?)</table>", text, flags=re.S)
    assert "Arithmetic: as qlora-bench plan computes it" in first
    assert "Measured: peaks of the slices" in second
    cells = [
        re.sub(r"<[^>]+>", " ", part).split() for part in re.findall(r"<tr\b.*?</tr>", second, flags=re.S)[1:]
    ]
    peaks = [max(one.outlooks[1].peak_bytes) / GIB for one in made.backends]
    assert peaks[0] > 78.5 > peaks[1]
    assert cells[0][:3] == ["bf16", "no", f"{peaks[0]:.0f}"]
    assert cells[1][:3] == ["bnb-nf4", "yes", f"{peaks[1]:.1f}"]
    assert "none" in cells[0]
    assert "8,192" in cells[1]
    assert "All decoder layers are alike." in text
    assert made.command in text


def test_a_backend_without_a_forecast_is_a_row_with_its_reason():
    impossible = outlook("eetq", "7x24GB", count=7, capacity_gib=23.55, fits=None, peak_bytes=(), longest_sequence=None,
                         reason="needs multiples of 16")  # fmt: skip
    broken = backend_forecast("eetq", lines=(), message="2 layers: crashed", notes=(), outlooks=(impossible,))
    made = forecast(backend_forecast("bnb-nf4"), broken)
    text = section(page(compare([record("bf16")]), forecast=made))
    rows = table(text, "forecast-table")
    assert rows[2] == ["eetq", MISSING if broken.effective_dtype is None else "bfloat16", *[MISSING] * 5]
    assert "2 layers: crashed" in rows[3][1]
    assert "needs multiples of 16" in text
    assert "not possible" in text
    for plot in fit_plots(compare([]), made):
        assert "eetq" not in plot.svg
    nothing = forecast(broken)
    assert [plot.name for plot in fit_plots(compare([]), nothing)] == []
    assert "not possible" in section(page(compare([record("bf16")]), forecast=nothing))


def test_the_figure_of_steps_has_slices_line_interval_and_what_was_measured():
    def drawn(made):
        return next(plot for plot in fit_plots(compare([]), made) if plot.name == "forecast-step-time")

    bare = drawn(forecast(backend_forecast("hqq", lines=lines("hqq", full=80, verify=False, spread=False))))
    spread, verified = (
        drawn(forecast(backend_forecast("hqq"))),
        drawn(forecast(backend_forecast("hqq", verify=True))),
    )
    assert "95 % interval" not in bare.svg
    assert "95 % interval" in spread.svg
    assert "measured, all layers" not in spread.svg
    assert "measured, all layers" in verified.svg
    step = backend_forecast("hqq").line("step", "step")
    assert f"hqq {step.at_slices[0]:.3f} at 2" in bare.alternative
    assert f"forecast {step.predicted:.2f} ({step.low:.2f} to {step.high:.2f}) at 80" in spread.alternative


def test_a_step_time_that_is_not_finite_is_said_and_breaks_no_figure():
    (*others, step) = lines("hqq", full=80, verify=True)
    values = dict.fromkeys(("per_layer", "fixed", "predicted", "low", "high", "measured"), math.nan)
    odd = step.model_copy(update=values | {"at_slices": (0.5, None)})
    made = forecast(backend_forecast("hqq", lines=(*others, odd)))
    found = {plot.name: plot for plot in fit_plots(compare([]), made)}
    assert "forecast NaN" in found["forecast-step-time"].alternative
    assert f"{MISSING} at 4" in found["forecast-step-time"].alternative
    assert table(section(page(compare([]), forecast=made)), "forecast-table")[1][5].startswith("NaN")


def test_every_figure_is_well_formed_with_ids_of_its_own():
    made = forecast(*(backend_forecast(backend, verify=True) for backend in WEIGHT_GIB))
    found = plots(compare([on_cards(backend) for backend in FIVE]), made)
    names = [plot.name for plot in found]
    assert names[1:5] == ["memory-per-card", "forecast-step-time", "forecast-cards-1", "forecast-cards-2"]
    ids = [name for plot in found for name in re.findall(r'\bid="([^"]*)"', plot.svg)]
    assert len(ids) == len(set(ids))
    for plot in found:
        assert ElementTree.fromstring(plot.svg).get("aria-label") == plot.alternative
    assert [plot.svg for plot in plots(compare([on_cards(backend) for backend in FIVE]), made)] == [
        plot.svg for plot in found
    ]


def test_nothing_to_show_leaves_no_section_and_no_entry():
    for records in ([], [failed("hqq", "unavailable", "load", "x", ask={"model": record().request.model.model_copy(
        update={"name": "proxy", "architecture": {}})})]):  # fmt: skip
        text = page(compare(records))
        assert section(text) is None
        assert 'href="#fit"' not in text
        assert fit_section(compare(records), None, {}) is None
    plain = page(compare([record("bf16")]))
    assert 'href="#fit"' in plain
    assert 'id="forecast"' not in plain


# ---- the report


def test_a_forecast_in_the_folder_is_part_of_every_file(tmp_path):
    made = forecast(backend_forecast("bnb-nf4", verify=True), backend_forecast("hqq"))
    save_forecast(tmp_path, made)
    files = write_report(compare([on_cards("bnb-nf4")]), tmp_path)
    assert "Forecast of the whole model" in files.html.read_text(encoding="utf-8")
    text = files.markdown.read_text(encoding="utf-8")
    for title in ("Peak memory against what there is", "Forecast of the whole model", "On 7x24GB, 23.5 GiB each",
                  "On 1x80GB", "What the forecast assumes"):  # fmt: skip
        assert f"**{title}" in text
    step = made.backends[0].line("step", "step")
    assert f"measured {step.measured:.2f}, error +0.90 %" in text
    assert {path.name for path in files.plots} >= {"forecast-step-time.svg", "forecast-cards-2.svg"}
    (tmp_path / "forecast.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BrokenFile, match=r"forecast\.json"):
        write_report(compare([on_cards("bnb-nf4")]), tmp_path)


def test_markdown_is_not_broken_by_what_a_forecast_holds():
    text = markdown(compare([record("bf16")]), None, forecast(text="a|b\n**x** <script>"))
    assert "<script>" not in text
    assert "**x**" not in text
    block = text.split("**Forecast of the whole model**")[1].strip().split("\n\n")[0]
    assert {line.replace("\\|", "").count("|") for line in block.splitlines()} == {8}


def test_csv_has_the_size_of_every_card():
    head, line = csv(compare([on_cards("hqq", 2)])).splitlines()
    value = dict(zip(head.split(","), line.split(","), strict=False))["total_memory_bytes_by_device"]
    assert value == f"cuda:0={int(23.6 * GIB)};cuda:1={int(23.6 * GIB)}"


def test_a_script_in_a_forecast_is_inert():
    text = page(compare([record("bf16")]), forecast=forecast(text=EVIL))
    assert EVIL not in text
    assert html.escape(EVIL) in text
    assert text.lower().count("<script") == 1


# ---- in a browser


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    folder = tmp_path_factory.mktemp("fit")
    save_forecast(folder, forecast(*(backend_forecast(backend, verify=True) for backend in FIVE)))
    return write_report(compare([on_cards(backend) for backend in FIVE]), folder).html


@pytest.fixture(scope="module")
def browser():
    if find_browser() is None:
        pytest.skip("no Chromium on this machine")
    with launched() as found:
        yield found


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_no_faults_no_sideways_scrolling_and_no_script_needed(browser, written, width, scheme):
    context = browser.new_context(
        java_script_enabled=False, viewport={"width": width, "height": 800}, color_scheme=scheme
    )
    tab, faults = opened(context, written)
    assert tab.locator("#fit svg[role=img][aria-label]").count() == 4
    assert tab.locator("#published-table tbody tr").count() > 40
    context.close()
    tab, faults = opened(browser, written, viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert tab.evaluate("[...document.querySelectorAll('#fit details')].forEach(d => d.open = true)") is None
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert faults == []
    tab.close()
