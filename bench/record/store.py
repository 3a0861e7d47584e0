"""The folder of records: one JSON file a run, written atomically, read strictly.

A record appears under its final name only when it is whole (written beside it, synced, renamed), so a
reader never sees half of one and a killed command loses nothing that was finished.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from bench.errors import BrokenFile, UserError
from bench.record.schema import SCHEMA_VERSION, Record

SUFFIX = ".record.json"
REPEATED_STATUSES = frozenset({"interrupted", "unavailable"})
"""Outcomes that say nothing about the backend: the same command tries these runs again."""


class Store:
    """Records of one folder."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def open_for_writing(self) -> None:
        """Create the folder and prove that it can be written to, before anything is measured.

        Raises UserError with the system's reason.
        """
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".probe-"):
                pass
        except OSError as error:
            raise UserError(
                f"cannot write records to '{self.folder}': {error.strerror}",
                "choose another folder with --out",
            ) from None

    def path(self, key: str) -> Path:
        """Where the record of a run is kept."""
        return self.folder / f"{key}{SUFFIX}"

    def save(self, record: Record) -> Path:
        """Write ``record`` atomically; an older record of the same run is replaced."""
        return write_atomically(self.path(record.key), record.model_dump_json(indent=1) + "\n")

    def finished(self, key: str) -> bool:
        """Whether the run of this key has a record that stands."""
        path = self.path(key)
        if not path.exists():
            return False
        record = read_record(path)
        # Cards on which copies arrive changed say nothing about the backend either.
        stopped = record.status == "error" and record.preflight is not None and record.preflight.stopped
        return not stopped and record.status not in REPEATED_STATUSES

    def records(self) -> Iterator[Record]:
        """Every record in the folder and below it, in order of their start.

        Raises BrokenFile for a folder that does not exist or a file that is no record.
        """
        if not self.folder.is_dir():
            raise BrokenFile(f"'{self.folder}' is not a folder of records")
        found = [read_record(path) for path in sorted(self.folder.rglob(f"*{SUFFIX}"))]
        yield from sorted(found, key=lambda record: (record.started_at, record.key))

    def one_by_one(self) -> Iterator[Record]:
        """The same in the order of their paths, each read when it is asked for: thousands of whole records
        may be more than memory holds. Raises BrokenFile as `records` does.
        """
        if not self.folder.is_dir():
            raise BrokenFile(f"'{self.folder}' is not a folder of records")
        for path in sorted(self.folder.rglob(f"*{SUFFIX}")):
            yield read_record(path)


def read_record(path: Path) -> Record:
    """Read one record. Raises BrokenFile, naming the file and the first thing wrong with it."""
    try:
        text = path.read_text(encoding="utf-8")
        version = _version_of(text)
        if version != SCHEMA_VERSION:
            raise BrokenFile(f"'{path}' has record schema {version!r}, this version reads {SCHEMA_VERSION}")
        return Record.model_validate_json(text)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise BrokenFile(f"'{path}' is not a record: {where}: {first['msg']}") from None
    except (OSError, UnicodeDecodeError, ValueError) as error:
        raise BrokenFile(f"'{path}' is not a record: {error}") from None


Document = TypeVar("Document", bound=BaseModel)


def read_document(path: Path, kind: type[Document], what: str) -> Document | None:
    """What stands beside the records in a file of its own; None: there is no file.

    Raises BrokenFile, naming the file, ``what`` it should be and the first thing wrong with it.
    """
    try:
        return kind.model_validate_json(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return None
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "file"
        raise BrokenFile(f"'{path}' is not {what}: {where}: {first['msg']}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenFile(f"'{path}' is not {what}: {error}") from None


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write a file whole or not at all, surviving a power cut after return. Text is written as UTF-8."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".part")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)
    return path


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Not every file system lets a folder be synced; there it is best effort."""
    try:
        handle = os.open(folder, os.O_RDONLY)
    except OSError:
        return
    try:
        os.fsync(handle)
    except OSError:
        return
    finally:
        os.close(handle)


def _version_of(text: str) -> object:
    body = json.loads(text)
    return body.get("schema_version") if isinstance(body, dict) else None
