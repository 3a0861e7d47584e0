"""Whose mark a mark is: every row, point, line and legend entry of a backend carries the same attribute.

The page's script dims everything that has ``data-backend`` and is not the backend that a person looks at. In
matplotlib an artist gets ``owner_id(backend)`` as its gid; ``with_owners(svg)`` makes the attribute of it.
"""

from __future__ import annotations

import re

PREFIX = "of-backend-"


def owner(label: str) -> str:
    """The backend of a run's label or of a backend's own name, as the attribute has it: nothing to escape."""
    return re.sub(r"[^a-z0-9]+", "-", label.partition(" (")[0].lower()).strip("-") or "unnamed"


def owner_id(label: str) -> str:
    """The gid of an artist that belongs to a backend."""
    return PREFIX + owner(label)


def owned(label: str) -> str:
    """The attribute, for elements that are written by hand."""
    return f'data-backend="{owner(label)}"'


def with_owners(svg: str) -> str:
    """``svg`` as matplotlib wrote it, with attributes in place of the ids that came from `owner_id`."""
    return re.sub(rf'\bid="{PREFIX}([a-z0-9-]+)"', r'data-backend="\1"', svg)
