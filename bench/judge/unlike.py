"""What must be said where runs are not alike: who stands apart, by which values, and what would help.

``split_in_words(groups, conditions)`` gives sentences for the warnings; ``in_words(condition)`` says one
difference with everyone who has which value.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.judge.alike import Difference
from bench.judge.checks import ENVIRONMENT
from bench.judge.conditions import Condition
from bench.judge.families import BY_NAME, Family
from bench.judge.groups import Group
from bench.judge.values import short

GROUPS_SAID = 5
"""Groups of which it is said one by one what sets them apart; the table of conditions has the rest."""
DIFFERENCES_SAID = 4
NAMES_SAID = 8
VALUES_SAID = 4


def split_in_words(groups: Sequence[Group], conditions: Sequence[Condition]) -> Iterator[str]:
    """Who may be compared with whom, and every difference that may stand inside of a group."""
    if len(groups) > 1:
        yield _overview(groups)
        apart = list(enumerate(groups, start=1))[1:]
        yield from (_of_a_group(place, group) for place, group in apart[:GROUPS_SAID])
        rest = apart[GROUPS_SAID:]
        if rest:
            names = dict.fromkeys(one.name for _, group in rest for one in group.differences)
            causes = listed(list(names), NAMES_SAID) or "other repeats"
            yield f"{len(rest)} more groups stand apart: {causes}."
    for condition in conditions:
        if condition.differs and condition.kind == "declared":
            yield f"Not the same for all runs: {in_words(condition)}. Read their figures with that in mind."


def in_words(condition: Condition) -> str:
    """The name of a condition, and who has which value; those with the value that most have are counted."""
    values = sorted(condition.values, key=lambda value: -len(value.names))
    most = len(values[0].names) > max(2, *(len(value.names) for value in values[1:]))
    parts = [f"{short(value.text)}: {listed(value.names, NAMES_SAID)}" for value in values[:VALUES_SAID]]
    if most:
        parts[0] = f"{short(values[0].text)}: {len(values[0].names)} others"
    more = len(values) - VALUES_SAID
    return f"{condition.name} ({'; '.join(parts)}{f'; and {more} more values' if more > 0 else ''})"


def _overview(groups: Sequence[Group]) -> str:
    largest = groups[0]
    runs = "1 run" if len(largest.rows) == 1 else f"{len(largest.rows)} runs"
    return (
        f"The completed runs are not all alike. They are split into {len(groups)} groups: compare figures "
        f"within a group only{_or_again(groups)}. Largest alike group: {runs}: {_who(largest)}; shown first."
    )


def _or_again(groups: Sequence[Group]) -> str:
    """The remedy where nothing can be allowed."""
    # What one command cannot make alike, a dtype that a kernel insists on, has a remedy of its own.
    if all(group.differences and not _never(group.differences) for group in groups[1:]):
        return ""
    published = {row.record.request.calibration == "published" for group in groups for row in group.rows}
    if len(published) > 1:
        # One command makes no difference: a published checkpoint is another model than the dense one.
        packed = "--calibration rtn, which packs the same weights for all of them"
        return f", or run all backends again with one command and {packed}"
    return ", or run all backends again with one command"


def _never(differences: Sequence[Difference]) -> list[Family]:
    """The families among ``differences`` that can never be allowed."""
    return [family for family in _families(differences) if family.never]


def _families(differences: Sequence[Difference]) -> list[Family]:
    return [BY_NAME[name] for name in dict.fromkeys(one.family for one in differences)]


def _of_a_group(place: int, group: Group) -> str:
    differences = group.differences
    if not differences:
        return (
            f"Group {place} ({_who(group)}): these runs share no repeat with group 1, so no seed, and "
            "nothing shows that they did the same work."
        )
    shown = differences[:DIFFERENCES_SAID]
    said = [f"{one.name} {short(one.here)} instead of {short(one.there)}" for one in shown]
    more = len(differences) - DIFFERENCES_SAID
    if more > 0:
        said.append(f"{more} more, which the table of what was not identical has")
    return f"Group {place} ({_who(group)}) differs from group 1 in: {'; '.join(said)}. {_advice(differences)}"


def _advice(differences: Sequence[Difference]) -> str:
    families, never = _families(differences), _never(differences)
    if never:
        reasons = "; ".join(f"{family.name}: {family.never}" for family in never)
        return f"Nothing can allow that ({reasons})."
    return (
        f"--allow {','.join(family.name for family in families)} puts it beside group 1, and the difference "
        f"is then printed at every figure{_or_instead(families, differences)}."
    )


def _or_instead(families: Sequence[Family], differences: Sequence[Difference]) -> str:
    if any(one.name == ENVIRONMENT for one in differences):
        return ""  # another stack was meant, and no repetition makes it the same
    ways = [family.instead for family in families if family.instead]
    # Whatever else differs, it is one way out only where it covers all that differs.
    return f"; or {ways[0]}" if len(ways) == len(families) == 1 else ""


def _who(group: Group) -> str:
    return listed([summary.label for summary in group.summaries], NAMES_SAID)


def listed(names: Sequence[str], most: int) -> str:
    """Names with commas between them, and how many are left out."""
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
