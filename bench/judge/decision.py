"""What follows from a comparison for somebody who has to choose a backend.

``decide(comparison)`` weighs the quantized backends of the largest group of alike runs in the two things that
a card limits, memory and speed, and leaves out those whose training broke. It claims no more than the figures
hold: two backends differ *surely* where the interval of their paired ratio lies beyond the noise margin,
*as measured* where there was one run of each, and else not at all. The words are in ``bench.show.decision``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bench.ask.reference import REFERENCE_BACKEND
from bench.judge.comparison import Comparison
from bench.judge.groups import FIGURES, Group, Summary
from bench.judge.intervals import NOISE_MARGIN, Interval, Ratio, differs, paired_ratio

MEMORY, SPEED = "peak_memory_bytes", "tokens_per_second"
WEIGHED = (MEMORY, SPEED)
"""Row fields that a choice is made by."""

Certainty = Literal["surely", "as measured"]


@dataclass(frozen=True)
class Difference:
    """One backend beside another in one figure."""

    ratio: Ratio
    """Over the repeats that both completed."""
    better: bool | None
    """Whether it is the better one; None: they cannot be told apart."""
    certainty: Certainty | None
    """None: they cannot be told apart."""
    other: str
    """Label of the other one."""


@dataclass(frozen=True)
class Candidate:
    """A backend that could be chosen, beside the leaders."""

    summary: Summary
    differences: Mapping[str, Difference]
    """Weighed figure -> beside the one that leads in it; of who is no leader, beside the first that is
    better. A figure that either lacks is absent."""

    @property
    def label(self) -> str:
        """As everywhere in the report."""
        return self.summary.label


@dataclass(frozen=True)
class Decision:
    """Who leads, and how the others stand to them."""

    leaders: Mapping[str, tuple[Candidate, ...]]
    """Weighed figure -> the first of it, then everyone who cannot be told apart from any of them."""
    candidates: tuple[Candidate, ...]
    """In the order of the comparison."""
    broken: tuple[Summary, ...]
    """Quantized backends of the group whose training broke."""
    reference: Candidate | None
    """The unquantized reference beside the leaders, if it completed among them: what quantization costs and
    saves, and no choice."""

    @property
    def both(self) -> tuple[Candidate, ...]:
        """Those that lead in everything that is weighed."""
        parts = [self.leaders[field] for field in WEIGHED if field in self.leaders]
        return tuple(one for one in self.candidates if parts and all(one in part for part in parts))

    @property
    def ranked(self) -> bool:
        """Whether repeats allow to tell surely from as measured."""
        found = [each.ratio.interval for one in self.candidates for each in one.differences.values()]
        return any(interval is not None for interval in found)


def decide(comparison: Comparison) -> Decision | None:
    """The choice within the largest group of alike runs; None: no quantized backend completed there."""
    if not comparison.groups:
        return None
    group = comparison.groups[0]
    quantized = [one for one in group.summaries if not is_reference(one)]
    sound = [one for one in quantized if one.sound]
    if not quantized:
        return None
    first = {field: lead for field in WEIGHED if (lead := _first(sound, field)) is not None}
    level = {field: _level(sound, field, lead) for field, lead in first.items()}
    candidates = tuple(Candidate(one, _differences(one, first) | _behind(one, level, sound)) for one in sound)
    by_label = {one.label: one for one in candidates}
    return Decision(
        leaders={field: tuple(by_label[label] for label in labels) for field, labels in level.items()},
        candidates=candidates,
        broken=tuple(one for one in quantized if not one.sound),
        reference=_reference(group, first),
    )


def is_reference(summary: Summary) -> bool:
    """Whether these runs quantized nothing: they are what the others are held against, and no choice."""
    return summary.rows[0].record.request.backend == REFERENCE_BACKEND


def beside(one: Summary, other: Summary, field: str) -> Difference | None:
    """One backend beside another in a figure; None where they share no repeat that has it."""
    own, base = (_by_repeat(summary, field) for summary in (one, other))
    pairs = [(value, base[repeat]) for repeat, value in sorted(own.items()) if repeat in base]
    if not pairs:
        return None
    ratio = paired_ratio(pairs)
    side = differs(ratio, NOISE_MARGIN)
    certainty: Certainty | None = "surely" if side else None
    if ratio.interval is None:
        # One run of each: all that can be said is what was measured.
        side = differs(replace(ratio, interval=Interval(ratio.estimate, ratio.estimate)), NOISE_MARGIN)
        certainty = "as measured" if side else None
    better = None if side is None else (side == "lower") == (FIGURES[field] == "lowest")
    return Difference(ratio, better, certainty, other.label)


def dominated(group: Group) -> dict[str, str]:
    """Label -> the label of one that is at least level in memory and in speed and better in one of them.

    What broke dominates nothing. Of several that dominate, one is named that nobody dominates, if there is
    one: they can be as in a ring, for "level" does not carry over.
    """
    sound = [one for one in group.summaries if one.sound]
    by = {
        one.label: [other.label for other in sound if other is not one and _dominates(other, one)]
        for one in group.summaries
    }
    return {
        label: next((other for other in others if not by[other]), others[0])
        for label, others in by.items()
        if others
    }


def _dominates(one: Summary, other: Summary) -> bool:
    better = [difference.better if (difference := beside(one, other, field)) else False for field in WEIGHED]
    return False not in better and True in better


def _differences(one: Summary, first: Mapping[str, Summary]) -> dict[str, Difference]:
    found = {field: beside(one, lead, field) for field, lead in first.items()}
    return {field: difference for field, difference in found.items() if difference is not None}


def _behind(
    one: Summary, level: Mapping[str, Sequence[str]], sound: Sequence[Summary]
) -> dict[str, Difference]:
    """In each figure in which it is no leader: beside the first of the leaders, else of the others, that is
    better. Of the very first it may not be told apart."""
    found = {}
    for field, leaders in level.items():
        if one.label in leaders:
            continue
        place = {label: number for number, label in enumerate(leaders)}
        others = sorted(sound, key=lambda other: place.get(other.label, len(place)))
        pairs = (beside(one, other, field) for other in others)
        better = next((pair for pair in pairs if pair is not None and pair.better is False), None)
        if better is not None:
            found[field] = better
    return found


def _first(summaries: Sequence[Summary], field: str) -> Summary | None:
    """The one with the best median, unless another is better within the repeats that both completed: where
    the machine drifted and one of them has fewer repeats, medians are of different times."""
    medians = {one.label: one.figures[field].median for one in summaries if field in one.figures}
    known = [one for one in summaries if math.isfinite(medians.get(one.label, math.nan))]
    pick = min if FIGURES[field] == "lowest" else max
    if not known:
        return None
    lead = pick(known, key=lambda one: medians[one.label])
    for _ in known:  # at most so often: they can be as in a ring
        better = [one for one in known if (pair := beside(one, lead, field)) and pair.better]
        if not better:
            break
        lead = pick(better, key=lambda one: medians[one.label])
    return lead


def _is_worse(one: Summary, other: Summary, field: str) -> bool:
    pair = beside(one, other, field)
    return pair is not None and pair.better is False


def _level(summaries: Sequence[Summary], field: str, lead: Summary) -> list[str]:
    """Labels of the first, then of those that are worse neither than it nor than another of those: "level"
    does not carry over, and a first whose runs scatter is level with many."""
    near = [one for one in summaries if (pair := beside(one, lead, field)) and pair.better is not False]
    kept = [one for one in near if one is lead or not any(_is_worse(one, other, field) for other in near)]
    return sorted((one.label for one in kept), key=lambda label: label != lead.label)


def _by_repeat(summary: Summary, field: str) -> dict[int, float]:
    return {row.repeat: value for row in summary.rows if (value := getattr(row, field)) is not None}


def _reference(group: Group, first: Mapping[str, Summary]) -> Candidate | None:
    found = next((one for one in group.summaries if is_reference(one)), None)
    return Candidate(found, _differences(found, first)) if found else None
