"""Filters of the page's templates: a line of text as escaped markup, with its parts told apart."""

from __future__ import annotations

import re

from markupsafe import Markup, escape


def standing(line: str) -> Markup:
    """Escape a line such as "hqq: 4 % more memory; healthy", with the backend in front set off."""
    name, colon, rest = line.partition(": ")
    whole = f"<strong>{escape(name)}</strong>{colon}{escape(rest)}" if colon else escape(line)
    return Markup(whole)  # noqa: S704  (escaped right here)


def label(text: str) -> Markup:
    """Escape a run's name; its settings, which can be long, may be broken into lines and the backend not."""
    backend, space, settings = text.partition(" ")
    broken = f' <span class="settings">{escape(settings)}</span>' if space else ""
    return Markup(f'<span class="flag">{escape(backend)}</span>{broken}')  # noqa: S704  (escaped right here)


def unbroken_flags(text: str) -> Markup:
    """Escape ``text``, and keep a command line option such as --steps on one line."""
    whole = re.sub(r"--[a-z]+", r'<span class="flag">\g<0></span>', str(escape(text)))
    return Markup(whole)  # noqa: S704  (escaped in the line above)
