"""Which runs of NEW did the same work as which runs of BASE.

``match(ask, allow)`` parts the completed runs of one ask by what was observed of their work: by every
condition of ``bench.judge.checks`` that would split a table, but for those that are compared here, the
versions and the commit. Runs of BASE then stand beside those of NEW, and what has no counterpart is named
with what differs.
"""

from __future__ import annotations

from collections.abc import Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass

from bench.judge.checks import CHECKS, Check
from bench.judge.regression_asks import COMPARED, Ask, Difference
from bench.judge.regression_runs import Run
from bench.judge.values import short


@dataclass(frozen=True)
class Match:
    """Completed runs of BASE and of NEW that did the same work, at least one on either side."""

    label: str
    base: tuple[Run, ...]
    new: tuple[Run, ...]
    allowed: tuple[Difference, ...] = ()
    """In which they differ, and that was allowed."""


@dataclass(frozen=True)
class Unlike:
    """Completed runs that were asked the same and did not do the same work."""

    label: str
    base: tuple[Run, ...]
    new: tuple[Run, ...]
    differences: tuple[Difference, ...]


@dataclass(frozen=True)
class OneSided:
    """Completed runs that have no counterpart on the other side."""

    label: str
    base: tuple[Run, ...]
    new: tuple[Run, ...]
    """Either is empty."""


OBSERVED = tuple(
    check
    for check in CHECKS
    if check.of_every_repeat
    and check.family is not None
    and check.family not in COMPARED
    and not check.path.startswith("request.")
)
"""Conditions of a run that its request does not tell."""
SEEDED = tuple(check for check in CHECKS if not check.of_every_repeat and check.family is not None)
"""Conditions that a seed decides."""

Facts = tuple[str, ...]
"""The values of `OBSERVED`, in words."""


def match(ask: Ask, allow: Collection[str] = ()) -> Iterator[Match | Unlike | OneSided]:
    """The completed runs of one ask, parted by what they really did; ``allow``: families that may differ."""
    base, new = _parts(ask.base), _parts(ask.new)
    varying = _varying([*base, *(facts for facts in new if facts not in base)])
    lost = [facts for facts in base if facts not in new]
    gained = [facts for facts in new if facts not in base]
    for facts in base:
        if facts in new:
            yield _beside(ask.label + _suffix(facts, varying), base[facts], new[facts], ask.allowed, allow)
    # Where a side has one part that is left, it is known which belongs to which.
    if len(lost) == len(gained) == 1:
        (here,), (there,) = lost, gained
        sides = zip(OBSERVED, here, there, strict=True)
        differing = [(check, old, now) for check, old, now in sides if old != now]
        told = tuple(Difference(check.name, short(old), short(now)) for check, old, now in differing)
        if all(check.family in allow for check, _, _ in differing):
            both = tuple(dict.fromkeys((*ask.allowed, *told)))
            yield _beside(ask.label, base[here], new[there], both, allow)
        else:
            yield Unlike(ask.label, base[here], new[there], told)
        return
    for facts in lost:
        yield OneSided(ask.label + _suffix(facts, varying), base[facts], ())
    for facts in gained:
        yield OneSided(ask.label + _suffix(facts, varying), (), new[facts])


def _beside(
    label: str,
    base: tuple[Run, ...],
    new: tuple[Run, ...],
    allowed: tuple[Difference, ...],
    allow: Collection[str],
) -> Match | Unlike:
    unlike = tuple(_seeded_differences(base, new, allow))
    if unlike:
        return Unlike(label, base, new, unlike)
    # What was allowed stands at every figure.
    told = ", ".join(f"{one.name}: {one.base} -> {one.new}" for one in allowed)
    return Match(f"{label} [{told}]" if told else label, base, new, allowed)


# ---- what is the same for all runs of a part -----------------------------------------------------


def _parts(runs: Sequence[Run]) -> dict[Facts, tuple[Run, ...]]:
    found: dict[Facts, list[Run]] = {}
    for run in runs:
        if run.completed:
            found.setdefault(tuple(check.read(run.row) for check in OBSERVED), []).append(run)
    return {facts: tuple(members) for facts, members in found.items()}


def _varying(parts: Sequence[Facts]) -> tuple[int, ...]:
    """Places of the conditions in which the parts of an ask differ."""
    return tuple(place for place, texts in enumerate(zip(*parts, strict=True)) if len(set(texts)) > 1)


def _suffix(facts: Facts, varying: Sequence[int]) -> str:
    told = ", ".join(f"{OBSERVED[place].name}: {short(facts[place])}" for place in varying)
    return f" [{told}]" if told else ""


# ---- what a seed decides -------------------------------------------------------------------------


def _seeded_differences(
    base: Sequence[Run], new: Sequence[Run], allow: Collection[str]
) -> Iterator[Difference]:
    """Conditions of which no value is found on both sides, though runs of one repeat stand on both.

    Rounds of one repeat with several seeds are fine: some of their values must be shared, not all, for a
    round may have failed on one side.
    """
    if not {run.row.repeat for run in base} & {run.row.repeat for run in new}:
        yield Difference("repeats, so no seed is shared", _repeats(base), _repeats(new))
        return
    for check in SEEDED:
        if check.family in allow:
            continue
        old, now = _by_scope(check, base), _by_scope(check, new)
        for scope in old:
            if scope in now and not old[scope] & now[scope]:
                yield Difference(check.name, _listed(old[scope]), _listed(now[scope]))
                break


def _by_scope(check: Check, runs: Sequence[Run]) -> dict[Hashable, set[str]]:
    found: dict[Hashable, set[str]] = {}
    for run in runs:
        found.setdefault(check.scope(run.row), set()).add(check.read(run.row))
    return found


def _repeats(runs: Sequence[Run]) -> str:
    return ", ".join(str(repeat) for repeat in sorted({run.row.repeat for run in runs}))


def _listed(texts: set[str]) -> str:
    return ", ".join(sorted(short(text) for text in texts))
