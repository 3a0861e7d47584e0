"""The raw records inside the page, as far as they have room there, and the file of each of them.

Up to `ROOM_BYTES` every record is embedded as it was written. Of more, the copies lose the probes' arrays (a
number for each layer or tensor in every step) first; what still has no room is named by its file alone. Each
copy says what it lacks.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass

from bench.judge.rows import Row
from bench.record.schema import Record
from bench.record.store import SUFFIX

ROOM_BYTES = 2_500_000
"""For all records together: about a third of the 8 MB that a page of 1,000 runs may have."""
NUMBERS = re.compile(r'\[\n(?:\s|[\d.,eE+-]|null|"NaN"|"-?Infinity")*\]')
"""A JSON list that holds numbers only. No string can look like one, for strings hold no raw line breaks."""
LEFT_OUT = "left out here; the file of the record has it"


@dataclass(frozen=True)
class Embedded:
    """One record on the page."""

    key: str
    file: str
    """Its name beside the page."""
    text: str | None
    """None: there was no room for it."""


@dataclass(frozen=True)
class EmbeddedRecords:
    """All of them, and what was left out in words."""

    records: tuple[Embedded, ...]
    note: str
    """Empty: every record is there, and whole."""

    @property
    def inside(self) -> tuple[Embedded, ...]:
        """Those that can be read on the page."""
        return tuple(one for one in self.records if one.text is not None)

    @property
    def outside(self) -> tuple[Embedded, ...]:
        """Those that are files only."""
        return tuple(one for one in self.records if one.text is None)


def embed(rows: Sequence[Row], first: Sequence[Row] = (), room_bytes: int = ROOM_BYTES) -> EmbeddedRecords:
    """Every record of ``rows`` that has room; ``first``: those that get it before the others."""
    whole = [as_json(row.record) for row in rows]
    if _size(whole) <= room_bytes:
        return EmbeddedRecords(tuple(map(_embedded, rows, whole)), "")
    lean = [_lean(row.record) for row in rows]
    kept = dict(zip(rows, lean, strict=True))
    left, chosen = room_bytes, set()
    for row in (*first, *rows):
        size = len(kept[row].encode())
        if row not in chosen and size <= left:
            chosen.add(row)
            left -= size
    found = tuple(_embedded(row, kept[row] if row in chosen else None) for row in rows)
    return EmbeddedRecords(found, _note(len(chosen), len(rows)))


def _embedded(row: Row, text: str | None) -> Embedded:
    return Embedded(row.record.key, f"{row.record.key}{SUFFIX}", text)


def _size(texts: Sequence[str]) -> int:
    return sum(len(text.encode()) for text in texts)


def _note(inside: int, total: int) -> str:
    probes = "The numbers of the probes for each layer in each step are left out of the copies here"
    if inside == total:
        return f"{probes}; the files of the records have them."
    return (
        f"{probes}, and {inside:,} of {total:,} records have room on the page. The files of the records "
        "have all of it, and lie in the folder of the runs under the names given here."
    )


def as_json(record: Record) -> str:
    """A record as JSON text, in which a list of numbers is one line: the probes have thousands of them."""
    return _with_short_lists(record.model_dump_json(indent=1))


def _lean(record: Record) -> str:
    """The same without the probes' arrays and without line breaks within a step."""
    body = json.loads(record.model_dump_json())
    steps = body.pop("steps")
    if body["fidelity"]:
        body["fidelity"]["layers"] = LEFT_OUT
    for step in steps:
        if step["probe"]:
            step["probe"] = LEFT_OUT
    if body["lora"] and body["lora"]["names"]:
        body["lora"]["names"] = LEFT_OUT
    text = json.dumps(body, indent=1, ensure_ascii=False)
    lines = ",\n  ".join(json.dumps(step, ensure_ascii=False) for step in steps)
    return _with_short_lists(f'{text[:-2]},\n "steps": [\n  {lines}\n ]\n}}' if steps else text)


def _with_short_lists(text: str) -> str:
    return NUMBERS.sub(lambda found: " ".join(found.group(0).split()), text)
