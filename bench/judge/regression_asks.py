"""What runs of two sets of records were asked to do, so that the same question is recognized in both.

``sort_by_ask(base, new, allow)`` puts the runs of BASE and NEW that were asked the same under one label. What
the two sides are compared for is no part of the question: the versions of libraries and harness. Nor are the
seed and the repeat, which tell runs of one ask apart, and the names of paths, which a checkout elsewhere
changes: a model is known by its fingerprint and a data file by its digest.
"""

from __future__ import annotations

import json
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.ask.plan import ModelRequest, RunRequest
from bench.judge.checks import CHECKS
from bench.judge.labels import labels_of
from bench.judge.regression_runs import Run

NOT_ASKED: Mapping[str, Any] = {
    "versions": True,
    "seed": True,
    "repeat": True,
    "timeout_seconds": True,
    "preset": True,
    "fidelity": True,
    "model": {"name", "architecture", "note"},
    "workload": {"data"},
}
"""Parts of a request that are no part of the question; the model's fingerprint and the data's digest are. The
gradient is compared with a reference's after the training, of which it changes nothing."""
COMPARED = frozenset({"versions", "commit"})
"""Families of conditions that BASE and NEW may always differ in."""
ASKED_FOR_FAMILY: Mapping[str, tuple[str, ...]] = {
    "dtype": ("dtype",),
    "attention": ("attention",),
    "device": ("cpu_threads",),
}
"""Family that ``--allow`` names -> what asks for it and is no condition, since what was observed is one."""


@dataclass(frozen=True)
class Difference:
    """Something that is not the same in BASE and in NEW, in words."""

    name: str
    base: str
    new: str


@dataclass(frozen=True)
class Ask:
    """One question, and the runs of either side that were asked it."""

    label: str
    """The backend, told apart from the other asks of both sides by as few settings as do it."""
    base: tuple[Run, ...]
    new: tuple[Run, ...]
    allowed: tuple[Difference, ...] = ()
    """In which the two sides were asked differently, and that was allowed."""


def sort_by_ask(
    base: Sequence[Run], new: Sequence[Run], allow: Collection[str] = ()
) -> tuple[tuple[Ask, ...], tuple[Difference, ...]]:
    """The asks in the order in which they were run, and the options that only one side's backends have.

    An option that the harness of one side does not know cannot have been asked of it: runs are paired without
    it, and the difference is told. ``allow``: families of conditions that may differ beside `COMPARED`.
    """
    one_sided = dict(_one_sided_options(base, new))
    models: dict[tuple[object, ...], ModelRequest] = {}
    entries: dict[str, tuple[dict[str, Any], RunRequest, list[Run], list[Run]]] = {}
    for is_new, runs in ((False, base), (True, new)):
        for run in runs:
            asked = _bare(run.record.request, one_sided.get(run.record.request.backend, {}), models)
            question = asked.model_dump(mode="json", exclude=dict(NOT_ASKED))
            key = json.dumps(question, sort_keys=True)
            _, _, of_base, of_new = entries.setdefault(key, (question, asked, [], []))
            (of_new if is_new else of_base).append(run)
    # One run stands for each ask: naming 5,000 runs would compare every setting of every one.
    labels = labels_of(
        [(b or n)[0].record.model_copy(update={"request": asked}) for _, asked, b, n in entries.values()]
    )
    asks = {
        key: Ask(label, tuple(b), tuple(n))
        for (key, (_, _, b, n)), label in zip(entries.items(), labels, strict=True)
    }
    questions = {key: entry[0] for key, entry in entries.items()}
    asks = _joined(asks, questions, _asked_for({*allow, *COMPARED}))
    told = (
        Difference(f"option {backend}.{name}", *sides)
        for backend, options in one_sided.items()
        for name, sides in options.items()
    )
    return tuple(asks.values()), tuple(told)


def _bare(
    request: RunRequest, dropped: Mapping[str, object], models: dict[tuple[object, ...], ModelRequest]
) -> RunRequest:
    """``request`` without what would tell it from the same question of the other side."""
    model = request.model
    known = models.setdefault((model.fingerprint, model.weights, model.layers), model)
    data = request.data_digest and f"sha256:{request.data_digest[:12]}"
    return request.model_copy(
        update={
            "model": known,
            "fidelity": False,
            "options": {name: value for name, value in request.options.items() if name not in dropped},
            "versions": {},
            "workload": request.workload.model_copy(update={"data": data}),
        }
    )


# ---- options that one side does not know ---------------------------------------------------------


def _one_sided_options(
    base: Sequence[Run], new: Sequence[Run]
) -> Iterator[tuple[str, dict[str, tuple[str, str]]]]:
    """Backend -> option that only one side's runs of it have -> its values in BASE and in NEW, in words."""
    sides = _options(base), _options(new)
    for backend in sides[0].keys() & sides[1].keys():
        here, there = sides[0][backend], sides[1][backend]
        names = sorted(here.keys() ^ there.keys())
        if names:
            yield backend, {name: (_words(here.get(name)), _words(there.get(name))) for name in names}


def _options(runs: Sequence[Run]) -> dict[str, dict[str, set[str]]]:
    """Backend -> option -> its values as JSON."""
    found: dict[str, dict[str, set[str]]] = {}
    for run in runs:
        own = found.setdefault(run.record.request.backend, {})
        for name, value in run.record.request.options.items():
            own.setdefault(name, set()).add(json.dumps(value))
    return found


def _words(values: set[str] | None) -> str:
    return "no such option" if values is None else ", ".join(sorted(values))


# ---- differences that are allowed ----------------------------------------------------------------


def _asked_for(allow: Collection[str]) -> tuple[str, ...]:
    """Dotted paths in a request that ``allow`` lets differ."""
    checked = (
        check.path.removeprefix("request.")
        for check in CHECKS
        if check.family in allow and check.path.startswith("request.")
    )
    return (*checked, *(path for family in allow for path in ASKED_FOR_FAMILY.get(family, ())))


def _joined(
    asks: Mapping[str, Ask], questions: Mapping[str, dict[str, Any]], paths: Sequence[str]
) -> dict[str, Ask]:
    """Asks of one side only are joined where nothing but ``paths`` tells them apart.

    Only where there is one of either side: nothing says which of several belongs to which.
    """
    piles: dict[str, list[str]] = {}
    for key, ask in asks.items():
        if not (ask.base and ask.new):
            rest = {path: text for path, text in _flat(questions[key]).items() if path not in paths}
            piles.setdefault(json.dumps(rest, sort_keys=True), []).append(key)
    found = dict(asks)
    for keys in piles.values():
        if len(keys) != 2 or bool(asks[keys[0]].base) == bool(asks[keys[1]].base):
            continue
        old, now = keys if asks[keys[0]].base else keys[::-1]
        here, there = _flat(questions[old]), _flat(questions[now])
        told = tuple(
            Difference(path, here.get(path, "unset"), there.get(path, "unset"))
            for path in dict.fromkeys((*here, *there))
            if here.get(path) != there.get(path)
        )
        found[old] = replace(asks[old], new=asks[now].new, allowed=told)
        del found[now]
    return found


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, str]:
    """Dotted path -> value in words. A mapping that is a value by itself (``stress``) stays one."""
    found: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, dict) and name != "stress":
            found |= _flat(value, f"{prefix}{name}.")
        else:
            found[prefix + name] = value if isinstance(value, str) else json.dumps(value)
    return found
