"""What the page's script does, in a real browser: narrow down, hide columns, highlight, copy, print."""

import re

import pytest

from bench.judge.comparison import compare
from bench.record.triage import save_triage
from bench.show.columns import COLUMNS, sections
from bench.show.page import page
from tests.browser import find_browser, launched, opened
from tests.fit_factory import forecast
from tests.record_factory import eight_backends, fidelity, margin_runs, probed, record, triage
from tests.test_page import realistic_records


@pytest.fixture(scope="module")
def browser():
    if find_browser() is None:
        pytest.skip("no Chromium on this machine")
    pytest.importorskip("playwright.sync_api")
    with launched() as chromium:
        yield chromium


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    """A page with every section and every figure: failures, repeats, margins, a triage, a forecast."""
    folder = tmp_path_factory.mktemp("full")
    repeated = [made.model_copy(update={"fidelity": fidelity()}) for made in map(probed, eight_backends(repeats=3))]
    comparison = compare([*repeated, *realistic_records()[4:6], *margin_runs("hqq", 11)], {"dtype"})
    save_triage(folder, triage())
    (folder / "report.html").write_text(page(comparison, None, triage(), forecast()), encoding="utf-8")
    return comparison, folder / "report.html"


def shown_lines(tab):
    return tab.locator("#comparison-table tbody tr[data-status]:visible")


def choose(tab, title, text):
    tab.locator(f"label:has-text('{title}') select").first.select_option(label=text)


def test_narrowing_down_by_outcome(browser, full):
    comparison, path = full
    tab, faults = opened(browser, path)
    every = shown_lines(tab).count()
    choose(tab, "Outcome", "unavailable")
    assert shown_lines(tab).count() == 1
    assert "hqq" in shown_lines(tab).first.inner_text()
    assert tab.locator("#found").inner_text() == f"1 of {every} lines"
    # Every table of runs follows, and sections that have nothing left go.
    assert tab.locator("#outcomes tbody tr:visible").count() == 1
    tab.get_by_role("button", name="Show all").click()
    assert shown_lines(tab).count() == every == sum(len(part.lines) for part in sections(comparison))
    assert faults == []
    tab.close()


def test_columns_are_hidden_and_come_back(browser, full):
    tab, faults = opened(browser, full[1])
    place = [column.title for column in COLUMNS].index("Tokens/s")
    cell = tab.locator("#comparison-table tbody tr[data-status]").first.locator("th,td").nth(place)
    assert cell.is_visible()
    tab.get_by_label("Speed", exact=True).uncheck()
    assert not cell.is_visible()
    tab.get_by_label("Speed", exact=True).check()
    assert cell.is_visible()
    assert faults == []
    tab.close()


FAINT = "all => all.map(one => [one.dataset.backend, Number(getComputedStyle(one).opacity) < 0.5])"


def test_a_backend_is_highlighted_in_every_figure_and_table_at_once(browser, full):
    tab, faults = opened(browser, full[1], reduced_motion="reduce")
    figures = tab.locator("figure svg[role=img]").all()
    assert len(figures) >= 16
    for keys in (False, True):
        chip = tab.get_by_role("button", name="bnb-nf4", exact=True)
        if keys:
            chip.focus()
            tab.keyboard.press("Enter")
        else:
            chip.click()
        assert chip.get_attribute("aria-pressed") == "true"
        for figure in figures:
            states = figure.locator("[data-backend]").evaluate_all(FAINT)
            name = figure.get_attribute("aria-label")[:60]
            assert states, name
            assert all(faint == (owner != "bnb-nf4") for owner, faint in states), name
        rows = tab.locator("tr[data-backend]").evaluate_all(FAINT)
        assert {owner for owner, faint in rows if not faint} == {"bnb-nf4"}
        tab.keyboard.press("Escape")
        tab.get_by_role("heading", level=1).hover()
        chip.blur()
        assert not any(faint for _, faint in tab.locator("[data-backend]").evaluate_all(FAINT))
    assert faults == []
    tab.close()


def test_a_mark_in_a_figure_and_the_name_of_a_row_highlight_too(browser, full):
    tab, _ = opened(browser, full[1], reduced_motion="reduce")
    tab.locator("#comparison-table tr[data-backend=hqq] > th").first.click()
    assert tab.get_by_role("button", name="hqq", exact=True).get_attribute("aria-pressed") == "true"
    tab.keyboard.press("Escape")
    tab.locator("#memory figure").first.locator("svg g[data-backend=gptq] path").first.click()
    assert tab.get_by_role("button", name="gptq", exact=True).get_attribute("aria-pressed") == "true"
    tab.close()


def test_copying_settings(browser, tmp_path):
    context = browser.new_context(permissions=["clipboard-read", "clipboard-write"])
    asked = {"options": {"quant_type": "nf4", "double_quantization": True}}
    path = tmp_path / "report.html"
    runs = [record("bnb-nf4-dq", ask=asked), record("bnb-nf4", ask={"options": {}})]
    path.write_text(page(compare(runs), ()), encoding="utf-8")
    tab, faults = opened(context, path)
    # A record that lacks options has no settings, and no guessed ones.
    assert tab.locator("#repeat details").count() == 1
    tab.locator("#repeat summary").click()
    tab.get_by_role("button", name="Copy the axolotl (YAML) settings of bnb-nf4-dq", exact=True).click()
    tab.get_by_text("Copied").wait_for()
    assert "load_in_4bit: true" in tab.evaluate("navigator.clipboard.readText()")
    assert faults == []
    context.close()


def test_tools_are_not_there_without_javascript(browser, full):
    context = browser.new_context(java_script_enabled=False)
    tab, _ = opened(context, full[1])
    assert not tab.locator("#tools").is_visible()
    assert not tab.locator("#highlight").is_visible()
    assert tab.locator("figure svg[role=img]").count() >= 16
    context.close()


def test_on_paper_it_is_light_open_whole_and_without_tools(browser, full):
    tab, _ = opened(browser, full[1], color_scheme="dark", viewport={"width": 1040, "height": 800})
    tab.emulate_media(media="print")
    tab.evaluate("dispatchEvent(new Event('beforeprint'))")
    assert tab.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    for hidden in ("nav", "#tools", "#records", ".command button"):
        assert not tab.locator(hidden).first.is_visible()
    assert tab.locator("#thresholds").is_visible()
    wide = "all => all.filter(one => one.getBoundingClientRect().right > innerWidth + 1).map(one => one.id || one.className)"
    assert tab.locator("table").evaluate_all(wide) == []
    tab.evaluate("dispatchEvent(new Event('afterprint'))")
    assert tab.locator("details[open]").count() == 0
    tab.close()


def test_every_figure_says_in_words_what_it_shows(full):
    text = full[1].read_text(encoding="utf-8")
    found = re.findall(r'<svg xmlns[^>]* role="img" aria-label="([^"]+)"', text)
    assert len(found) == text.count("<svg xmlns") >= 16
    assert len(set(found)) == len(found)
