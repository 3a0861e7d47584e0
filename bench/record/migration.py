"""Which versions of a record and of the documents beside it are read, and how an older shape becomes today's.

There is one version of each so far. Fields that were added within it have a null or empty default, which
older files get; a field that was taken out again is dropped by `without_removed_fields`. When a field changes
its meaning there will be a version 2, and here the function that makes a body of version 1 one of version 2.
tests/test_old_records.py holds a record of every shape that there was. A file of a version that came later is
refused, never guessed at.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pydantic import BaseModel

from bench.errors import BrokenFile

SUFFIX = "_version"


def version_field(kind: type[BaseModel]) -> str | None:
    """The field of a document's own version; None: it has none."""
    return next((name for name in kind.model_fields if name.endswith(SUFFIX)), None)


def refuse_other_version(path: Path, body: Any, kind: type[BaseModel], what: str) -> None:
    """Raise BrokenFile where ``body``, as JSON gave it, is of another version than ``kind`` reads.

    ``what`` has the version, such as "record schema".
    """
    field = version_field(kind)
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


def without_removed_fields(body: Any) -> bool:
    """Take fields out of a record's body that records of version 1 had for a while; whether there were any.

    ``placement.places[].wire_bytes_per_step``: nothing ever counted it, so it was null wherever it stood.
    """
    placement = body.get("placement") if isinstance(body, dict) else None
    places = placement.get("places") if isinstance(placement, dict) else None
    found = False
    for place in places if isinstance(places, list) else ():
        if isinstance(place, dict) and "wire_bytes_per_step" in place:
            del place["wire_bytes_per_step"]
            found = True
    return found
