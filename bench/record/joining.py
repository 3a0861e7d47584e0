"""Records of several folders as one set, wherever they were made.

``join(folders)`` reads them all, keeps one record of each run, and says in words what was there twice and
what is missing of the plans whose slices are among them.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from bench.errors import BrokenFile
from bench.record.schema import Record
from bench.record.slices import PlannedRun, PlanSlice, slices_below
from bench.record.store import Store

NAMED = 3
"""Runs that a note names; of more it says how many."""


@dataclass(frozen=True)
class Joined:
    """Every run once, in order of their start, and what should be known of the set."""

    records: tuple[Record, ...]
    notes: tuple[str, ...]


def join(folders: Sequence[Path]) -> Joined:
    """The records in ``folders`` and below them. Raises BrokenFile as `Store.records` does."""
    # A folder that is named twice, or that another one contains, is read once.
    given = {_resolved(folder): folder for folder in folders}
    roots = [
        folder
        for whole, folder in given.items()
        if not any(whole.is_relative_to(other) for other in given if other != whole)
    ]
    read = [record for folder in roots for record in Store(folder).records()]
    kept, twice = _once(read)
    slices = [document for folder in roots for document in slices_below(folder)]
    return Joined(
        records=tuple(sorted(kept.values(), key=lambda record: (record.started_at, record.key))),
        notes=(*_of_duplicates(twice), *_of_gaps(slices, kept)),
    )


def _resolved(folder: Path) -> Path:
    try:
        return folder.resolve()
    except (OSError, RuntimeError) as error:  # RuntimeError: symbolic links in a ring
        raise BrokenFile(f"'{folder}' is not a folder of records: {error}") from None


def _once(records: Iterable[Record]) -> tuple[dict[str, Record], dict[str, int]]:
    """Run -> the record that is kept: one that completed before one that did not, then the first that was
    made, so that nobody picks the better of two. And run -> how many records there were, where more than
    one."""
    kept: dict[str, Record] = {}
    count: dict[str, int] = {}
    for record in records:
        count[record.key] = count.get(record.key, 0) + 1
        if record.key not in kept or _precedence(record) < _precedence(kept[record.key]):
            kept[record.key] = record
    return kept, {key: times for key, times in count.items() if times > 1}


def _precedence(record: Record) -> tuple[bool, str]:
    return record.status != "completed", record.started_at


def _of_duplicates(twice: Mapping[str, int]) -> list[str]:
    if not twice:
        return []
    surplus = sum(twice.values()) - len(twice)
    return [
        f"Recorded more than once: {_named(list(twice))}. One record of each is kept, the first that "
        f"completed where one did; left out: {surplus}."
    ]


def _of_gaps(slices: Sequence[PlanSlice], kept: Mapping[str, Record]) -> list[str]:
    """A note for each slice of each plan that has runs without a record."""
    plans: dict[tuple[tuple[PlannedRun, ...], ...], set[int]] = {}
    for document in slices:
        plans.setdefault(document.slices, set()).add(document.place)
    notes = []
    if len(plans) > 1:
        notes.append(
            f"The shards are of {len(plans)} plans: the machines did not plan the same runs, as where a "
            "setting, a library or the number of threads differs."
        )
    for number, (parts, present) in enumerate(plans.items(), start=1):
        for place, part in enumerate(parts, start=1):
            missing = [run for run in part if run.key not in kept]
            if missing:
                shard = f"Shard {place} of {len(parts)}"
                shard += f" of plan {number}" if len(plans) > 1 else ""
                shard += "" if place in present else ", whose folder is not among these"
                again = f"The sweep's command with --shard {place}/{len(parts)}"
                notes.append(f"{shard}: {_of_gap(missing, len(part), again)}")
    return notes


def _of_gap(missing: Sequence[PlannedRun], planned: int, again: str) -> str:
    names = _named([run.key for run in missing])
    # A run's own command has no --out: where a record lies is no part of what the run is.
    return (
        f"{len(missing)} of its {planned} runs without a record: {names}. {again} makes only what "
        f"is missing. The first alone, with --out for a folder among these: {missing[0].command}"
    )


def _named(keys: Sequence[str]) -> str:
    more = f" and {len(keys) - NAMED} more" if len(keys) > NAMED else ""
    return f"{', '.join(keys[:NAMED])}{more}"
