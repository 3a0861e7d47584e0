"""Who may stand beside whom: completed runs that agree in every condition that breaks a comparison.

``find_alike(rows, allow)`` splits runs into sets of alike ones, the largest first, and says of every other
set in what it differs from that one. It reads each run once and looks up who may agree with whom, so that
thousands of runs cost no more than their number.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from bench.judge.checks import Check, checks_of, same_repeat
from bench.judge.rows import Row

Values = tuple[str, ...]
"""Of several checks, in their order."""


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
class _Checks:
    """The checks that break a comparison, by what their values must be the same for."""

    fixed: Sequence[Check]
    """All runs."""
    drawn: Sequence[Check]
    """The runs of a repeat."""
    partial: Sequence[Check]
    """Runs that have to do with it: of one dtype, or of one library."""

    def pile(self, row: Row) -> _Pile:
        """One run by itself."""
        read = ((check, check.read_if_used(row)) for check in self.partial)
        return _Pile(
            [row],
            tuple(check.read(row) for check in self.fixed),
            {row.repeat: tuple(check.read(row) for check in self.drawn)},
            {(check.name, check.scope(row)): text for check, text in read if text is not None},
        )


@dataclass(frozen=True, eq=False)
class _Pile:
    """Runs that agree so far, and what is known of them."""

    rows: list[Row]
    fixed: Values
    drawn: dict[int, Values]
    """Repeat -> values."""
    partial: dict[tuple[str, Hashable], str]
    """Check and scope -> value."""

    def agrees(self, other: _Pile) -> bool:
        """Whether nothing known of both is different; of two with the same ``fixed``."""
        if any(self.drawn.get(repeat, values) != values for repeat, values in other.drawn.items()):
            return False
        return all(self.partial.get(place, value) == value for place, value in other.partial.items())

    def take(self, other: _Pile) -> None:
        """Have the runs of another that agrees."""
        self.rows.extend(other.rows)
        self.drawn.update(other.drawn)
        self.partial.update(other.partial)


def find_alike(rows: Sequence[Row], allow: Collection[str] = ()) -> list[Alike]:
    """Split ``rows`` into sets of alike runs; ``allow``: families of conditions that may differ.

    First the repeats of one label are piled up, then the piles of different labels that agree. Piles that
    share no repeat share no seed: nothing shows that they did the same work, so they stay apart.
    """
    breaking = [check for check in checks_of(rows) if check.family is not None and check.family not in allow]
    drawn = [check for check in breaking if check.scope is same_repeat]
    fixed = [check for check in breaking if check.of_every_repeat and not check.if_used]
    checks = _Checks(fixed, drawn, [check for check in breaking if check not in (*fixed, *drawn)])
    by_fixed: dict[Values, dict[str, list[_Pile]]] = {}
    for row in rows:
        pile = checks.pile(row)
        by_fixed.setdefault(pile.fixed, {}).setdefault(row.label, []).append(pile)
    found = [pile for by_label in by_fixed.values() for pile in _sets_of(by_label.values())]
    order = {row: place for place, row in enumerate(rows)}
    for pile in found:
        pile.rows.sort(key=order.__getitem__)
    found.sort(key=lambda pile: (-len(pile.rows), order[pile.rows[0]]))
    return [Alike(tuple(pile.rows), tuple(_differences(pile, found[0], checks))) for pile in found]


def _sets_of(labels: Iterable[Sequence[_Pile]]) -> list[_Pile]:
    """Single runs with the same ``fixed``, label by label, put together as far as they agree."""
    sets = _most_in_common_first([pile for runs in labels for pile in _repeats_together(runs)])
    while True:
        # What links two sets may have come into one of them after the other had been looked at.
        wider = _sharing_a_repeat(sets)
        if len(wider) == len(sets):
            return wider
        sets = wider


def _repeats_together(runs: Sequence[_Pile]) -> list[_Pile]:
    """The runs of one label: each joins the first pile that agrees with it."""
    homes: list[_Pile] = []
    by_work: dict[tuple[int, Values], list[_Pile]] = {}
    having: Counter[int] = Counter()
    for run in runs:
        ((repeat, values),) = run.drawn.items()
        # Where every pile has this repeat already, only those with the same values can agree.
        known = by_work.setdefault((repeat, values), [])
        home = _first_that_agrees(run, known if having[repeat] == len(homes) else homes)
        if home is None:
            homes.append(home := run)
        else:
            having[repeat] -= repeat in home.drawn
            home.take(run)
        having[repeat] += 1
        if home not in known:
            known.append(home)
    return homes


def _sharing_a_repeat(piles: Sequence[_Pile]) -> list[_Pile]:
    """Each pile joins the first that agrees with it and has a repeat in common with it."""
    homes: list[_Pile] = []
    by_work: dict[tuple[int, Values], list[_Pile]] = {}
    for pile in piles:
        candidates = [home for work in pile.drawn.items() for home in by_work.get(work, ())]
        home = _first_that_agrees(pile, candidates)
        if home is None:
            homes.append(home := pile)
        else:
            home.take(pile)
        for work in pile.drawn.items():
            known = by_work.setdefault(work, [])
            if home not in known:
                known.append(home)
    return homes


def _first_that_agrees(pile: _Pile, homes: Iterable[_Pile]) -> _Pile | None:
    return next((home for home in homes if home.agrees(pile)), None)


def _most_in_common_first(piles: Sequence[_Pile]) -> list[_Pile]:
    """So that whoever agrees with several that do not agree with one another joins the largest of them.

    The reference has no library of its own: it must not be taken in by the one backend whose library is of
    another version than that of all others.
    """
    shared: dict[Hashable, Counter[Hashable]] = {}
    for pile in piles:
        for place, value in _known(pile):
            shared.setdefault(place, Counter())[value] += len(pile.rows)
    disputed = {place: runs for place, runs in shared.items() if len(runs) > 1}
    everyone = sum(len(pile.rows) for pile in piles)

    def rank(pile: _Pile) -> tuple[int, int]:
        common = (disputed[place][value] for place, value in _known(pile) if place in disputed)
        return -min(common, default=everyone), -len(pile.rows)

    return sorted(piles, key=rank)


def _known(pile: _Pile) -> Iterator[tuple[Hashable, Hashable]]:
    yield from pile.drawn.items()
    yield from pile.partial.items()


def _differences(pile: _Pile, largest: _Pile, checks: _Checks) -> Iterator[Difference]:
    """One for each check, as the checks are ordered."""
    pairs = [zip(checks.fixed, pile.fixed, largest.fixed, strict=True)]
    for repeat, values in pile.drawn.items():
        if largest.drawn.get(repeat, values) != values:
            pairs.append(zip(checks.drawn, values, largest.drawn[repeat], strict=True))
            break
    for check, here, there in (one for pair in pairs for one in pair):
        if here != there:
            yield Difference(check.name, check.family or "", here, there)
    for check in checks.partial:
        for (name, scope), here in pile.partial.items():
            there = largest.partial.get((name, scope), here)
            if name == check.name and here != there:
                yield Difference(name, check.family or "", here, there)
                break
