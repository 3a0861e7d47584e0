"""Sets of records to compare: rounds of runs with the scatter of a real machine, and one thing planted in them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from bench.judge.regression import Regression, find_regressions
from bench.judge.regression_findings import Finding
from bench.judge.regression_limits import Limits, load_limits
from bench.judge.regression_runs import condense
from bench.record.schema import Record
from tests.record_factory import environment, record

OLD = {"commit": "a" * 40}
NOW = {"commit": "b" * 40}


def rounds(
    backend: str = "hqq",
    count: int = 5,
    *,
    seed: int = 0,
    scatter: float = 0.01,
    times: float = 1.0,
    environment_changes: dict[str, Any] = OLD,
    cpu: bool = False,
    **changes: Any,
) -> list[Record]:
    """``count`` repeats whose step times are ``times`` as long, and scatter from run to run by so much."""
    dice = random.Random(f"{backend} {seed}")
    made = []
    for repeat in range(count):
        one = record(
            backend, repeat=repeat, cpu=cpu, environment=environment(cpu=cpu, **environment_changes), **changes
        )
        made.append(timed(one, times * (1 + dice.gauss(0, scatter))))
    return made


def timed(one: Record, times: float) -> Record:
    """Every step ``times`` as long."""
    steps = tuple(step.model_copy(update={"seconds": step.seconds * times}) for step in one.steps)
    return one.model_copy(update={"steps": steps})


def later(records: Iterable[Record], **changes: Any) -> list[Record]:
    """The same runs as the harness of the next commit made them."""
    return [
        one.model_copy(update={"environment": environment(cpu=one.request.device == "cpu", **(NOW | changes))})
        for one in records
    ]


def each(records: Iterable[Record], change: Callable[[Record], dict[str, Any]]) -> list[Record]:
    """Every record with what ``change`` makes of it."""
    return [one.model_copy(update=change(one)) for one in records]


def inside(part: str, **changes: Any) -> Callable[[Record], dict[str, Any]]:
    """For `each`: another value of some fields of one part of a record."""
    return lambda one: {part: getattr(one, part).model_copy(update=changes)}


def compared(base: Sequence[Record], new: Sequence[Record], limits: Limits | None = None, allow: Iterable[str] = ()) -> Regression:
    return find_regressions(condense(base), condense(new), limits or load_limits(), frozenset(allow))


def finding(regression: Regression, title: str, label: str | None = None) -> Finding:
    """The one finding under ``title``."""
    (found,) = [one for one in regression.findings if one.title == title and label in (None, one.label)]
    return found


def failing(regression: Regression) -> set[tuple[str, str]]:
    """Label and title of everything that is a reason to fail."""
    return {(one.label, one.title) for one in regression.findings if one.fails}
