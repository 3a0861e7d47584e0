"""JSON that somebody else wrote: read whole, or refused with one reason.

``parsed(text)`` is ``json.loads`` without its surprises: whatever is wrong is a ValueError.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

WHOLE_NUMBERS = range(-(2**63), 2**63)
"""Those of 64 bits: none that is recorded comes near the ends, and what is derived from a longer one (a mean,
a place in a figure) would leave the range of floats."""


def parsed(text: str | bytes, whole: Callable[[str], int] = int) -> Any:
    """The value of a JSON text; ``whole`` reads its whole numbers. Raises ValueError, with the reason.

    Besides what is no JSON, that is what is nested more deeply than can be read, and text that holds half of
    a surrogate pair: JSON can spell it, and no file, tokenizer or terminal can take it.
    """
    try:
        value = json.loads(text, parse_int=whole)
        json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair, which is no text") from None
    return value


def endless_numbers(value: Any, path: str = "") -> Iterator[str]:
    """Dotted path of every whole number in ``value`` that is none of `WHOLE_NUMBERS`."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from endless_numbers(inner, f"{path}.{name}" if path else str(name))
    elif isinstance(value, list | tuple):
        for place, inner in enumerate(value):
            yield from endless_numbers(inner, f"{path}[{place}]")
    elif isinstance(value, int) and value not in WHOLE_NUMBERS:
        yield path
