"""axe-core over the page in a real browser: nothing that keeps people from reading or reaching it.

The script comes with a package of the development extra. The page's policy lets no foreign script in, so it is
bypassed here, and here only.
"""

from importlib.resources import files

import pytest

from bench.judge.comparison import compare
from bench.record.store import Store
from bench.record.triage import save_triage
from bench.show.page import page
from bench.show.report import write_report
from tests.browser import find_browser, launched
from tests.fit_factory import forecast
from tests.record_factory import eight_backends, failed, margin_runs, triage
from tests.sweep_factory import sweep
from tests.test_imports import ROOT
from tests.test_page import realistic_records

GRAVE = ("serious", "critical")
FOUND = """async () => (await axe.run({resultTypes: ["violations"]})).violations.map(
    one => ({id: one.id, impact: one.impact, nodes: one.nodes.map(node => node.target.join(" ")).slice(0, 5)}))"""


def committed(folder):
    return write_report(compare(list(Store(ROOT / "results").records())), folder, ("html",)).html


def failures(folder):
    failing = [failed(one.request.backend, "crashed", "train", "killed by signal 9") for one in eight_backends()]
    return write_report(compare([*realistic_records(), *failing[5:]]), folder, ("html",)).html


def with_triage(folder):
    save_triage(folder, triage())
    runs = [*realistic_records(), *margin_runs("hqq", 11)]
    return write_report(compare(runs), folder, ("html",)).html


def with_forecast(folder):
    path = folder / "report.html"
    path.write_text(page(compare(eight_backends(repeats=3)), None, None, forecast()), encoding="utf-8")
    return path


def many_runs(folder):
    return write_report(compare(sweep(200)), folder, ("html",)).html


@pytest.fixture(scope="module")
def browser():
    if find_browser() is None:
        pytest.skip("no Chromium on this machine")
    pytest.importorskip("playwright.sync_api")
    with launched() as chromium:
        yield chromium


# One page with most of what there is in the quick tests; each of the others takes as long again.
@pytest.mark.parametrize("make", [
    with_triage, *(pytest.param(make, marks=pytest.mark.soak) for make in (committed, failures, with_forecast, many_runs))
])
def test_axe_finds_nothing_grave(browser, tmp_path, make):
    script = files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8")
    path = make(tmp_path)
    for scheme, width in (("light", 1440), ("dark", 390)):
        context = browser.new_context(
            bypass_csp=True, color_scheme=scheme, viewport={"width": width, "height": 900}
        )
        tab = context.new_page()
        tab.goto(path.as_uri())
        tab.evaluate(script)
        found = tab.evaluate(FOUND)
        assert [one for one in found if one["impact"] in GRAVE] == [], (make.__name__, scheme)
        context.close()


def test_the_script_is_axe_and_finds_what_is_wrong(browser):
    """A test that could not fail would prove nothing."""
    tab = browser.new_page()
    tab.set_content("<html lang=en><title>x</title><main><h1>x</h1><img src='data:,'><button></button></main>")
    tab.evaluate(files("axe_playwright_python").joinpath("axe.min.js").read_text(encoding="utf-8"))
    assert {"image-alt", "button-name"} <= {one["id"] for one in tab.evaluate(FOUND)}
    tab.close()
