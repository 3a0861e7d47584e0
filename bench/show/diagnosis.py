"""A diagnosis as text for a terminal and as a JSON document.

``diagnosis_text`` gives plain lines; ``diagnosis_document`` the same and everything else, with None for
what is absent and the words "NaN", "Infinity" and "-Infinity" for numbers that are not finite.
"""

from __future__ import annotations

import dataclasses
import math
import textwrap
from collections.abc import Iterator
from typing import Any

from bench.judge.logs.diagnosis import Diagnosis
from bench.judge.logs.evidence import evidence, next_steps
from bench.judge.logs.flags import Flag
from bench.judge.scaler import spelt
from bench.show.first_nan import candidate_lines, first_nan_sentences, first_nan_title

WIDTH = 100
TITLES = {
    "finite": "finite",
    "spiking": "spiking",
    "dead": "dead",
    "filtered_nan": "filtered NaN",
    "non_finite": "not finite",
}
KINDS = {
    "trainer_state": "a Trainer's state",
    "llama_factory": "LLaMA-Factory's trainer log",
    "console": "console output",
}
ANSWERS = {True: "yes", False: "no", None: "cannot be told"}


# ---- terminal --------------------------------------------------------------------------------------


def diagnosis_text(diagnosis: Diagnosis) -> str:
    """The diagnosis in lines."""
    lines = [*_wrapped(f"{TITLES[diagnosis.verdict]}: {diagnosis.reason}"), _summary(diagnosis), ""]
    first = diagnosis.first_nan
    if first is not None:
        lines += [f"First NaN: {first_nan_title(first)}"]
        for sentence in first_nan_sentences(first):
            lines += _wrapped(sentence, indent="  ")
        lines += [f"  {line}" for line in candidate_lines(first)]
        lines += _flag("Trained weights poisoned", diagnosis.flags.poisoned)
        lines += _flag("Every update since skipped", diagnosis.flags.skipped)
        lines += [""]
    lines += list(_evidence_lines(diagnosis))
    if diagnosis.notes:
        lines += ["", "To keep in mind"]
        for note in diagnosis.notes:
            lines += _wrapped(f"- {note}", indent="  ", hanging="    ")
    if steps := next_steps(diagnosis):
        lines += ["", "Next"]
        for step in steps:
            lines += _wrapped(f"- {step.text}", indent="  ", hanging="    ")
            lines += [f"      {step.command}"] if step.command else []
    return "\n".join(lines)


def _summary(diagnosis: Diagnosis) -> str:
    log, spans = diagnosis.log, diagnosis.windows.spans
    steps = f", steps {spans[0].first} to {spans[-1].last}" if spans[0] and spans[-1] else ""
    every = f", one in {diagnosis.windows.logging_steps} steps" if diagnosis.windows.logging_steps else ""
    return f"{len(log.windows)} entries of {KINDS[log.kind]}{steps}{every}"


def _flag(title: str, flag: Flag) -> list[str]:
    told = f"; what would tell: {flag.would_tell}" if flag.would_tell else ""
    return _wrapped(f"{title}: {ANSWERS[flag.value]} ({flag.reason}{told})", hanging="  ")


def _evidence_lines(diagnosis: Diagnosis) -> Iterator[str]:
    shown = evidence(diagnosis)
    width = max(len(item.where) for item in shown)
    yield "Evidence"
    for item in shown:
        yield f"  {item.where:<{width}}  {item.meaning}"
        yield f"  {'':<{width}}    {item.text}"


def _wrapped(text: str, indent: str = "", hanging: str | None = None) -> list[str]:
    return textwrap.wrap(
        text,
        WIDTH,
        initial_indent=indent,
        subsequent_indent=indent if hanging is None else hanging,
        break_on_hyphens=False,
        break_long_words=False,
    )


# ---- JSON ------------------------------------------------------------------------------------------


def diagnosis_document(diagnosis: Diagnosis) -> dict[str, Any]:
    """Everything, in types that JSON has."""
    log, first = diagnosis.log, diagnosis.first_nan
    document = {
        "file": str(log.path),
        "format": log.kind,
        "entries": len(log.windows),
        "logging_steps": diagnosis.windows.logging_steps,
        "accumulation": first.accumulation if first and first.accumulation else log.accumulation,
        "max_steps": log.max_steps,
        "train_loss": log.train_loss,
        "verdict": diagnosis.verdict,
        "reason": diagnosis.reason,
        "first_nan": None
        if first is None
        else {
            **dataclasses.asdict(first),
            "title": first_nan_title(first),
            "explanation": list(first_nan_sentences(first)),
        },
        "poisoned": dataclasses.asdict(diagnosis.flags.poisoned),
        "every_update_skipped": dataclasses.asdict(diagnosis.flags.skipped),
        "spikes": [
            {"where": s.window.where, "quantity": s.quantity, "value": s.value, "median": s.median}
            for s in diagnosis.spikes
        ],
        "evidence": [dataclasses.asdict(item) for item in evidence(diagnosis)],
        "notes": list(diagnosis.notes),
        "next": [dataclasses.asdict(step) for step in next_steps(diagnosis)],
    }
    plain = _plain(document)
    assert isinstance(plain, dict)
    return plain


def _plain(value: object) -> object:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return spelt(value)
    return value
