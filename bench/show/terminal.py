"""The way to a terminal, on which no text of a file can move the cursor, change colours or set a title.

``Terminal(...)`` is rich's console and ``say(text)`` a plain line; commands print with these and with nothing
else. Records, logs and presets may have been made by anyone (`bench.errors.printable`).
"""

from __future__ import annotations

from collections.abc import Iterable

import click
from rich.console import Console, ConsoleOptions, RenderableType
from rich.segment import Segment

from bench.errors import printable


class Terminal(Console):
    """A console that obeys its own styles only: what it is given to print is text."""

    def render(
        self, renderable: RenderableType, options: ConsoleOptions | None = None
    ) -> Iterable[Segment]:
        """As rich, with every text printable. Control segments are rich's own (a live display)."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else printable(text), style, control)


def say(text: str, *, newline: bool = True) -> None:
    """Print text on stdout, and nothing that a terminal would obey."""
    click.echo(printable(text), nl=newline)
