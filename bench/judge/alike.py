"""Who may stand beside whom: completed runs that agree in every condition that breaks a comparison.

``find_alike(rows, allow)`` splits runs into sets of alike ones, the largest first, and says of every other
set in what it differs from that one. ``tell_apart(rows)`` gives runs of one backend names that tell them
apart where what was observed differs, and not what was asked for.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Hashable, Iterator, Sequence
from dataclasses import dataclass, replace

from bench.judge.conditions import Check, checks_of, short
from bench.judge.families import BY_NAME
from bench.judge.labels import telling_apart
from bench.judge.rows import Row, names_of

Place = tuple[str, Hashable]
"""A check's name, and the scope within which its values must agree."""


@dataclass(frozen=True)
class Difference:
    """A condition in which a set of runs is not like the largest one."""

    name: str
    family: str
    here: str
    there: str
    """In the largest set."""


@dataclass(frozen=True)
class Alike:
    """Runs that may stand side by side."""

    rows: tuple[Row, ...]
    differences: tuple[Difference, ...]
    """From the largest set, one for each condition. Empty for that set itself, and for one that shares no
    repeat with it: then nothing shows that they are alike, or that they are not."""


@dataclass(frozen=True)
class _Pile:
    """Runs that agree so far, and what is known of them."""

    rows: list[Row]
    fixed: tuple[str, ...]
    """Values that every run has, whatever its repeat."""
    facts: dict[Place, str]
    """All others."""

    def agrees(self, other: _Pile) -> bool:
        """Whether nothing known of both is different; of two with the same ``fixed``."""
        return all(self.facts.get(place, value) == value for place, value in other.facts.items())


def find_alike(rows: Sequence[Row], allow: Collection[str] = ()) -> list[Alike]:
    """Split ``rows`` into sets of alike runs; ``allow``: families of conditions that may differ.

    First the repeats of one label are piled up, then the piles of different labels that agree. Piles that
    share no repeat share no seed: nothing shows that they did the same work, so they stay apart.
    """
    checks = [check for check in checks_of(rows) if check.family is not None and check.family not in allow]
    fixed = [check for check in checks if check.of_every_repeat and not check.if_used]
    loose = [check for check in checks if check not in fixed]
    by_fixed: dict[tuple[str, ...], list[_Pile]] = {}
    for row in rows:
        pile = _pile(row, fixed, loose)
        by_fixed.setdefault(pile.fixed, []).append(pile)
    found = [pile for piles in by_fixed.values() for pile in _sets_of(piles)]
    order = {row: place for place, row in enumerate(rows)}
    for pile in found:
        pile.rows.sort(key=order.__getitem__)
    found.sort(key=lambda pile: (-len(pile.rows), order[pile.rows[0]]))
    return [Alike(tuple(pile.rows), tuple(_differences(pile, found[0], fixed, loose))) for pile in found]


def _pile(row: Row, fixed: Sequence[Check], loose: Sequence[Check]) -> _Pile:
    read = ((check, check.read_if_used(row)) for check in loose)
    facts = {(check.name, check.scope(row)): text for check, text in read if text is not None}
    return _Pile([row], tuple(check.read(row) for check in fixed), facts)


def _sets_of(piles: Sequence[_Pile]) -> list[_Pile]:
    """Single runs with the same ``fixed``, put together as far as they agree."""
    sets = _most_in_common_first(_gathered(piles, lambda row: row.label))
    while True:
        # What links two sets may have come into one of them after the other had been looked at.
        wider = _gathered(sets, lambda row: row.repeat)
        if len(wider) == len(sets):
            return wider
        sets = wider


def _gathered(piles: Sequence[_Pile], link: Callable[[Row], Hashable]) -> list[_Pile]:
    """Each pile joins the first that agrees with it and shares a ``link``."""
    homes: list[_Pile] = []
    for pile in piles:
        links = {link(row) for row in pile.rows}
        for home in homes:
            if home.agrees(pile) and any(link(row) in links for row in home.rows):
                home.rows.extend(pile.rows)
                home.facts.update(pile.facts)
                break
        else:
            homes.append(pile)
    return homes


def _most_in_common_first(piles: Sequence[_Pile]) -> list[_Pile]:
    """So that whoever agrees with several that do not agree with one another joins the largest of them.

    The reference has no library of its own: it must not be taken in by the one backend whose library is of
    another version than that of all others.
    """
    shared: dict[Place, Counter[str]] = {}
    for pile in piles:
        for place, text in pile.facts.items():
            shared.setdefault(place, Counter())[text] += len(pile.rows)
    disputed = {place: runs for place, runs in shared.items() if len(runs) > 1}
    everyone = sum(len(pile.rows) for pile in piles)

    def rank(pile: _Pile) -> tuple[int, int]:
        common = (disputed[place][text] for place, text in pile.facts.items() if place in disputed)
        return -min(common, default=everyone), -len(pile.rows)

    return sorted(piles, key=rank)


def _differences(
    pile: _Pile, largest: _Pile, fixed: Sequence[Check], loose: Sequence[Check]
) -> Iterator[Difference]:
    for check, here, there in zip(fixed, pile.fixed, largest.fixed, strict=True):
        if here != there:
            yield Difference(check.name, check.family or "", here, there)
    said = set()
    families = {check.name: check.family or "" for check in loose}
    for (name, scope), here in pile.facts.items():
        there = largest.facts.get((name, scope), here)
        if there != here and name not in said:
            said.add(name)
            yield Difference(name, families[name], here, there)


# ---- names ---------------------------------------------------------------------------------------


def tell_apart(rows: Sequence[Row]) -> tuple[Row, ...]:
    """``rows`` under names that tell apart runs of one label that differ in what was observed.

    Two cards, two attention kernels: each is a line of its own wherever the runs are shown, so that nothing
    is averaged over both. Another commit or library is no reason while every repeat is there once: that is
    a sweep that was gone on with later.
    """
    by_label: dict[str, list[Row]] = {}
    for row in rows:
        if row.completed:
            by_label.setdefault(row.label, []).append(row)
    checks = [check for check in checks_of(rows) if check.family and check.of_every_repeat]
    labels = {row: row.label for row in rows}
    for own in by_label.values():
        if len(own) > 1:
            labels |= _told_apart(own, checks)
    names = names_of([labels[row] for row in rows], [row.repeat for row in rows])
    return tuple(
        row if labels[row] == row.label else replace(row, label=labels[row], name=name)
        for row, name in zip(rows, names, strict=True)
    )


def _told_apart(rows: Sequence[Row], checks: Sequence[Check]) -> dict[Row, str]:
    """Row -> its label, with as few of its conditions as tell it apart."""
    twice = len({row.repeat for row in rows}) < len(rows)
    telling = [check for check in checks if twice or not BY_NAME[check.family or ""].repeatable]
    seen = [
        {check.name: short(text) for check in telling if (text := check.read_if_used(row)) is not None}
        for row in rows
    ]
    names = telling_apart(seen)
    return {
        row: _with(row.label, [f"{name}={own[name]}" for name in names if name in own])
        for row, own in zip(rows, seen, strict=True)
    }


def _with(label: str, settings: Sequence[str]) -> str:
    if not settings:
        return label
    head, bracket, rest = label.partition(" (")
    inside = [rest.removesuffix(")"), *settings] if bracket else settings
    return f"{head} ({', '.join(inside)})"
