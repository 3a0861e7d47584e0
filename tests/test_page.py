import html
import json
import math
import re
import shutil

import pytest

from bench.judge.comparison import compare
from bench.show.columns import COLUMNS, sections
from bench.show.page import headline, page
from bench.show.report import write_report
from tests.record_factory import eight_backends, failed, memory, planted, record, step, steps

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
ARGUMENTS = [
    "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
]  # fmt: skip
EVIL = "<script>alert(1)</script>"


def realistic():
    records = eight_backends()
    broken = [
        *steps("gptq")[:5],
        *(step(i, losses=(math.nan,), gradient_norm=math.nan, seconds=0.5) for i in (5, 6, 7)),
    ]
    records[5] = record("gptq", steps=tuple(broken), trainable_weights_finite=False)
    records[4] = failed("hqq", "unavailable", "load", "hqq is not installed")
    records[7] = failed(
        "eetq", "out_of_memory", "train", "CUDA out of memory",
        steps=steps("eetq")[:2], memory=memory("eetq"),
        stderr_tail="Traceback\n  loss.backward()\ntorch.OutOfMemoryError",
    )  # fmt: skip
    return compare(records)


# ---- text


def test_the_headline_says_what_where_how_many_and_the_answers():
    text = headline(compare(eight_backends()))
    assert "8 short QLoRA runs with 8 backends on NVIDIA GeForce RTX 4090, real weights, all layers" in text
    assert ": all completed." in text
    assert "Lowest memory measured: bnb-nf4-dq; 8.28 GiB at the peak; next: bnb-nf4, 8.61." in text
    assert "Highest speed measured: bf16; 2,412 tokens/s; next: bnb-nf4, 1,699." in text
    assert "What went wrong: Nothing; every run completed; every loss and gradient stayed finite." in text
    assert "CPU" not in text
    assert "overlap" not in text


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

    runs = [("hqq", 0, 1.0), ("hqq", 1, 2.0), ("bf16", 0, 1.5), ("bf16", 1, 1.9)]
    assert "but the ranges overlap" in headline(compare([shaken(*run) for run in runs]))
    runs[1] = ("hqq", 1, 1.1)
    assert "overlap" not in headline(compare([shaken(*run) for run in runs]))


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
        "Comparison", "Memory by phase", "Throughput", "Loss and gradient norm",
        "What was identical, and what was not", "Outcome of every run", "Environment", "Repeat it",
        "Raw records",
    ]  # fmt: skip
    for title in titles:
        assert re.search(rf"<h2[^>]*>{re.escape(title)}</h2>", text)


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
    text = page(compare([planted(EVIL, **changes), record("bf16")]))
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
def browser():
    if CHROMIUM is None:
        pytest.skip("no Chromium on this machine")
    api = pytest.importorskip("playwright.sync_api")
    with api.sync_playwright() as playwright:
        chromium = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield chromium
        chromium.close()


def opened(browser, path, **options):
    """The page, and a list that fills with everything it should not do."""
    tab = browser.new_page(**options)
    faults = []
    tab.on("console", lambda message: faults.append(message.text))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("dialog", lambda dialog: faults.append("dialog"))
    tab.on(
        "request", lambda request: None if request.url == path.as_uri() else faults.append(request.url[:80])
    )
    tab.goto(path.as_uri())
    return tab, faults


@pytest.fixture(scope="module")
def written(tmp_path_factory):
    comparison = realistic()
    return comparison, write_report(comparison, tmp_path_factory.mktemp("report")).html


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
        assert column_of(tab, norms)[-1] == "NaN / NaN"
    assert faults == []
    tab.close()


def test_filtering_by_outcome(browser, written):
    tab, _ = opened(browser, written[1])
    tab.get_by_role("button", name="out of memory").click()
    rows = tab.locator("#comparison-table tbody tr[data-status]:visible")
    assert rows.count() == 1
    assert "eetq" in rows.first.inner_text()
    tab.get_by_role("button", name="All", exact=True).click()
    assert tab.locator("#comparison-table tbody tr[data-status]:visible").count() == 8
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
    tab, _ = opened(context, written[1])
    assert tab.locator("#comparison-table tbody tr[data-status]").count() == 8
    assert tab.locator(".command code").count() == 8
    context.close()


def test_planted_scripts_do_not_run(browser, tmp_path):
    texts = [
        EVIL,
        '"><img src=x onerror=alert(1)>',
        "</pre></script><svg onload=alert(1)>",
        "$\\frac{1}{2}$ {{ 7*7 }}",
    ]
    for number, text in enumerate(texts):
        files = write_report(compare([planted(text), record("bf16")]), tmp_path / str(number))
        tab, faults = opened(browser, files.html)
        assert tab.evaluate("document.scripts.length") == 1
        assert tab.evaluate("document.querySelectorAll('[onerror], [onload]').length") == 0
        assert faults == []
        tab.close()
