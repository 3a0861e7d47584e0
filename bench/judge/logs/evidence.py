"""The entries of a foreign log that a diagnosis rests on, and what to do next.

``evidence(diagnosis)`` picks a few entries with the reason why each is shown; ``next_steps(diagnosis)``
says what to change and what to run. Words in capitals in a command are for a person to fill in.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

from bench.judge.logs.diagnosis import Diagnosis
from bench.judge.logs.first_nan import FirstNaN

BEFORE = 2
"""Entries shown before the one in which NaN began."""
AFTER = 3
"""Entries shown from it on; the last entry comes on top."""
MOST_SPIKES = 5


@dataclass(frozen=True, slots=True)
class Evidence:
    """One entry of the log."""

    where: str
    text: str
    meaning: str


@dataclass(frozen=True, slots=True)
class NextStep:
    """Something to do."""

    text: str
    command: str | None = None


def evidence(diagnosis: Diagnosis) -> tuple[Evidence, ...]:
    """The entries to look at, in the order of the log; the final mean last."""
    windows = diagnosis.log.windows
    meanings = dict(_meanings(diagnosis))
    meanings.setdefault(len(windows) - 1, "the last entry")
    found = [
        Evidence(windows[place].where, windows[place].text, meanings[place]) for place in sorted(meanings)
    ]
    if diagnosis.log.train_loss_at is not None:
        where, text = diagnosis.log.train_loss_at
        filtered = diagnosis.verdict == "filtered_nan"
        meaning = "its mean is made of those entries and says nothing" if filtered else "the final mean"
        found.append(Evidence(where, text, meaning))
    return tuple(found)


def _meanings(diagnosis: Diagnosis) -> Iterator[tuple[int, str]]:
    """Place of an entry -> why it is shown."""
    windows, began = diagnosis.log.windows, diagnosis.began
    if began is not None:
        for place in range(max(0, began - BEFORE), began):
            yield place, "before the NaN"
        yield began, "NaN began here"
        for place in range(began + 1, min(began + AFTER, len(windows))):
            window = windows[place]
            norm = window.gradient_norm
            lost = window.loss == 0 and (norm is None or not math.isfinite(norm))
            yield place, "no finite loss in any of its micro-batches" if lost else "after it"
        return
    yield 0, "the first entry"
    places = {id(window): place for place, window in enumerate(windows)}
    for spike in sorted(diagnosis.spikes, key=lambda spike: -spike.factor)[:MOST_SPIKES]:
        yield places[id(spike.window)], f"{spike.quantity} {spike.factor:.3g} times the median before it"


def next_steps(diagnosis: Diagnosis) -> tuple[NextStep, ...]:
    """What to do about it, the cheapest first; nothing for a log that shows nothing wrong."""
    match diagnosis.verdict:
        case "filtered_nan" | "non_finite":
            return tuple(_about_nan(diagnosis))
        case "dead":
            return (
                NextStep("See whether gradients reach every adapter at all.", "qlora-bench check BACKEND"),
                NextStep(
                    "Run your model: the gradient of each adapter is recorded.",
                    "qlora-bench run --model MODEL --backend BACKEND --data DATA --trace",
                ),
            )
        case "spiking":
            return (
                NextStep(
                    "Run your model with a trace: it records how close every layer comes to overflow.",
                    "qlora-bench run --model MODEL --backend BACKEND --data DATA --trace",
                ),
            )
        case "finite":
            return ()


def _about_nan(diagnosis: Diagnosis) -> Iterator[NextStep]:
    first = diagnosis.first_nan
    if diagnosis.flags.poisoned.value is not False:
        since = (
            f" after step {_last_good(first)}"
            if first and _last_good(first) is not None
            else " since the NaN"
        )
        sure = "are NaN" if diagnosis.flags.poisoned.value else "may be NaN"
        yield NextStep(f"Keep no checkpoint saved{since}: its trained weights {sure}.")
    if diagnosis.verdict == "filtered_nan":
        yield NextStep(
            "Set logging_nan_inf_filter=False and logging_steps=1 in the run: NaN then shows, at its step."
        )
    if first and first.step is None and first.tried_accumulation:
        yield NextStep(
            "Say how many micro-batches a step had (gradient_accumulation_steps): it singles out the step.",
            f"qlora-bench diagnose {_shell_word(diagnosis)} --accumulation N",
        )
    if first and first.span is None:
        yield NextStep(
            "Say how many optimizer steps lie between entries (logging_steps), and how many micro-batches a "
            "step had (gradient_accumulation_steps): the log does not.",
            f"qlora-bench diagnose {_shell_word(diagnosis)} --logging-steps N --accumulation N",
        )
    steps = f" --steps {first.latest}" if first and first.latest else ""
    yield NextStep(
        "Find the layer and the cure: one change at a time, from the failing setting (DTYPE is yours).",
        "qlora-bench triage --model MODEL --backend BACKEND --dtype DTYPE --data DATA" + steps,
    )
    yield NextStep(
        "Try the most common cure at once: bfloat16 holds numbers that overflow float16.",
        "qlora-bench run --model MODEL --backend BACKEND --dtype bfloat16 --data DATA" + steps,
    )


def _last_good(first: FirstNaN) -> int | None:
    """The last step after which the weights can be trusted; None: not known, or there is none."""
    # A backward pass may have failed in the step before the first loss that is NaN.
    return first.earliest - 2 if first.earliest is not None and first.earliest > 2 else None


def _shell_word(diagnosis: Diagnosis) -> str:
    import shlex

    return shlex.quote(str(diagnosis.log.path))
