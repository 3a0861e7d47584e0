"""The folder of records: one JSON file a run, written atomically, read strictly.

A record appears under its final name only when it is whole (written beside it, synced, renamed), so a
reader never sees half of one and a killed command loses nothing that was finished. One command at a time
writes to a folder; a record that cannot be written there is kept elsewhere.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from bench.ask.documents import WHOLE_NUMBERS, parsed
from bench.errors import BrokenFile, CannotWrite
from bench.record.collector import collector_paused
from bench.record.migration import refuse_other_version, version_field, without_removed_fields
from bench.record.schema import Record
from bench.record.writing import PART_SUFFIX, held, keep_elsewhere, prove_writable, write_atomically

SUFFIX = ".record.json"
MOST_DIGITS = 20
"""Of a whole number with 64 bits, its sign included."""
_NINETEEN_DIGITS_OF_NO_FRACTION = re.compile(b"0" * 19 + rb"(?<![.0]0{19})")
_DIGITS_AS_ZEROS = bytes.maketrans(b"0123456789", b"0" * 10)
REPEATED_STATUSES = frozenset({"interrupted", "unavailable", "skipped"})
"""Outcomes that say nothing about the backend: the same command tries these runs again."""


class Store:
    """Records of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    @contextmanager
    def open_for_writing(self) -> Iterator[None]:
        """Create the folder and prove that it can be written to, before anything is measured; inside the
        ``with`` no other command may write to it. What a killed command left half-written is removed.

        Raises UserError with the system's reason, or where another command has the folder.
        """
        prove_writable(self.folder, "records", "choose another folder with --out")
        with held(self.folder):
            for left in self.folder.glob(f".*{SUFFIX}.*{PART_SUFFIX}"):
                left.unlink(missing_ok=True)
            yield

    def path(self, key: str) -> Path:
        """Where the record of a run is kept."""
        return self.folder / f"{key}{SUFFIX}"

    def save(self, record: Record) -> Path:
        """Write ``record`` atomically; an older record of the same run is replaced.

        Raises CannotWrite with the system's reason; the record is then kept in a folder for temporary files,
        which the error names, if that can be written to.
        """
        text = record.model_dump_json(indent=1) + "\n"
        try:
            return write_atomically(self.path(record.key), text)
        except CannotWrite as error:
            kept = keep_elsewhere(f"{record.key}{SUFFIX}", text)
            hint = (
                f"it is kept as '{kept}': move it into the folder and the same command goes on from there"
                if kept
                else "and nowhere else either: the record of this run is lost"
            )
            raise CannotWrite(error.message, hint) from None

    def finished(self, key: str) -> bool:
        """Whether the run of this key has a record that stands."""
        path = self.path(key)
        if not path.exists():
            return False
        return stands(read_record(path))

    def keep(self, record: Record) -> bool:
        """As `save`, but that a record which says nothing about the backend replaces none that does: to
        repeat a run that is then interrupted, or cannot be started, must not cost what was measured.

        Returns whether it was saved.
        """
        if not stands(record):
            with suppress(BrokenFile):  # that one is no loss
                if self.finished(record.key):
                    return False
        self.save(record)
        return True

    def failed(self, key: str) -> bool:
        """Whether the run of this key has a record, and did not complete."""
        path = self.path(key)
        return path.exists() and read_record(path).status != "completed"

    def out_of_memory(self, key: str) -> bool:
        """Whether the run of this key has a record that says so."""
        path = self.path(key)
        return path.exists() and read_record(path).status == "out_of_memory"

    def of_backends(self, backends: Collection[str]) -> Iterator[Record]:
        """Records of these backends in the folder itself. What is no record is passed over."""
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            if path.name.startswith(tuple(f"{backend}-" for backend in backends)):
                with suppress(BrokenFile):
                    yield read_record(path)

    def records(self) -> Iterator[Record]:
        """Every record in the folder and below it, in order of their start.

        Raises BrokenFile for a folder that does not exist or a file that is no record.
        """
        with collector_paused():
            found = [read_record(path) for path in self._paths()]
        yield from sorted(found, key=lambda record: (record.started_at, record.key))

    def one_by_one(self) -> Iterator[Record]:
        """The same in the order of their paths, each read when it is asked for: thousands of whole records
        may be more than memory holds. Raises BrokenFile as `records` does.
        """
        for path in self._paths():
            yield read_record(path)

    def _paths(self) -> list[Path]:
        """Of every record in the folder and below it. Raises BrokenFile for a folder that does not exist."""
        try:
            there = self.folder.is_dir()
        except OSError:  # a name too long for a path
            there = False
        if not there:
            raise BrokenFile(f"'{self.folder}' is not a folder of records")
        return sorted(self.folder.rglob(f"*{SUFFIX}"))


def stands(record: Record) -> bool:
    """Whether a record says something about the backend, so that its run is not tried again."""
    # Cards on which copies arrive changed say nothing about the backend either.
    stopped = record.status == "error" and record.preflight is not None and record.preflight.stopped
    return not stopped and record.status not in REPEATED_STATUSES


def read_record(path: Path) -> Record:
    """Read one record. Raises BrokenFile, naming the file and the first thing wrong with it."""
    try:
        return _read(path, Record, "a record", "record schema")
    except FileNotFoundError as error:
        raise BrokenFile(f"'{path}' is not a record: {error}") from None


Document = TypeVar("Document", bound=BaseModel)


def read_document(path: Path, kind: type[Document], what: str) -> Document | None:
    """What stands beside the records in a file of its own; None: there is no file.

    Raises BrokenFile, naming the file, ``what`` it should be and the first thing wrong with it.
    """
    try:
        return _read(path, kind, what, f"{what.removeprefix('a ')} version")
    except FileNotFoundError:
        return None


def _read(path: Path, kind: type[Document], what: str, version: str) -> Document:
    """A file as what it should be. Raises BrokenFile, and FileNotFoundError where there is none."""
    try:
        text = path.read_bytes()
        _refuse_endless_numbers(text)
        try:
            found = kind.model_validate_json(text)
        except ValidationError:
            body = parsed(text)
            # A file of another version has other fields, and its version says more than the first of them.
            refuse_other_version(path, body, kind, version)
            if kind is not Record or not without_removed_fields(body):
                raise
            found = kind.model_validate_json(json.dumps(body))
        if version_field(kind) not in {None, *found.model_fields_set}:
            refuse_other_version(path, parsed(text), kind, version)
    except FileNotFoundError:
        raise
    except ValidationError as error:
        raise BrokenFile(f"'{path}' is not {what}: {_first_problem(error)}") from None
    except (OSError, ValueError) as error:
        raise BrokenFile(f"'{path}' is not {what}: {error}") from None
    return found


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False)[0]
    where = ".".join(str(part) for part in first["loc"]) or "file"
    return f"{where}: {first['msg']}"


def _refuse_endless_numbers(text: bytes) -> None:
    """Raise ValueError for one that is none of `WHOLE_NUMBERS`."""
    # The quick look comes first, since it is taken at every record, and parsing all of it takes eight times
    # as long as checking it. A small float has more digits (0.0012345678901234567), all behind its point.
    if _NINETEEN_DIGITS_OF_NO_FRACTION.search(text.translate(_DIGITS_AS_ZEROS)):
        parsed(text, whole=_of_64_bits)


def _of_64_bits(digits: str) -> int:
    # By the digits first: Python reads no number of more than 4300.
    if len(digits) > MOST_DIGITS or int(digits) not in WHOLE_NUMBERS:
        raise ValueError(f"the whole number {digits[:MOST_DIGITS]}... has more than 64 bits")
    return int(digits)
