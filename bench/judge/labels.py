"""What a run is called: its backend, told apart by as few settings as do it.

``labels_of(records)`` names every record among the others; ``bench.judge.rows`` and everything shown use it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Hashable, Mapping, Sequence
from typing import Any

from bench.record.schema import Record

WATCHING = ("trace", "fidelity")
"""Parts of a request that say what is watched, not what is done."""


def labels_of(records: Sequence[Record]) -> list[str]:
    """The backend's id, with what sets it apart where one backend has several kinds of request."""
    asked = [_flat(_lasting(record)) for record in records]
    telling = _telling(asked)
    labels = []
    for own in asked:
        apart = [
            f"{_setting(path)}={own.get(path, 'unset')}"
            for path in telling[own["backend"]]
            # That a layer was not rescaled needs no words: the others say which one was.
            if path in own or not path.startswith("stress.")
        ]
        labels.append(f"{own['backend']} ({', '.join(apart)})" if apart else own["backend"])
    return labels


def swept_settings(records: Sequence[Record]) -> dict[str, list[str]]:
    """Setting -> its value in each record, in words, of the settings in which runs of one backend differ.

    Layers rescaled by ``--stress`` are left out: they are no setting that a person sweeps.
    """
    asked = [_flat(_lasting(record)) for record in records]
    paths = dict.fromkeys(path for found in _telling(asked).values() for path in found)
    return {
        path: [own.get(path, "unset") for own in asked] for path in paths if not path.startswith("stress.")
    }


def _telling(asked: Sequence[Mapping[str, str]]) -> dict[str, list[str]]:
    """Backend -> the settings that tell its requests apart."""
    by_backend: dict[str, list[Mapping[str, str]]] = {}
    for own in asked:
        by_backend.setdefault(own["backend"], []).append(own)
    return {backend: telling_apart(siblings) for backend, siblings in by_backend.items()}


def _setting(path: str) -> str:
    """The setting's name by itself; of a stressed layer the whole name, for every layer has such a one, and
    of the model that it is one."""
    if path == "model.name":
        return "model"
    return path if path.startswith("stress.") else path.rsplit(".", 1)[-1]


def _lasting(record: Record) -> dict[str, Any]:
    """All of a request but what changes from repeat to repeat, and what no result depends on."""
    left_out: Any = {"seed": True, "repeat": True, "timeout_seconds": True, "preset": True, "model": {"note"}}
    return record.request.model_dump(mode="json", exclude=left_out)


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted path -> value in words."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = _text(value)
    return found


def _text(value: object) -> str:
    """A setting as JSON has it, but for text, which needs no quotes, and for null."""
    if value is None:
        return "unset"
    if isinstance(value, str):
        return value
    # json.dumps says the same of a number, and takes as long for it as for a whole document.
    if type(value) is int or (type(value) is float and math.isfinite(value)):
        return repr(value)
    return json.dumps(value)


def telling_apart(siblings: Sequence[Mapping[str, str]]) -> list[str]:
    """The first few names whose values tell apart all siblings that differ at all."""
    chosen: list[str] = []
    # What each has of the chosen ones.
    known: list[Hashable] = [()] * len(siblings)
    kinds = 1
    paths = dict.fromkeys(path for sibling in siblings for path in sibling)
    # What is merely watched changes nothing of the training, so it tells runs apart last.
    for path in sorted(paths, key=lambda path: path in WATCHING):
        if kinds == len(siblings):
            break
        found = [(before, sibling.get(path)) for before, sibling in zip(known, siblings, strict=True)]
        split = len(set(found))
        if split > kinds:
            chosen.append(path)
            known, kinds = list(found), split
    return chosen
