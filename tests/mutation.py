"""Documents that are valid but for a few places, and files that are damaged.

``mutants(document)`` changes types, sizes, names and numbers of a valid document where a person or a program
could; ``damaged(text)`` cuts, flips and re-encodes its bytes. ``spelt`` and ``spelt_toml`` write what neither
``json`` nor any TOML writer would.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hypothesis import strategies as st

DEPTH = 20_000
"""Nested so deeply that a reader which recurses for each level gives up."""


@dataclass(frozen=True)
class Raw:
    """Text that is put into a document as it is."""

    text: str


TEXTS = (
    "", " ", "\n", "NaN", "Infinity", "-inf", "null", "true", "0", "-1", "1e999", "é", "\u202egnirts", "\U0001f9e8" * 3,
    "a\0b", "\x1b[31mred\x1b]0;title\x07", "\x9b2J", "\ud800", "..", "../../etc/passwd", "/dev/null", "/proc/self/mem",
    "<script>alert(1)</script>", "=1+1", "$\\frac{1}{0}$", "%s%n{0}{{7*7}}", "[bold]x[/nonsense]", "x" * 20_000, "a.b.c", "\t",
)  # fmt: skip
NUMBERS = (
    0, -1, 1, 2, 7, 255, 2**31, -(2**31), 2**53 + 1, 2**63, 2**64, -(10**30), 10**400, 0.0, -0.0, 0.5, -0.5, 1e-320,
    5e-324, 1e16, 1e300, 1.7976931348623157e308, -1e308, math.nan, math.inf, -math.inf,
)  # fmt: skip
SHAPES: tuple[Any, ...] = (
    None, True, False, [], {}, [[]], [None], {"": None}, {"a": {"b": []}}, [0] * 300, [1.5, "x", None],
    Raw("9" * 5000), Raw("1e999"), Raw("-1e999"), Raw("0x10"), Raw("[" * DEPTH + "]" * DEPTH), Raw('{"a":' * DEPTH + "1" + "}" * DEPTH),
    Raw("01"), Raw("'x'"), Raw(""), Raw(","),
)  # fmt: skip
ODD: tuple[Any, ...] = (*TEXTS, *NUMBERS, *SHAPES)


# ---- documents -----------------------------------------------------------------------------------

Place = tuple[Any, ...]


def places(value: Any, path: Place = ()) -> list[Place]:
    """Every place of a document, the whole left out."""
    inner: Sequence[tuple[Any, Any]] = ()
    if isinstance(value, dict):
        inner = list(value.items())
    elif isinstance(value, list):
        inner = list(enumerate(value))
    return [p for key, part in inner for p in [(*path, key), *places(part, (*path, key))]]


def changed(document: Any, place: Place, change: Callable[[Any, Any], None]) -> Any:
    """A copy of ``document`` in which ``change`` was given the container of ``place`` and its last key."""
    copy = json.loads(json.dumps(document)) if not _holds_raw(document) else _copied(document)
    inside = copy
    for key in place[:-1]:
        inside = inside[key]
    change(inside, place[-1])
    return copy


def _holds_raw(value: Any) -> bool:
    if isinstance(value, dict):
        return any(map(_holds_raw, value.values()))
    return isinstance(value, Raw) or (isinstance(value, list) and any(map(_holds_raw, value)))


def _copied(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copied(part) for key, part in value.items()}
    return [_copied(part) for part in value] if isinstance(value, list) else value


@st.composite
def mutants(draw: st.DrawFn, document: Any, most: int = 3, *, alike: int = 4) -> Any:
    """``document`` with one to ``most`` places changed; ``alike`` of ten changes keep the kind of a value, so
    that what reads the document must look at it twice."""
    for _ in range(draw(st.sampled_from((1, 1, *range(1, most + 1))))):
        there = places(document)
        if not there:
            break
        place = there[draw(st.integers(0, len(there) - 1))]
        if draw(st.integers(0, 9)) < alike:
            document = changed(document, place, _kept_kind(draw(st.integers(0, 2**16))))
            continue
        odd = draw(st.sampled_from(ODD))
        kind = draw(st.sampled_from(("value", "value", "value", "gone", "renamed", "more", "twice", "moved", "scaled")))
        other = there[draw(st.integers(0, len(there) - 1))] if kind == "moved" else place
        document = changed(document, place, _change(kind, odd, document, other))
    return document


WHOLE = [number for number in NUMBERS if isinstance(number, int)]
WORDS = ("NaN", "Infinity", "-Infinity")
"""How the records spell numbers that are not finite."""


def _kept_kind(choice: int) -> Callable[[Any, Any], None]:
    """Another value of the kind that is there."""

    def change(inside: Any, key: Any) -> None:
        value = inside[key]
        if isinstance(value, bool):
            inside[key] = not value
        elif value is None:
            inside[key] = (0, -1, 1.5, "", "x", [], {}, True)[choice % 8]
        elif isinstance(value, int):
            inside[key] = [*WHOLE, value + 1, value - 1, -value][choice % (len(WHOLE) + 3)]
        elif isinstance(value, float) or value in WORDS:
            found = [*NUMBERS, *WORDS, *WORDS, value][choice % (len(NUMBERS) + 7)]
            # JSON has no word for them; the records write strings.
            inside[key] = json.loads(json.dumps(found), parse_constant=str)
        elif isinstance(value, str):
            inside[key] = TEXTS[choice % len(TEXTS)]
        elif isinstance(value, list):
            halves = [[], value[: len(value) // 2], value[::-1], value * 2, [*value, *value[:1]]]
            inside[key] = _copied(halves[choice % len(halves)])
        elif isinstance(value, dict):
            inside[key] = dict(list(value.items())[: choice % (len(value) + 1)])

    return change


def _change(kind: str, odd: Any, document: Any, other: Place) -> Callable[[Any, Any], None]:
    def change(inside: Any, key: Any) -> None:
        match kind:
            case "gone":
                del inside[key]
            case "renamed" if isinstance(inside, dict):
                inside[f"{key}s" if not isinstance(odd, str) else odd] = inside.pop(key)
            case "more" if isinstance(inside, dict):
                inside[odd if isinstance(odd, str) else "mood"] = odd
            case "more":
                inside.extend([inside[key]] * 40)
            case "twice" if isinstance(inside, dict):
                inside[key] = Raw(f"{spelt(inside[key])},{json.dumps(key)}:{spelt(odd)}")
            case "moved":
                found = document
                for part in other:
                    found = found[part]
                inside[key] = _copied(found)
            case "scaled" if isinstance(inside[key], int | float) and not isinstance(inside[key], bool):
                inside[key] = -inside[key] if odd is None or not isinstance(odd, int | float) else inside[key] * 10**17
            case _:
                inside[key] = odd

    return change


def spelt(value: Any) -> str:
    """As JSON, `Raw` parts as they are."""
    if isinstance(value, Raw):
        return value.text
    if isinstance(value, dict):
        return "{" + ",".join(f"{json.dumps(str(key))}:{spelt(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(spelt, value)) + "]"
    return json.dumps(value)


def spelt_toml(document: Mapping[str, Any]) -> str:
    """As TOML, a line a key, inner tables inline; what TOML cannot say (null) is left empty."""
    return "".join(f"{_toml_key(key)} = {_toml(value)}\n" for key, value in document.items())


def _toml(value: Any) -> str:
    if isinstance(value, Raw):
        return value.text.replace(":", "=") if value.text.startswith("{") else value.text
    if isinstance(value, dict):
        return "{" + ", ".join(f"{_toml_key(key)} = {_toml(part)}" for key, part in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    if isinstance(value, float):
        return repr(value)
    return "" if value is None else json.dumps(value)


def _toml_key(key: str) -> str:
    return key if re.fullmatch(r"[A-Za-z0-9_-]+", key) else json.dumps(key)


DAMAGES: Mapping[str, Callable[[bytes, int, int], bytes]] = {
    "cut": lambda plain, at, _: plain[:at],
    "flipped": lambda plain, at, bit: plain[:at] + bytes([plain[at] ^ 1 << bit]) + plain[at + 1 :] if plain else b"\xff",
    "nul": lambda plain, at, _: plain[:at] + b"\0" + plain[at:],
    "utf-16": lambda plain, _, __: plain.decode("utf-8", errors="replace").encode("utf-16"),
    "mark": lambda plain, _, __: b"\xef\xbb\xbf" + plain,
    "latin-1": lambda plain, _, __: plain + "é".encode("latin-1"),
    "repeated": lambda plain, _, __: plain + b"\n" + plain,
    "tail": lambda plain, _, bit: plain + (b"\0", b"}", b"garbage", b"\xff\xfe", b"\x1a", b"\n\n\n", b",", b" ")[bit],
    "crlf": lambda plain, _, __: plain.replace(b"\n", b"\r\n"),
}
"""What can happen to a file: from its bytes, a place in them and a number below 8."""
WHOLE_OF_TEN = 8


@st.composite
def damaged(draw: st.DrawFn, text: str) -> bytes:
    """The bytes of ``text``, mostly as they should be and sometimes cut, flipped, or in another encoding."""
    plain = text.encode("utf-8", errors="surrogatepass")
    if draw(st.integers(0, 9)) < WHOLE_OF_TEN:
        return plain
    damage = DAMAGES[draw(st.sampled_from(sorted(DAMAGES)))]
    return damage(plain, draw(st.integers(0, max(len(plain) - 1, 0))), draw(st.integers(0, 7)))
