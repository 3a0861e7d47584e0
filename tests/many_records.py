"""Thousands of records of the size of real ones: those under results/, multiplied.

``write_many(base, new, count)`` makes two folders to compare. Everything that a record has is in them, at its size;
what makes one run another (seed, repeat, digests, times, setting, key) is changed, so that there are as many
different questions, repeats and figures as a year of nightly runs would have.
"""

from __future__ import annotations

import copy
import hashlib
import json
import random
from collections.abc import Iterator
from itertools import cycle, islice
from pathlib import Path
from typing import Any

from tests.committed import committed

REPEATS = 5


def templates(preset: str = "*") -> list[dict[str, Any]]:
    """The committed records of first repeats, as plain values."""
    return [json.loads(path.read_text(encoding="utf-8")) for path in real_records(preset)]


def real_records(preset: str = "*") -> list[Path]:
    """Their files, of the machine that has most of them. Other repeats would say the same again, and so would a run that is part of two comparisons."""
    return list({path.name: path for path in committed(f"xeon-2-cores/{preset}/*-r0-*.record.json")}.values())


def write_many(base: Path, new: Path, count: int, preset: str = "*") -> None:
    """Half of ``count`` records into either folder."""
    made = templates(preset)
    for side, folder in enumerate((base, new)):
        folder.mkdir(parents=True)
        for place, body in enumerate(islice(_variants(made, side), count // 2)):
            (folder / f"{place:05d}.record.json").write_text(json.dumps(body, indent=1) + "\n", encoding="utf-8")


def _variants(made: list[dict[str, Any]], side: int) -> Iterator[dict[str, Any]]:
    """Setting by setting, repeat by repeat, record by record: as a plan orders them."""
    dice = random.Random(side)
    minute = 0
    for setting in cycle(range(10_000)):
        for repeat in range(REPEATS):
            for body in made:
                minute += 1
                yield _variant(copy.deepcopy(body), setting, repeat, side, 2 * minute + side, dice)


def _variant(
    body: dict[str, Any], setting: int, repeat: int, side: int, minute: int, dice: random.Random
) -> dict[str, Any]:
    body["request"]["optimizer"]["learning_rate"] = 1e-5 * (setting + 1)
    body["request"]["repeat"] = body["request"]["seed"] = repeat
    body["request"]["versions"]["torch"] = f"2.{13 + side}.0"
    body["environment"]["versions"]["torch"] = f"2.{13 + side}.0"
    body["environment"]["commit"] = "ab"[side] * 40
    body["workload"]["digest"] = _digest("work", repeat)
    body["lora"]["initial_digest"] = _digest("lora", repeat)
    body["load"]["weights_digest"] = _digest(body["load"]["weights_digest"], repeat)
    pace = 1 + dice.gauss(0, 0.01)
    for step in body["steps"]:
        step["seconds"] *= pace
    body["load"]["load_seconds"] *= 1 + abs(dice.gauss(0, 0.05))
    for reading in body["memory"]["readings"]:
        reading["peak_resident_bytes"] = int(reading["peak_resident_bytes"] * (1 + dice.gauss(0, 0.01)))
    day, rest = divmod(minute, 24 * 60)
    body["started_at"] = f"2026-{1 + day // 28:02d}-{1 + day % 28:02d}T{rest // 60:02d}:{rest % 60:02d}:00+00:00"
    body["key"] = f"{body['key'].rsplit('-', 1)[0]}-{_digest(body['key'], setting, repeat, side)[:10]}"
    return body


def _digest(*parts: object) -> str:
    return hashlib.sha256(repr(parts).encode()).hexdigest()
