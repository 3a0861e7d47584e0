"""Bad input for the front door: documents that are valid but for a few places, and the command in this process.

``mutants(document)`` changes types, sizes, names and numbers of a valid document where a person or a damaged
disk could; ``damaged(...)`` then cuts, flips and re-encodes its bytes. `Front` runs the real command line
with its own handling of errors, and holds every ending against what is promised of one. It starts no worker:
a command that is accepted ends where it would open its folder of records.
"""

from __future__ import annotations

import io
import json
import math
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from bench import cli
from bench.errors import LONGEST_LINE
from bench.record.store import Store

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""What must never reach a terminal: all control characters but the line feed, and what turns text around."""
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


@st.composite
def damaged(draw: st.DrawFn, text: str) -> bytes:
    """The bytes of ``text``, mostly as they should be and sometimes cut, flipped, or in another encoding."""
    plain = text.encode("utf-8", errors="surrogatepass")
    kind = draw(st.sampled_from(("whole",) * 45 + ("cut", "flipped", "utf-16", "mark", "latin-1", "nul", "repeated", "tail", "crlf")))
    at = draw(st.integers(0, max(len(plain) - 1, 0))) if kind in ("cut", "flipped", "nul") else 0
    match kind:
        case "cut":
            return plain[:at]
        case "flipped":
            return plain[:at] + bytes([plain[at] ^ draw(st.integers(1, 255))]) + plain[at + 1 :] if plain else b"\xff"
        case "utf-16":
            return text.encode("utf-16", errors="surrogatepass")
        case "mark":
            return b"\xef\xbb\xbf" + plain
        case "latin-1":
            return (text + "é").encode("latin-1", errors="replace")
        case "nul":
            return plain[:at] + b"\0" + plain[at:]
        case "repeated":
            return plain + b"\n" + plain
        case "tail":
            return plain + draw(st.sampled_from((b"\0", b"}", b"garbage", b"\xff\xfe", b"\x1a", b"\n\n\n")))
        case "crlf":
            return plain.replace(b"\n", b"\r\n")
    return plain


# ---- the command in this process -------------------------------------------------------------------


class AboutToRunError(BaseException):
    """The command was accepted and would begin to run now."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class Front:
    """The command line in this process, and how many inputs it was given."""

    inputs: int = 0
    refusals: int = 0
    codes: dict[int, int] = field(default_factory=dict)

    def run(self, *arguments: str) -> Ended:
        """One command, through the handling of errors that the real one has. Every other exception is a bug
        and leaves as it is."""
        # As in a terminal: what cannot be encoded is an error on stdout.
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict", newline="")
        err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", newline="")
        given, sys.argv = sys.argv, ["qlora-bench", *arguments]
        code: Any = 0
        self.inputs += 1
        try:
            with redirect_stdout(out), redirect_stderr(err):
                cli.main()
        except SystemExit as end:
            code = end.code
        except AboutToRunError:
            pass
        finally:
            sys.argv = given
        self.codes[code] = self.codes.get(code, 0) + 1
        return Ended(code, _written(out), _written(err))

    def holds(self, arguments: Sequence[str], *names: str) -> Ended:
        """Run a command and hold its ending against the promise: it is done, or refused in one line that has
        one of ``names`` in it."""
        ended = self.run(*arguments)
        shown = f"{[a[:200] for a in arguments]} ended with {ended.code}: {ended.err[:2000]}"
        assert ended.code in (0, 1, 2), shown
        assert not CONTROL.search(ended.out), f"{shown}: {CONTROL.search(ended.out)} in {ended.out[:2000]!r}"
        assert not CONTROL.search(ended.err), f"{shown}: {CONTROL.search(ended.err)}"
        if ended.code == 2:
            self.refusals += 1
            assert ended.out == "", shown
            assert ended.err.startswith("qlora-bench: "), shown
            assert ended.err.endswith("\n"), shown
            assert ended.err.count("\n") == 1, shown
            assert len(ended.err) <= LONGEST_LINE + 20, shown
            assert not names or any(name in ended.err for name in names), f"{shown} names none of {names}"
        return ended


def _written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode("utf-8")  # type: ignore[attr-defined]


@pytest.fixture
def front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    """The front door, in a folder of its own, without a network and without workers."""

    def opened(store: Store) -> None:
        prove(store)
        raise AboutToRunError

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no network in this test")

    def start(*_: Any, **__: Any) -> None:
        raise AboutToRunError

    prove = Store.open_for_writing
    monkeypatch.setattr(Store, "open_for_writing", opened)
    monkeypatch.setattr("bench.run.sweep.run_sweep", start)
    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.setenv("QLORA_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    yield Front()


# ---- how many --------------------------------------------------------------------------------------

Budget = Mapping[str, int]


def budgets(**of_each: tuple[int, int]) -> tuple[Budget, Budget]:
    """Inputs of each subject in the quick part and in the soak part."""
    return {name: both[0] for name, both in of_each.items()}, {name: both[1] for name, both in of_each.items()}


COUNTED: dict[str, int] = {}
"""Subject -> inputs that its soak part gave to the command in this process."""


def fuzzed(subject: str, quick: Budget, soak: Budget) -> Callable[[Callable[[Front, st.DataObject], None]], Any]:
    """A test of one input, run for as many inputs as the budgets say: the same ones every time in the quick
    part, others every time in the soak part. The count is what the command was really given."""

    def decorate(test: Callable[[Front, st.DataObject], None]) -> Any:
        @pytest.mark.parametrize(
            "part", ["quick", pytest.param("soak", marks=[pytest.mark.soak, pytest.mark.timeout(7200)])]
        )
        def repeated(part: str, front: Front, record_property: Callable[[str, object], None]) -> None:
            wanted = (quick if part == "quick" else soak)[subject]

            @settings(
                max_examples=wanted, deadline=None, database=None, derandomize=part == "quick", print_blob=True,
                suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
            )  # fmt: skip
            @given(data=st.data())
            def each(data: st.DataObject) -> None:
                test(front, data)

            each()
            record_property("inputs", front.inputs)
            print(f"{subject}: {front.inputs} inputs, {front.refusals} refused, ended with {front.codes}")
            assert front.inputs >= wanted
            # A test in which nothing is refused, or everything, has stopped to test anything.
            assert 0 < front.refusals < front.inputs
            if part == "soak":
                COUNTED[subject] = front.inputs

        repeated.__doc__ = test.__doc__
        repeated.__module__ = test.__module__
        return repeated

    return decorate
