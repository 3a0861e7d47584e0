"""Commands that take the options of ``run``, but for some that they replace or set themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import click


class Narrowed(click.Command):
    """A command without the parameters named in ``without``; one of its own may have the same flag."""

    def __init__(
        self, name: str | None, *, without: Sequence[str], params: list[click.Parameter], **more: Any
    ) -> None:
        kept = [parameter for parameter in params if parameter.name not in without]
        super().__init__(name, params=kept, **more)
