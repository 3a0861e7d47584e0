"""Errors that a person caused or can mend: one line each, with a hint.

    UserError                 exit code 2, printed by bench.cli and nowhere else
    ├── BadValue              a name or value that is not valid; names the nearest valid one
    ├── MissingLibrary        an importable package that a backend needs is not there
    ├── MissingModel          a model that is neither on disk nor to be fetched
    ├── BrokenFile            a file that cannot be read as what it should be
    └── CannotWrite           a file that the system does not let us write

Every other exception is a bug of ours and keeps its traceback.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable

LONGEST_LINE = 1000
"""Characters of the line that a person reads; what is longer loses its middle."""
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_BLANKS = re.compile(r"(?:[ \t\n]|\r\n)+")


class UserError(Exception):
    """A problem to be shown as one line; ``hint`` says what to do."""

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        """The single line a person reads."""
        line = self.message if self.hint is None else f"{self.message}; {self.hint}"
        return one_line(line)


class BadValue(UserError):
    """A value that is not among the valid ones."""


class MissingLibrary(UserError):
    """A backend's package is not importable here."""


class MissingModel(UserError):
    """A model is neither on this disk nor to be fetched now."""


class BrokenFile(UserError):
    """A file is not what its name or place promises."""


class CannotWrite(UserError):
    """A file cannot be written: the disk is full, read-only, or gone."""


def printable(text: str) -> str:
    """``text`` without what a terminal would obey: control characters (but the line feed and the tab), signs
    that turn the direction of writing, and halves of surrogate pairs are spelt out, as in ``\\x1b``.

    Whatever comes out of a file that anyone may have made goes through here before it is printed.
    """
    return _UNPRINTABLE.sub(_spelt_out, text)


def _spelt_out(found: re.Match[str]) -> str:
    return ascii(found.group())[1:-1]


def one_line(text: str) -> str:
    """``text`` as one printable line of at most `LONGEST_LINE` characters."""
    # Not by `split`, to which a lone carriage return and a dozen more are space too: a name that has one
    # would be shown as another.
    line = printable(_BLANKS.sub(" ", text).strip(" "))
    if len(line) <= LONGEST_LINE:
        return line
    half = (LONGEST_LINE - 3) // 2
    return f"{line[:half]}...{line[-half:]}"


def unknown(kind: str, value: str, valid: Iterable[str]) -> BadValue:
    """Error for a name that does not exist, naming the nearest valid one or all of them."""
    choices = sorted(valid)
    near = nearest(value, choices)
    hint = f"did you mean '{near}'?" if near else f"valid: {', '.join(choices)}"
    return BadValue(f"unknown {kind} '{value}'", hint)


def nearest(value: str, valid: Iterable[str]) -> str | None:
    """The valid name closest to ``value``, or None when nothing is close."""
    by_folded = {name.casefold(): name for name in valid}
    close = difflib.get_close_matches(value.casefold(), by_folded, n=1, cutoff=0.5)
    return by_folded[close[0]] if close else None
