"""The step of the first NaN in words: what is known, how it was reached, how well it fits, what else fits.

Used by ``bench.show.diagnosis``.
"""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Iterator, Sequence

from bench.judge.logs.filtered_loss import WHOLE_STEPS, Beginning
from bench.judge.logs.first_nan import (
    LOSS_OF_GUESSING,
    LOWEST_FIRST_LOSS,
    SIGMAS,
    Candidate,
    FirstNaN,
    error_size,
)

EQUAL = 1e-9
"""Difference of two logarithms that is rounding: two beginnings with one prediction."""
MOST_LINES = 20
"""Candidate lines in a terminal; JSON has them all."""


def first_nan_title(first: FirstNaN) -> str:
    """The answer in a few words."""
    if first.step is not None:
        if first.certain or first.earliest == first.latest:
            return f"optimizer step {first.step}"
        return f"optimizer step {first.step} fits best, {first.earliest} to {first.latest} are possible"
    if first.earliest is not None:
        return f"somewhere in optimizer steps {first.earliest} to {first.latest}"
    if first.latest is not None:
        return f"optimizer step {first.latest} at the latest"
    return f"in the entry at {first.window.where}; its optimizer steps are not known"


def first_nan_sentences(first: FirstNaN) -> Iterator[str]:
    """How the answer was reached."""
    span = first.span
    if span is None:
        return
    if first.best is None and not first.candidates:
        if first.certain and first.window.loss == 0:
            before = f" The gradient of step {span.first - 1} was finite." if span.first > 1 else ""
            yield (
                f"Steps {span.first} to {span.last} logged exactly 0.0, so none of their micro-batches had a "
                f"finite loss; it began with the first, in the forward pass.{before}"
            )
        elif first.step is None:
            yield f"The entry speaks of steps {span.first} to {span.last} together."
        if not first.fits:
            yield f"No accumulation from 1 to {first.tried_accumulation} explains what it logged."
        return
    yield from _how(first)
    if first.best is not None:
        yield from _fit(first, first.best)


def _how(first: FirstNaN) -> Iterator[str]:
    span, ordinary = first.span, first.ordinary
    assert span is not None
    logged = f"Steps {span.first} to {span.last} logged {first.window.loss:.6g}."
    if ordinary is None:
        yield (
            f"{logged} No finite entry comes before, so the loss they had is not known: shown is what each "
            f"beginning of NaN would imply, where that lies between {LOWEST_FIRST_LOSS} (chosen) and "
            f"{LOSS_OF_GUESSING:.2f} (guessing among 262,144 tokens). --finite-loss would settle it."
        )
    else:
        yield (
            f"{logged} Their loss without NaN: {ordinary.level:.4g} ({ordinary.level_from}), scatter "
            f"{ordinary.scatter:.2%} ({ordinary.scatter_from})."
        )
    if first.accumulation is None:
        counts = _ranges([candidate.beginning.accumulation for candidate in first.candidates])
        lead = "each leads to this step" if first.step is not None else "nothing decides between them"
        yield (
            f"The accumulation is not known. Of 1 to {first.tried_accumulation}, these explain what was "
            f"logged: {counts}; {lead}."
        )


def _fit(first: FirstNaN, best: Candidate) -> Iterator[str]:
    beginning, other = best.beginning, first.runner_up
    if best.predicted_loss is not None:
        verdict = "" if first.fits else f"; that is no fit within {SIGMAS} scatters, and nothing is nearer"
        yield (
            f"NaN {words(beginning, first)} predicts {best.predicted_loss:.6g} (accumulation "
            f"{beginning.accumulation}): off by {_off(best)}{verdict}."
        )
    if not first.fits:
        yield "Several processes, or NaN that came and went within the entry, could be why."
    if other is not None and math.isclose(error_size(other), error_size(best), abs_tol=EQUAL):
        yield f"NaN {words(other.beginning, first)} predicts the same: nothing in the log tells them apart."
    elif other is not None and error_size(other) < error_size(best):
        yield (
            f"NaN {words(other.beginning, first)} is nearer, off by {_off(other)}; within the scatter a "
            "beginning with a whole step is preferred, as weights that broke make it."
        )
    elif other is not None:
        yield f"The next best step is {other.beginning.step}, off by {_off(other)}."
    if beginning.pattern == "from_a_step":
        step = beginning.step
        yield (
            f"Its cause is the forward pass of step {step}, or the backward pass of step {step - 1}, whose "
            "loss was still finite."
        )


def candidate_lines(first: FirstNaN) -> list[str]:
    """What else fits: by accumulation where that is not known, else the nearest steps."""
    if len({candidate.beginning.step for candidate in first.candidates}) < 2:
        return []
    by_accumulation = first.accumulation is None
    lines = _by_accumulation(first.candidates) if by_accumulation else _by_step(first)
    shown = lines[:MOST_LINES]
    if (left_out := (len(lines) if by_accumulation else len(first.candidates)) - len(shown)) > 0:
        shown.append(f"and {left_out} more; --json has them all")
    return ["What fits:", *(f"  {line}" for line in shown)]


def _by_accumulation(candidates: Sequence[Candidate]) -> list[str]:
    """One line for each run of accumulations that lead to the same steps."""
    groups: dict[int, list[Candidate]] = defaultdict(list)
    for candidate in candidates:
        groups[candidate.beginning.accumulation].append(candidate)
    answers = []
    for accumulation, found in sorted(groups.items()):
        whole = [candidate for candidate in found if candidate.beginning.pattern in WHOLE_STEPS]
        # Without a level every candidate fits perfectly, and none is best.
        best = min(whole or found, key=error_size).beginning.step if found[0].log_error is not None else None
        steps = sorted(candidate.beginning.step for candidate in found)
        answers.append((accumulation, (best, steps[0], steps[-1])))
    lines = []
    for (best, low, high), run in itertools.groupby(answers, key=lambda answer: answer[1]):
        several = f"step {low}" if low == high else f"steps {low} to {high}"
        nearest = f" ({best} fits best)" if best is not None and low != high else ""
        lines.append(f"accumulation {_ranges([count for count, _ in run])}: {several}{nearest}")
    return lines


def _by_step(first: FirstNaN) -> list[str]:
    """The nearest beginnings, in the order of their steps."""
    nearest = sorted(first.candidates, key=error_size)[:MOST_LINES]
    lines = []
    for candidate in sorted(nearest, key=lambda c: (c.beginning.step, c.beginning.micro_batch)):
        implied = candidate.implied_loss
        told = (
            f"off by {_off(candidate)}"
            if candidate.log_error is not None
            else f"implying a loss of {implied:.3g}"
            if implied is not None
            else "overflowing float32"
        )
        lines.append(f"{words(candidate.beginning, first)}, {told}")
    return lines


def words(beginning: Beginning, first: FirstNaN) -> str:
    """Where NaN began, in words."""
    match beginning.pattern:
        case "from_a_step":
            return f"from the first micro-batch of step {beginning.step} on"
        case "within_a_step":
            return f"from micro-batch {beginning.micro_batch} of step {beginning.step} on"
        case "one_micro_batch":
            return f"in micro-batch {beginning.micro_batch} alone of step {beginning.step}"
        case "after_the_window":
            inside = first.span is not None and beginning.step <= first.span.last
            return f"in the gradient of step {beginning.step}" if inside else f"from step {beginning.step} on"


def _ranges(numbers: Sequence[int]) -> str:
    """[2, 3, 4, 8] -> "2 to 4, 8"."""
    parts = []
    # Consecutive numbers share their distance to their place.
    for _, run in itertools.groupby(enumerate(sorted(set(numbers))), key=lambda pair: pair[1] - pair[0]):
        members = [value for _, value in run]
        parts.append(str(members[0]) if len(members) == 1 else f"{members[0]} to {members[-1]}")
    return ", ".join(parts)


def _off(candidate: Candidate) -> str:
    return _percent(candidate.log_error) if candidate.log_error is not None else "an unknown amount"


def _percent(log_error: float) -> str:
    """A deviation: in percent where small, as a factor where large."""
    size = abs(log_error)
    if size < math.log(2):
        return f"{math.expm1(size):.2%}"
    return f"a factor of {math.exp(min(size, 700)):.3g}"
