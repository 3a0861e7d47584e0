"""The folder of records: one JSON file a run, written atomically, read strictly.

A record appears under its final name only when it is whole (written beside it, synced, renamed), so a
reader never sees half of one and a killed command loses nothing that was finished. One command at a time
writes to a folder; a record that cannot be written there is kept elsewhere.
"""

from __future__ import annotations

import fcntl
import json
import os
import tempfile
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from bench.errors import BrokenFile, CannotWrite, UserError
from bench.record.schema import SCHEMA_VERSION, Record

SUFFIX = ".record.json"
PART_SUFFIX = ".part"
REPEATED_STATUSES = frozenset({"interrupted", "unavailable", "skipped"})
"""Outcomes that say nothing about the backend: the same command tries these runs again."""
PROBE_BYTES = 2**20
"""More than a record of a short run takes: a disk that has not even that is full."""


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
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            # Without a name where the system can (O_TMPFILE): a killed command leaves nothing of it.
            with tempfile.TemporaryFile(dir=self.folder) as probe:
                probe.write(bytes(PROBE_BYTES))
                probe.flush()
                os.fsync(probe.fileno())
        except OSError as error:
            raise UserError(
                f"cannot write records to '{self.folder}': {error.strerror or error}",
                "choose another folder with --out",
            ) from None
        with _held(self.folder):
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
            kept = _keep_elsewhere(f"{record.key}{SUFFIX}", text)
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
        record = read_record(path)
        # Cards on which copies arrive changed say nothing about the backend either.
        stopped = record.status == "error" and record.preflight is not None and record.preflight.stopped
        return not stopped and record.status not in REPEATED_STATUSES

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
        if not self.folder.is_dir():
            raise BrokenFile(f"'{self.folder}' is not a folder of records")
        found = [read_record(path) for path in sorted(self.folder.rglob(f"*{SUFFIX}"))]
        yield from sorted(found, key=lambda record: (record.started_at, record.key))


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


def write_atomically(path: Path, text: str) -> Path:
    """Write a text file whole or not at all, surviving a power cut after return.

    Raises CannotWrite with the system's reason.
    """
    try:
        _write(path, text)
    except OSError as error:
        raise CannotWrite(f"cannot write '{path}': {error.strerror or error}") from None
    _sync_folder(path.parent)
    return path


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART_SUFFIX)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        Path(temporary).chmod(0o644)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise


def _keep_elsewhere(name: str, text: str) -> Path | None:
    """Write a file where temporary files belong. None: that cannot be done either."""
    with suppress(OSError, CannotWrite):
        return write_atomically(Path(tempfile.mkdtemp(prefix="qlora-bench-kept-")) / name, text)
    return None


@contextmanager
def _held(folder: Path) -> Iterator[None]:
    """Hold a folder for this process; the system lets go of it when the process ends, however it does.

    The folder itself is locked, so that nothing is left in it. Not every file system can: there two commands
    can write at once, each record still whole. Raises UserError where another command has it.
    """
    handle = None
    try:
        with suppress(OSError):
            handle = os.open(folder, os.O_RDONLY)
        if handle is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise UserError(
                    f"another command is writing to '{folder}'",
                    "wait until it has ended, or choose another folder with --out",
                ) from None
            except OSError:
                pass
        yield
    finally:
        if handle is not None:
            os.close(handle)


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
