import html
import json
import math
import re

import pytest

from bench.errors import BrokenFile
from bench.judge.comparison import compare
from bench.record.schema import Proof
from bench.record.stability import WeightError
from bench.record.triage import save_triage
from bench.show.columns import COLUMNS, MISSING, sections
from bench.show.page import headline, page
from bench.show.report import write_report
from tests.browser import opened
from tests.record_factory import (
    FAILING_MODULE,
    eight_backends,
    failed,
    fidelity,
    first_failure,
    margin_runs,
    memory,
    overflowing,
    planted,
    probed,
    record,
    step,
    steps,
    triage,
)

EVIL = "<script>alert(1)</script>"


def realistic():
    return compare(realistic_records())


def realistic_records():
    records = [probed(made).model_copy(update={"fidelity": fidelity()}) for made in eight_backends()]
    records[5] = overflowing("gptq", ask={})
    records[4] = failed("hqq", "unavailable", "load", "hqq is not installed")
    records[7] = failed(
        "eetq", "out_of_memory", "train", "CUDA out of memory",
        steps=steps("eetq")[:2], memory=memory("eetq"),
        stderr_tail="Traceback\n  loss.backward()\ntorch.OutOfMemoryError",
    )  # fmt: skip
    return records


# ---- text


def test_the_headline_says_what_where_how_many_and_the_answers():
    text = headline(compare(eight_backends(), {"dtype"}))
    assert "8 short QLoRA runs with 8 backends on NVIDIA GeForce RTX 4090, real weights, all layers" in text
    assert ": all completed." in text
    assert "Lowest memory measured: bnb-nf4-dq; 8.28 GiB at the peak; next: bnb-nf4, 8.61." in text
    assert "Highest speed measured: bf16; 2,412 tokens/s; next: bnb-nf4, 1,699." in text
    assert "What went wrong: Nothing; every run completed; every loss and gradient stayed finite." in text
    assert "CPU" not in text
    assert "overlap" not in text
    assert text.endswith("Allowed difference: effective dtype (bfloat16: 7 others; float16: awq).")
    split = headline(compare(eight_backends()))
    assert "next: bnb-nf4, 8.61; in the largest group of alike runs." in split
    assert split.endswith("group 2: awq (apart by effective dtype).")


def test_the_headline_names_what_went_wrong():
    text = headline(realistic())
    assert "What went wrong: 3 of 8 runs; hqq: unavailable (load); gptq: poisoned: the trained" in text
    assert "eetq: out of memory (train)." in text


def test_a_backend_whose_training_broke_never_leads_alone():
    broken = tuple(step(i, losses=(math.nan,), seconds=0.01) for i in range(8))
    text = headline(compare([record("bf16"), record("gptq", steps=broken)]))
    assert "Highest speed measured: gptq (non finite); 51,200 tokens/s; next: bf16" in text


def test_what_broke_on_synthetic_weights_went_wrong_too():
    broken = (*steps("gptq")[:7], step(7, losses=(math.inf,)))
    text = headline(compare([record("gptq", weights="synthetic", steps=broken)]))
    assert "What went wrong: 1 of 1 run; gptq: 1 of 8 steps not finite." in text
    assert "proves nothing" in headline(compare([record("gptq", weights="synthetic")]))


def test_one_run_alone_is_the_least_of_nothing():
    text = headline(compare([record("gptq")]))
    assert "Memory: gptq; 8.90 GiB at the peak; nothing to compare it with." in text
    assert "Least" not in text
    assert "Speed: bf16 and gptq; " in headline(compare([record(), record("gptq", steps=steps("bf16"))]))


def test_ranges_that_overlap_are_no_rank():
    def shaken(backend, repeat, seconds):
        return record(backend, repeat=repeat, steps=tuple(step(i, seconds=seconds) for i in range(8)))

    noise = (1.0, 1.02, 0.99)
    runs = [
        (backend, repeat, seconds * noise[(repeat + shift) % 3])
        for shift, (backend, seconds) in enumerate((("hqq", 1.0), ("bf16", 1.01), ("gptq", 2.0)))
        for repeat in range(3)
    ]
    text = headline(compare([shaken(*run) for run in runs]))
    assert "Highest speed measured: hqq and bf16; " in text
    assert "tokens/s; cannot be told apart; next: gptq, " in text
    text = headline(compare([shaken(*run) for run in runs[:6]]))
    assert "Speed: hqq and bf16; " in text
    assert "cannot be told apart." in text


def test_a_backend_with_too_few_runs_is_named_without_a_rank():
    runs = [record(backend, repeat=repeat) for backend in ("bf16", "hqq", "eetq") for repeat in range(3)]
    text = headline(compare([*runs, record("bnb-nf4")]))
    assert "Highest speed measured: bf16; " in text
    assert "next: bnb-nf4, 1,699, not ranked: too few runs." in text


def test_options_that_were_replaced_show_what_was_asked():
    asked = record("hqq", ask={"options": {"group_size": 128}})
    assert "group_size=64 (asked: 128)" in page(compare([asked]))
    assert "(asked: 64)" not in page(compare([record("hqq")]))


def test_a_cpu_is_called_a_cpu_and_synthetic_weights_are_not_judged():
    comparison = compare(eight_backends(cpu=True, weights="synthetic"))
    assert "figures of a CPU, not of a GPU" in headline(comparison)
    text = page(comparison)
    assert "stability is not judged" in text
    assert "synthetic weights" in text


def test_one_repeat_is_said_on_the_page():
    assert "gives no interval" in page(compare(eight_backends()))


def test_every_section_is_there():
    text = page(realistic())
    titles = [
        "Comparison", "Will it fit, how fast", "Memory by phase", "Throughput", "Stability",
        "What was identical, and what was not", "Outcome of every run", "Environment", "Repeat it",
        "Raw records",
    ]  # fmt: skip
    for title in titles:
        assert re.search(rf"<h2[^>]*>{re.escape(title)}</h2>", text)


# ---- stability


def part(text, title):
    """The text of the page from one heading to the next of the same or a higher rank."""
    found = re.search(rf"<h([23])[^>]*>{re.escape(title)}</h\1>(.*?)(?=<h[23]|</section>)", text, flags=re.S)
    return html.unescape(found.group(2)) if found else None


def test_every_term_is_explained_where_it_stands():
    scaled = record("eetq", repeat=1, steps=tuple(step(i, loss_scale=1024.0) for i in range(8)))
    comparison = compare([*realistic_records(), scaled, *margin_runs("bnb-nf4", 11)])
    text = page(comparison, triage=triage())
    for title, terms in {
        "Verdict of each run": ["<strong>Healthy</strong>:", "<strong>Poisoned</strong>:", "<strong>Dead</strong>:",
                                "<strong>Non finite</strong>:", "<strong>Spiking</strong>:", "<strong>Not judged</strong>:"],
        "Measures and thresholds": ["robust z", "loss is multiplied by a scale", "doubling in every layer",
                                    "arXiv 2606.00539", "Iglewicz and Hoaglin", "this project's own"],
        "Where it failed first": ["The replay is", "growth is"],
        "What healed it": ["A change heals if"],
        "Headroom": ["Headroom is log2 of"],
        "Fidelity of the gradient": ["Fidelity is how near", "Cosine 1 is", "relative error is", "noise floor"],
        "Stability margin": ["The margin is log2 of"],
        "Triage of a failing run": ["with one thing changed each time"],
    }.items():  # fmt: skip
        for term in terms:
            assert term in part(text, title), (title, term)


def test_the_first_failure_stands_there_with_all_that_is_known():
    text = part(page(realistic()), "Where it failed first")
    for word in (
        "overflow in the forward", "value: Infinity", "the dtype ends at 65,504", FAILING_MODULE, "cuda:0", "step 5",
        "micro-batch 0", "largest value before: 61,440", "grown by a factor of 3.00", "aten.mm", "a matrix product",
        "from inputs of at most 22,522",
    ):  # fmt: skip
        assert word in text
    healed = part(page(realistic()), "What healed it")
    assert "OutOfMemoryError" in healed
    assert "141,358" in healed
    assert re.findall(r"<td>(yes|no|could not be tried)<", healed) == ["no", "could not be tried", "yes"]


def test_a_value_beyond_its_threshold_is_marked_in_words():
    norms = [0.8, 0.7, 0.9, 0.8, 25.0, 0.7, 0.8, 0.9]
    spiking = record("hqq", steps=tuple(step(i, gradient_norm=norm) for i, norm in enumerate(norms)))
    text = part(page(compare([record("bf16"), spiking])), "Measures and thresholds")
    marked = re.findall(
        r'<td class="number beyond"><span class="cell">([^<]*)</span><span class="mark">beyond', text
    )
    assert len(marked) == 2
    assert float(marked[0]) == pytest.approx(25 / 0.8, rel=0.01)
    assert 'class="number beyond"' not in page(compare([record("bf16")]))


def test_headroom_that_ran_out_is_not_hidden_behind_the_lowest_number():
    text = part(page(realistic()), "Verdict of each run")
    assert re.search(
        r'<td class="number beyond"><span class="cell">not finite</span>.*?layer 10, step 5', text, flags=re.S
    )
    assert "else 3.66: forward, layer 9" in text


def test_sections_without_data_leave_no_holes():
    text = page(compare([record("bf16")]))
    for title in ("Where it failed first", "What healed it", "Headroom", "Fidelity of the gradient",
                  "Stability margin", "Triage of a failing run"):  # fmt: skip
        assert part(text, title) is None
    assert part(text, "Measures and thresholds") is not None
    nothing = page(compare([failed("hqq", "unavailable", "load", "x")]))
    assert part(nothing, "Measures and thresholds") is None
    assert "not judged" in nothing


def test_a_comparison_that_failed_says_why_and_shows_no_number():
    made = record(
        "hqq",
        fidelity=fidelity(
            overall=None, layers=(), weight_errors=(), reference_dtype=None, note="it does not fit"
        ),
    )
    text = part(page(compare([made])), "Fidelity of the gradient")
    assert "it does not fit" in text
    assert "<svg" not in text
    assert "0.0" not in text


def test_runs_with_other_projections_stand_in_one_table():
    def of(name):
        error = WeightError(projection=name, relative_error=0.09, worst_module="a", worst_relative_error=0.1)
        return fidelity(weight_errors=(error,))

    text = page(compare([record("bf16", fidelity=of("qkv_proj")), record("hqq", fidelity=of("q_proj"))]))
    table = part(text, "Fidelity of the gradient")
    assert "qkv_proj" in table and "q_proj" in table


def test_runs_of_a_bisection_are_one_line_of_the_margins():
    comparison = compare([*eight_backends(), *margin_runs("bnb-nf4", 11), *margin_runs("hqq", 24)])
    text = page(comparison)
    assert part(text, "Verdict of each run").count("<tr data-status") == 8
    assert "7 runs that only narrow down a margin" in text
    margins = part(text, "Stability margin")
    assert re.findall(r'<td class="number">([^<]*)</td><td class="number">([^<]*)</td>\s*<td class="number">([^<]*)', margins) == [
        ("11", "2,048", "4,096"), ("≥ 24", "16,777,216", MISSING),
    ]  # fmt: skip
    assert "first in model.layers.9.mlp.down_proj" in margins


def test_the_ladder_shows_what_was_tried_what_healed_and_the_settings():
    text = page(compare([overflowing()]), triage=triage())
    ladder = part(text, "Triage of a failing run")
    assert ladder.count("<tr") == 1 + len(triage().rungs) + 1 + len(triage().confirmations)
    assert ladder.count('<tr class="chosen">') == 1
    assert "the smallest change that heals it: bfloat16" in ladder
    assert "not applicable: not enough memory" in ladder
    assert "bnb_4bit_compute_dtype" in ladder


def test_a_triage_in_the_folder_is_part_of_the_report(tmp_path):
    save_triage(tmp_path, triage())
    files = write_report(realistic(), tmp_path)
    assert "Triage of a failing run" in files.html.read_text(encoding="utf-8")
    assert "The ladder of changes" in files.markdown.read_text(encoding="utf-8")
    (tmp_path / "triage.json").write_text("{}", encoding="utf-8")
    with pytest.raises(BrokenFile):
        write_report(realistic(), tmp_path)


def test_a_scaler_at_work_is_nothing_that_went_wrong():
    found = list(steps("hqq"))
    found[0] = step(0, applied=False, gradient_norm=math.inf, loss_scale=65536.0)
    text = headline(compare([record("hqq", steps=tuple(found))]))
    assert "What went wrong: Nothing; every run completed; every loss stayed finite" in text
    assert "the loss scaler skipped 1 update, its work" in text


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"proof": Proof(gradients_reach_adapters=False)}, "dead: adapters that no gradient moves"),
        ({"steps": (*steps("hqq")[:7], step(7, gradient_norm=99.0))}, "spiking: a norm or loss far beyond"),
        ({"weights": "synthetic", "steps": (*steps("hqq")[:7], step(7, gradient_norm=99.0))}, "beyond its threshold: norm over mean before, robust z"),
        ({"first_failure": first_failure(loss=1.0)}, "non finite: NaN or infinity in a loss or a gradient"),
    ],
)  # fmt: skip
def test_every_bad_verdict_is_in_the_headline(changes, words):
    assert words in headline(compare([record("hqq", **changes)]))


def test_long_lists_of_numbers_are_one_line_of_the_raw_record():
    shown = re.findall(
        r'<details class="record">.*?<pre[^>]*>(.*?)</pre>',
        page(compare([probed(record("hqq"))])),
        flags=re.S,
    )
    lines = [line for line in html.unescape(shown[0]).splitlines() if "tensor_norms" in line]
    assert len(lines) == 8
    assert all(line.count(",") > 100 for line in lines)


def test_nothing_outside_the_page_is_named_to_be_loaded():
    text = page(realistic())
    assert not re.search(r'(?:src|href)="(?!#|data:,)', text.replace('xlink:href="#', ""))
    assert "@import" not in text
    assert 'style="' not in text
    assert "default-src &#39;none&#39;" in text
    assert "unsafe" not in text


@pytest.mark.parametrize(
    "changes", [{}, {"status": "crashed", "stage": "train"}, {"cpu": True, "weights": "synthetic"}]
)
def test_a_script_in_any_string_is_inert(changes):
    text = page(compare([planted(EVIL, **changes), record("bf16")]), triage=triage(EVIL))
    assert EVIL not in text
    assert html.escape(EVIL) in text
    assert text.lower().count("<script") == 1


def test_the_raw_records_are_whole():
    comparison = realistic()
    found = re.findall(r'<details class="record">.*?<pre[^>]*>(.*?)</pre>', page(comparison), flags=re.S)
    assert len(found) == 8
    for text, row in zip(found, comparison.rows, strict=True):
        assert json.loads(html.unescape(text)) == json.loads(row.record.model_dump_json())


def test_equal_records_give_the_same_page():
    assert page(realistic()) == page(realistic())


def test_empty_and_all_failed_pages():
    assert "no records" in page(compare([]))
    text = page(compare([failed("hqq", "error", "load", "ValueError: x")]))
    assert "ValueError: x" in text
    assert "none completed" in text


def test_the_report_is_files(tmp_path):
    files = write_report(realistic(), tmp_path / "report")
    assert files.html.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert files.markdown.name == "report.md"
    assert files.csv.read_text(encoding="utf-8").startswith("label,backend")
    assert sorted(path.name for path in files.plots) == sorted(
        p.name for p in (tmp_path / "report/plots").iterdir()
    )
    assert not list(tmp_path.rglob("*.part"))


# ---- in a browser


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    comparison = compare([*realistic_records(), *margin_runs("hqq", 24)], {"dtype"})
    folder = tmp_path_factory.mktemp("report")
    save_triage(folder, triage())
    return comparison, write_report(comparison, folder).html


def column_of(tab, place):
    rows = tab.locator("#comparison-table tbody").first.locator("tr:not(.section)").all()
    return [row.locator("th,td").nth(place).locator(".cell").inner_text() for row in rows]


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [390, 1280])
def test_no_faults_and_no_sideways_scrolling(browser, written, width, scheme):
    tab, faults = opened(browser, written[1], viewport={"width": width, "height": 800}, color_scheme=scheme)
    assert tab.evaluate("document.documentElement.scrollWidth <= innerWidth")
    assert faults == []
    tab.close()


def test_cells_agree_with_the_comparison(browser, written):
    comparison, path = written
    tab, _ = opened(browser, path)
    lines = [line for part in sections(comparison) for line in part.lines]
    rows = tab.locator("#comparison-table tbody tr:not(.section)").all()
    assert len(rows) == len(lines)
    for row, line in zip(rows, lines, strict=True):
        shown = row.locator("th,td").all_inner_texts()
        for text, column in zip(shown, COLUMNS, strict=True):
            assert text.split("\n")[0].strip() == column.text(line).split("\n")[0]
    tab.close()


def test_sorting_by_number_puts_what_is_missing_last_both_ways(browser, written):
    tab, faults = opened(browser, written[1])
    place = [column.field for column in COLUMNS].index("tokens_per_second")
    head = tab.locator("#comparison-table thead th").nth(place)
    head.locator("button").click()
    assert head.get_attribute("aria-sort") == "ascending"
    values = [float(text.replace(",", "")) for text in column_of(tab, place)]
    assert values == sorted(values)
    head.locator("button").click()
    assert column_of(tab, place)[0] == "2,412"
    norms = [column.field for column in COLUMNS].index("gradient_norm_median")
    head = tab.locator("#comparison-table thead th").nth(norms)
    for _ in range(2):
        head.locator("button").click()
        # Within the section of the run that broke; the largest group is another one.
        own = tab.locator("#comparison-table tbody", has_text="NaN / NaN").first
        cells = own.locator(f"tr:not(.section) > :nth-child({norms + 1})")
        assert cells.last.locator(".cell").inner_text() == "NaN / NaN"
    assert faults == []
    tab.close()


def test_copying_a_command(browser, written):
    comparison, path = written
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    tab, faults = opened(context, path)
    tab.get_by_role("button", name="Copy the command of bf16", exact=True).click()
    tab.get_by_text("Copied").wait_for()
    assert tab.evaluate("navigator.clipboard.readText()") == comparison.rows[0].record.command
    assert faults == []
    context.close()


def test_without_javascript_all_is_there(browser, written):
    context = browser.new_context(java_script_enabled=False)
    comparison, path = written
    tab, _ = opened(context, path)
    assert tab.locator("#comparison-table tbody tr[data-status]").count() == len(comparison.rows)
    assert tab.locator("#repeat > .command code").count() == len(comparison.rows)
    assert tab.locator("#verdicts tbody tr").count() == 8
    assert tab.locator("#stability svg[role=img][aria-label]").count() == 6
    context.close()


def test_planted_scripts_do_not_run(browser, tmp_path):
    texts = [
        EVIL,
        '"><img src=x onerror=alert(1)>',
        "</pre></script><svg onload=alert(1)>",
        "$\\frac{1}{2}$ {{ 7*7 }}",
    ]
    for number, text in enumerate(texts):
        save_triage(tmp_path / str(number), triage(text))
        files = write_report(compare([planted(text), record("bf16")]), tmp_path / str(number))
        tab, faults = opened(browser, files.html)
        assert tab.evaluate("document.scripts.length") == 1
        assert tab.evaluate("document.querySelectorAll('[onerror], [onload]').length") == 0
        assert faults == []
        tab.close()
