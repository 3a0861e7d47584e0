"""What differs between BASE and NEW as a whole, and what to keep in mind when the two are compared."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

from bench.judge.regression_asks import Difference
from bench.judge.regression_pairs import Match
from bench.judge.regression_runs import SILENT, Run
from bench.judge.values import short
from bench.record.environment import Environment

NOT_IN_PLAY = "not in play"
FEW_RUNS = 5
"""Fewer runs a side give wide intervals: the range of 5 values holds their median with a probability of 94 %,
that of 3 with 75 % (``bench.judge.intervals``)."""


def changes_between(base: Sequence[Run], new: Sequence[Run]) -> Iterator[Difference]:
    """Harness, libraries and system, as far as they differ; every value of a side that holds several."""
    sides = _surroundings(base), _surroundings(new)
    for name in dict.fromkeys([*sides[0], *sides[1]]):
        old, now = sides[0].get(name), sides[1].get(name)
        if old != now:
            yield Difference(name, _values(old), _values(now))


def _surroundings(runs: Sequence[Run]) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for run in runs:
        if run.record.environment is not None:
            for name, value in _surrounding(run.record.environment).items():
                found.setdefault(name, set()).add(value)
    return found


def _surrounding(environment: Environment) -> Mapping[str, str]:
    drivers = {device.driver for device in environment.devices if device.driver}
    return {
        "harness commit": short(environment.commit or "outside a checkout"),
        "uncommitted changes in the harness": _yes_or_no(environment.dirty),
        "platform": environment.platform,
        "Python": environment.python,
        "CUDA": environment.cuda or "none",
        **({"driver": ", ".join(sorted(drivers))} if drivers else {}),
        **{name: version or "not installed" for name, version in environment.versions.items()},
    }  # fmt: skip


def _yes_or_no(value: bool | None) -> str:
    return "unknown" if value is None else "yes" if value else "no"


def _values(values: set[str] | None) -> str:
    return NOT_IN_PLAY if values is None else ", ".join(sorted(values))


def notes_about(base: Sequence[Run], new: Sequence[Run], matches: Sequence[Match]) -> Iterator[str]:
    """What limits the conclusions, with what to do about it."""
    yield from _unusable(base, new)
    if matches and not any(True for _ in changes_between(*_matched(matches))):
        yield (
            "BASE and NEW were made by the same harness with the same libraries: what differs is the "
            "machine, chance, or something that no record names."
        )
    yield from _mixed("BASE", [part.base for part in matches])
    yield from _mixed("NEW", [part.new for part in matches])
    fewest = min((min(len(part.base), len(part.new)) for part in matches), default=FEW_RUNS)
    if fewest == 1:
        yield (
            "Some runs stand alone on a side, and one run gives no interval: for them only changes beyond "
            f"the limits for one run are told. Make {FEW_RUNS} rounds of either side."
        )
    elif fewest < FEW_RUNS:
        yield (
            f"Intervals of {fewest} runs a side are wide, so that small regressions cannot be told. Make "
            f"{FEW_RUNS} rounds of either side."
        )
    if matches and not _interleaved(*_matched(matches)):
        yield (
            "All runs of one side were made before the first of the other, so that a drift of the machine "
            "looks like a change. Take turns: a round of BASE, a round of NEW, and so on."
        )
    if any(run.record.request.device == "cpu" for run in (*base, *new)):
        yield "These are figures of a CPU and not of a GPU: what is slower there need not be slower here."


def _unusable(base: Sequence[Run], new: Sequence[Run]) -> Iterator[str]:
    for name, runs in (("BASE", base), ("NEW", new)):
        count = sum(run.record.status in SILENT for run in runs)
        if count:
            yield f"{name} has {count} interrupted run(s), which say nothing and are left out."


def _mixed(name: str, sides: Sequence[Sequence[Run]]) -> Iterator[str]:
    """``sides``: the runs of each match on one side, of which a figure is taken over all."""
    for runs in sides:
        environments = [run.record.environment for run in runs if run.record.environment]
        commits = {environment.commit for environment in environments}
        versions = {tuple(sorted(environment.versions.items())) for environment in environments}
        if len(commits) > 1 or len(versions) > 1:
            what = "commits of the harness" if len(commits) > 1 else "sets of library versions"
            yield (
                f"{name} holds runs of several {what} of one backend, and its figures are taken over all of "
                "them. Keep the records of each in a folder of its own."
            )
            return


def _matched(matches: Sequence[Match]) -> tuple[list[Run], list[Run]]:
    return [run for part in matches for run in part.base], [run for part in matches for run in part.new]


def _interleaved(base: Sequence[Run], new: Sequence[Run]) -> bool:
    """Whether each side began before the other's last run did. Times are UTC, ISO 8601: they sort as text."""
    old, now = [run.record.started_at for run in base], [run.record.started_at for run in new]
    return min(old) < max(now) and min(now) < max(old)
