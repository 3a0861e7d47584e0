"""Pictures of real reports, for the README and ``docs/gallery.md``, out of the committed records.

    python -m tests.gallery      what ``make gallery`` runs; it needs a Chromium

A picture is made again when the page or the records have changed so that the old one misleads.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

from bench.cli.reports import written_report
from bench.errors import UserError
from bench.record.joining import join
from tests.browser import find_browser, launched, opened

ROOT = Path(__file__).resolve().parents[1]
RECORDS = ROOT / "results" / "xeon-2-cores"
PICTURES = ROOT / "docs"


@dataclass(frozen=True)
class Picture:
    """One view of one report."""

    name: str
    records: str
    """Folder under `RECORDS`."""
    section: str | None = None
    """Id of the heading or section at the top of the picture; None: the page's own."""
    width: int = 1280
    height: int = 1180
    dark: bool = False


GALLERY = (
    Picture("report", "smollm2-135m"),
    Picture("gallery/smollm2-comparison", "smollm2-135m", "comparison"),
    Picture("gallery/smollm2-stability", "smollm2-135m", "loss"),
    Picture("gallery/smollm2-phone", "smollm2-135m", width=390, height=844, dark=True),
    Picture("gallery/forecast-top", "forecast-proxy"),
    Picture("gallery/forecast-lines", "forecast-proxy", "forecast", height=1500),
)


def draw(picture: Picture, page: Path, into: Path) -> Path:
    """Write one picture of a page, as PNG."""
    file = into / f"{picture.name}.png"
    file.parent.mkdir(parents=True, exist_ok=True)
    with launched() as browser:
        tab, faults = opened(
            browser,
            page,
            viewport={"width": picture.width, "height": picture.height},
            color_scheme="dark" if picture.dark else "light",
            reduced_motion="reduce",
        )
        if picture.section:
            tab.locator(f"#{picture.section}").evaluate("section => section.scrollIntoView()")
        tab.screenshot(path=file)
        if faults:
            raise UserError(f"the page of '{picture.records}' is not well: {faults[0]}")
    return file


def main() -> int:
    """Write every picture of the gallery. 2: there is no browser."""
    if find_browser() is None:
        print("no Chromium on this machine", file=sys.stderr)
        return 2
    pages: dict[str, Path] = {}
    for picture in GALLERY:
        if picture.records not in pages:
            # Beside the records, since a forecast that stands there is part of the page; git ignores it.
            folder = RECORDS / picture.records
            _, files = written_report(join([folder]).records, folder, formats=["html"])
            assert files.html is not None
            pages[picture.records] = files.html
        print(draw(picture, pages[picture.records], PICTURES).relative_to(ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
