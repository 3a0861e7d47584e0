"""Values of a record in words, as tables, warnings and names have them."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping


def in_words(value: object) -> str:
    """A value by itself; of a list or a mapping, all of it."""
    if isinstance(value, str):
        return str(value)
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} x {in_words(part)}" for name, part in value.items()) or "none"
    if isinstance(value, tuple):
        return counted(str(part) for part in value)
    return str(value)


def counted(parts: Iterable[str]) -> str:
    """A list in words, in which equal parts are counted."""
    counts = Counter(parts).items()
    return ", ".join(part if count == 1 else f"{count} x {part}" for part, count in counts)


def short(text: str) -> str:
    """A value in a sentence: of a digest or a commit as much as tells it apart."""
    return text[:12] if len(text) >= 40 and re.fullmatch(r"[0-9a-f]{40,}", text) else text
