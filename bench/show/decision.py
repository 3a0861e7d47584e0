"""The choice in words, as a person would say it: one sentence, how the others stand, and who is out.

``decision_of(comparison)`` gives the text that stands at the top of the page, of the Markdown and below the
terminal's table. Nothing is said that ``bench.judge.decision`` does not hold: where runs cannot tell two
backends apart, they are named together, and where there was one run of each, it is said that one was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

from bench.judge.comparison import Comparison
from bench.judge.decision import MEMORY, SPEED, WEIGHED, Candidate, Decision, Difference, decide, is_reference
from bench.judge.groups import Summary
from bench.judge.rows import Row
from bench.judge.scaler import what_is_not_finite
from bench.judge.stability import BAD
from bench.show.columns import gib, number, outcome, words
from bench.show.page_top import count
from bench.show.runs_shown import runs_shown

MORE_LESS: Mapping[str, tuple[str, str]] = {
    MEMORY: ("more memory", "less memory"),
    SPEED: ("more tokens/s", "fewer tokens/s"),
}
NAMED = 2
"""Conditions that are named of a backend which stands apart."""
LEADS: Mapping[str, str] = {MEMORY: "needs the least memory", SPEED: "is the fastest"}
LEAD_TOGETHER: Mapping[str, str] = {MEMORY: "need the least memory", SPEED: "are the fastest"}


@dataclass(frozen=True)
class DecisionText:
    """What is said of the choice."""

    lead: str
    """Which backend, and at what price."""
    rest: str
    """Whether the gradients survived, and how sure that is; empty where there is no choice."""
    others: tuple[str, ...]
    """One line for each backend that could be chosen and does not lead in everything, and one for the
    unquantized reference."""
    out: tuple[str, ...]
    """One line for each backend that is no choice, with its reason."""

    @property
    def sentence(self) -> str:
        """Both in one."""
        return f"{self.lead} {self.rest}".strip()


def decision_of(comparison: Comparison) -> DecisionText | None:
    """The choice in words; None where no quantized backend completed."""
    decision = decide(comparison)
    if decision is None:
        return None
    best, (lead, *more) = decision.both, _sentence(decision)
    rest = [one for one in decision.candidates if one not in best]
    return DecisionText(
        lead=lead,
        rest=" ".join(more),
        others=(*(_standing(one, decision) for one in rest), *_unquantized(decision)),
        out=tuple(dict.fromkeys((
            *map(_broken, decision.broken),
            *_apart(comparison),
            *_failed(runs_shown(comparison)),
        ))),
    )


def _sentence(decision: Decision) -> Iterator[str]:
    if not decision.candidates:
        yield "None of the quantized backends trained soundly here."
        return
    if len(decision.candidates) == 1:
        (one,) = decision.candidates
        yield f"Only {one.label} can be chosen from: {_figures(one)}."
    elif len(decision.both) == len(decision.candidates):
        yield f"{_listed(decision.candidates)} cannot be told apart, in memory or in speed."
    elif decision.both:
        yield f"{_among(decision)}{_both(decision)}"
    else:
        leads = ", ".join(_lead(decision, field) for field in WEIGHED if field in decision.leaders)
        yield f"{_among(decision)}{leads}{_price(decision)}."
    yield from _stability(decision)
    if not decision.ranked and len(decision.candidates) > 1:
        yield "Each ran once: this is what was measured, and small differences can be chance."


def _among(decision: Decision) -> str:
    """Whom the superlatives are about: the reference may be faster than all of them."""
    return "Of the quantized backends, " if decision.reference else ""


def _both(decision: Decision) -> str:
    one = decision.both[0]
    if len(decision.both) > 1:
        return (
            f"{_listed(decision.both)} need the least memory and are the fastest, and cannot be told apart "
            f"({one.label}: {_figures(one)})."
        )
    level = [
        f"in {name} {_listed(others)} cannot be told apart from it"
        for field, name in ((MEMORY, "memory"), (SPEED, "speed"))
        if (others := [each for each in decision.leaders.get(field, ()) if each is not one])
    ]
    beside = f"; {', and '.join(level)}" if level else ""
    return f"{one.label} needs the least memory and is the fastest ({_figures(one)}){beside}."


def _lead(decision: Decision, field: str) -> str:
    """Who leads in one figure."""
    leaders = decision.leaders[field]
    value = _value(leaders[0].summary, field)
    if len(leaders) > 1:
        return f"{_listed(leaders)} {LEAD_TOGETHER[field]} ({leaders[0].label}: {value})"
    return f"{leaders[0].label} {LEADS[field]} ({value})"


def _price(decision: Decision) -> str:
    """What the first in one figure costs in the other."""
    costs = []
    for field, other in ((MEMORY, SPEED), (SPEED, MEMORY)):
        one = decision.leaders[field][0] if decision.leaders.get(field) else None
        difference = one.differences.get(other) if one else None
        if one and difference and difference.better is False:
            costs.append(f"that of {one.label} is {_amount(difference, other)}")
    return f"; the price {', '.join(costs).removeprefix('that ')}" if costs else ""


def _stability(decision: Decision) -> Iterator[str]:
    verdicts = {one.summary.verdict.verdict for one in decision.candidates}
    if verdicts == {"not_judged"}:
        yield "Stability is not judged here."
    elif verdicts == {"healthy"}:
        yield "Their gradients are healthy." if len(decision.candidates) > 1 else "Its gradients are healthy."
    else:
        unjudged = [one for one in decision.candidates if one.summary.verdict.verdict == "not_judged"]
        yield f"Gradients are healthy, except that {_listed(unjudged)} cannot be judged."


def _standing(one: Candidate, decision: Decision) -> str:
    """One backend beside the leaders."""
    parts = []
    for field, difference in one.differences.items():
        if decision.leaders[field] == (one,):
            parts.append(LEADS[field])
        else:
            level = f"level in {'memory' if field == MEMORY else 'speed'}"
            # What is not said to be beside another is beside the first.
            first = decision.leaders[field][0].label
            than = "" if difference.other == first else f" than {difference.other}"
            parts.append(_amount(difference, field) + than if difference.better is False else level)
    return f"{one.label}: {', '.join(parts)}; {words(one.summary.verdict.verdict)}"


def _unquantized(decision: Decision) -> Iterator[str]:
    """What quantization saves and costs: the reference beside who leads in each figure."""
    one = decision.reference
    if one is None or not one.differences:
        return
    parts = []
    for field, difference in one.differences.items():
        leader = decision.leaders[field][0].label
        level = f"level in {'memory' if field == MEMORY else 'speed'} with {leader}"
        parts.append(level if difference.better is None else f"{_amount(difference, field)} than {leader}")
    yield f"{one.label}, not quantized: {', '.join(parts)}; {words(one.summary.verdict.verdict)}"


def _amount(difference: Difference, field: str) -> str:
    """"12 % more memory (11 to 13 %)"."""
    ratio = difference.ratio
    more, less = MORE_LESS[field]
    text = f"{_percent(ratio.estimate)} {more if ratio.estimate > 1 else less}"
    if ratio.interval is None:
        return text
    ends = sorted(abs(end - 1) for end in (ratio.interval.low, ratio.interval.high))
    return f"{text} ({number(100 * ends[0], 2)} to {number(100 * ends[1], 2)} %)"


def _percent(ratio: float) -> str:
    return f"{number(100 * abs(ratio - 1), 2)} %"


def _figures(one: Candidate) -> str:
    return ", ".join(_value(one.summary, field) for field in WEIGHED if field in one.summary.figures)


def _value(summary: Summary, field: str) -> str:
    median = summary.figures[field].median
    return f"{gib(median)} GiB at the peak" if field == MEMORY else f"{number(median)} tokens/s"


def _listed(ones: Sequence[Candidate]) -> str:
    labels = [one.label for one in ones]
    return labels[0] if len(labels) == 1 else f"{', '.join(labels[:-1])} and {labels[-1]}"


def _broken(summary: Summary) -> str:
    if summary.verdict.verdict not in BAD and (step := summary.failing_step) is not None:
        return f"{summary.label}: {what_is_not_finite(step)} at step {step.index}"
    failure = next((f for row in summary.rows if (f := row.record.first_failure) is not None), None)
    where = "" if failure is None else f" at step {failure.step}" + (
        f" in {failure.module}" if failure.module else ""
    )
    return f"{summary.label}: {words(summary.verdict.verdict)}{where}"


def _apart(comparison: Comparison) -> Iterator[str]:
    """Quantized backends that are not alike the others, with what they differ in."""
    model = _model_of(comparison.groups[0].summaries)
    for group in comparison.groups[1:]:
        if (other := _model_of(group.summaries)) != model:
            # Another question, with an answer of its own: no reason against any of them.
            yield f"{count(len(group.rows), 'run')} of {other}: another model; compare them by themselves"
            continue
        why = [f"{one.name} {one.here} instead of {one.there}" for one in group.differences[:NAMED]]
        for one in group.summaries:
            if not one.sound and not is_reference(one):
                yield _broken(one)
            elif not is_reference(one):
                yield f"{one.label}: stands apart ({'; '.join(why) or 'no repeat in common'})"


def _model_of(summaries: Sequence[Summary]) -> str:
    """Which model a group trained; of a slice, with its number of layers."""
    model = summaries[0].rows[0].record.request.model
    return model.name if model.layers is None else f"{model.name}, {count(model.layers, 'layer')}"


def _failed(rows: Sequence[Row]) -> Iterator[str]:
    for row in rows:
        if not row.completed:
            yield f"{row.label}: {outcome(row)}"
