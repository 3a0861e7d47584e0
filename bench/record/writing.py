"""Files that are whole or not there, and folders that one command at a time writes to.

``write_atomically(path, content)`` is how everything of this project reaches a disk. ``bench.record.store``
keeps records with it.
"""

from __future__ import annotations

import fcntl
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from bench.errors import CannotWrite, UserError

PART_SUFFIX = ".part"
"""Of a file that is not whole yet."""
PROBE_BYTES = 2**20
"""More than a record of a short run takes: a disk that has not even that is full."""


def prove_writable(folder: Path, what: str, hint: str) -> None:
    """Create ``folder`` and write to it, before anything is measured.

    Raises UserError with the system's reason: that ``what`` cannot be written there, and ``hint``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Without a name where the system can (O_TMPFILE): a killed command leaves nothing of it.
        with tempfile.TemporaryFile(dir=folder) as probe:
            probe.write(bytes(PROBE_BYTES))
            probe.flush()
            os.fsync(probe.fileno())
    except OSError as error:
        raise UserError(f"cannot write {what} to '{folder}': {error.strerror or error}", hint) from None


def write_atomically(path: Path, content: str | bytes) -> Path:
    """Write a file whole or not at all, surviving a power cut after return. Text is written as UTF-8.

    Raises CannotWrite with the system's reason.
    """
    try:
        _write(path, content)
    except OSError as error:
        raise CannotWrite(f"cannot write '{path}': {error.strerror or error}") from None
    _sync_folder(path.parent)
    return path


def _write(path: Path, content: str | bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=PART_SUFFIX)
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


def keep_elsewhere(name: str, text: str) -> Path | None:
    """Write a file where temporary files belong. None: that cannot be done either."""
    with suppress(OSError, CannotWrite):
        return write_atomically(Path(tempfile.mkdtemp(prefix="qlora-bench-kept-")) / name, text)
    return None


@contextmanager
def held(folder: Path) -> Iterator[None]:
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
