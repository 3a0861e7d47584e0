"""Paths among the arguments: ``GivenPath()`` in the place of ``click.Path``."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import click


class GivenPath(click.Path):
    """A path, as `Path`, that is not empty: '' would be the folder one stands in, and is most often a shell's
    variable that was not set."""

    def __init__(self, **limits: Any) -> None:
        super().__init__(path_type=Path, **limits)

    def convert(
        self, value: str | os.PathLike[str], param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:
        """As click, with an empty text refused."""
        if value == "":
            self.fail("it is empty: expected a file or a folder", param, ctx)
        return super().convert(value, param, ctx)
