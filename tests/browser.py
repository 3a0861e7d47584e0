"""A real headless Chromium, for the tests of the page and for the gate."""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from playwright.sync_api import Browser, BrowserContext, Page

NAMES = ("chromium", "chromium-browser", "google-chrome")
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
             "--disable-component-update", "--disable-sync"]  # fmt: skip


def find_browser() -> str | None:
    """The path of an installed browser; an error where one is required and there is none."""
    found = next(filter(None, map(shutil.which, NAMES)), None)
    if found is None and os.environ.get("QLORA_BENCH_REQUIRE_BROWSER"):
        raise RuntimeError("a browser is required and none was found")
    return found


@contextmanager
def launched() -> Iterator[Browser]:
    """The browser, started and ended."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=find_browser(), args=ARGUMENTS)
        try:
            yield browser
        finally:
            browser.close()


def opened(browser: Browser | BrowserContext, path: Path, **options: Any) -> tuple[Page, list[str]]:
    """A page file in a tab of its own, and a list that fills with everything that it should not do."""
    tab, faults = browser.new_page(**options), []
    address = path.resolve().as_uri()
    tab.on("console", lambda message: faults.append(message.text))
    tab.on("pageerror", lambda error: faults.append(str(error)))
    tab.on("dialog", lambda dialog: faults.append("dialog"))
    tab.on("request", lambda request: None if request.url == address else faults.append(request.url[:80]))
    tab.goto(address)
    return tab, faults


def browser_problems(page_file: Path) -> list[str]:
    """What goes wrong when a page is opened: console errors, exceptions, requests beyond the file itself."""
    problems: list[str] = []
    address = page_file.resolve().as_uri()
    with launched() as browser:
        page = browser.new_page()
        page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
        page.on("pageerror", lambda error: problems.append(str(error)))
        page.on("request", lambda request: None if request.url == address else problems.append(request.url))
        page.goto(address)
        if not page.locator("table").count():
            problems.append("the page shows no table")
    return problems
