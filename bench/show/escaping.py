"""A record's texts as what they are in a table: no markup of Markdown, no formula of a spreadsheet.

HTML is escaped by its templates, and a terminal's control characters by ``bench.errors.printable``.
"""

from __future__ import annotations

import re

from bench.errors import printable

EMPHASIS = re.compile(r"(?<![^\W_])_|_(?![^\W_])")
"""An underscore that is not within a word: of __init__, not of up_proj (CommonMark 0.31, section 6.2)."""


def escaped(text: str) -> str:
    """Text that Markdown shows as it is: no markup, no HTML, no new table cell or line."""
    for sign in "\\`*~[]|":
        text = text.replace(sign, f"\\{sign}")
    text = EMPHASIS.sub(r"\\_", text)
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return printable(" ".join(text.split()))


FORMULA = ("=", "+", "-", "@")
"""What a formula begins with."""


def cell_text(text: str) -> str:
    """A text of a record as a cell of a CSV: printable, and no formula."""
    text = printable(text)
    # Spreadsheets pass over leading white space.
    return f"'{text}" if text.lstrip().startswith(FORMULA) else text
