"""Which versions of a record, and of the documents beside it, are read.

There is one version of each so far. Fields that were added within it have a null or empty default, which older
files get. When a field changes its meaning there will be a version 2, and here the function that makes a body
of version 1 one of version 2, called by ``bench.record.store`` before it validates; tests/test_old_records.py
holds a real file of every shape there was. A file of a version that came later is refused, never guessed at.
"""

from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from bench.ask.documents import parsed
from bench.errors import BrokenFile

SUFFIX = "_version"


def version_field(kind: type[BaseModel]) -> str | None:
    """The field of a document's own version; None: it has none."""
    return next((name for name in kind.model_fields if name.endswith(SUFFIX)), None)


def refuse_other_version(path: Path, text: bytes, kind: type[BaseModel], what: str) -> None:
    """Raise BrokenFile where ``text``, a JSON object, is of another version than ``kind`` reads.

    ``what`` has the version, such as "record schema". Raises ValueError for what is no JSON.
    """
    field = version_field(kind)
    body = parsed(text)
    if field is None or not isinstance(body, dict):
        return
    known, found = kind.model_fields[field].default, body.get(field)
    if found == known and type(found) is int:
        return
    newer = type(found) is int and found > known
    raise BrokenFile(
        f"'{path}' has {what} {found!r}, this version reads {known}",
        "a newer qlora-bench wrote it: upgrade this one to read it" if newer else None,
    )
