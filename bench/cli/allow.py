"""The option ``--allow`` of every command that shows a comparison, and what is said as a sweep goes on."""

from __future__ import annotations

from collections.abc import Callable, Collection
from typing import TYPE_CHECKING, Any, TypeVar

import click

from bench.judge.families import ALLOWABLE, FAMILIES, parse_allowed

if TYPE_CHECKING:
    from bench.run.sweep import Sweep

Function = TypeVar("Function", bound=Callable[..., Any])

NEVER = tuple(family.name for family in FAMILIES if family.never)


def _parsed(context: click.Context, parameter: click.Parameter, texts: tuple[str, ...]) -> frozenset[str]:
    return parse_allowed(texts)


def allow_option(function: Function) -> Function:
    """Give a command ``--allow``; it gets a set of family names. Raises BadValue while flags are parsed."""
    option = click.option(
        "--allow",
        multiple=True,
        callback=_parsed,
        metavar="DIFFERENCE",
        help="Compare runs that differ in this too, and print the difference at every figure: "
        f"{', '.join(ALLOWABLE)} (repeatable, or with commas). Never: {', '.join(NEVER)}.",
    )
    return option(function)


def other_commits(sweep: Sweep, allow: Collection[str]) -> str | None:
    """What is to be said before a sweep goes on that another commit of the harness began; else None."""
    from bench.judge.values import short
    from bench.probe.machine import commit_and_dirty
    from bench.record.store import read_record

    waiting = {request.key for request in sweep.waiting()}
    kept = [request.key for request in sweep.requests if request.key not in waiting]
    if not waiting or not kept:
        return None
    now, _ = commit_and_dirty()
    paths = [path for key in kept if (path := sweep.store.path(key)).exists()]
    environments = [read_record(path).environment for path in paths]
    before = [each.commit for each in environments if each is not None and each.commit != now]
    if not before:
        return None
    names = ", ".join(dict.fromkeys(short(commit or "none") for commit in before))
    runs = "1 run is" if len(before) == 1 else f"{len(before)} runs are"
    here = f"{runs} recorded already, by another commit of the harness ({names}; now {short(now or 'none')})"
    if "commit" in allow:
        return f"{here}: the report will say so at every figure (--allow commit)."
    return (
        f"{here}: they will stand in a group apart from the new ones. --force runs them again; --allow "
        "commit compares them all the same, and says so at every figure."
    )
