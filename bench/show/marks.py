"""Ranks and marks in words: the same in the terminal, in Markdown and on the page."""

from __future__ import annotations

from bench.judge.comparison import Comparison
from bench.judge.groups import Group
from bench.judge.ranking import Standing

UNRANKED = "lowest measured of alike runs (tokens/s: highest)"
RANKED = "nobody is surely better, and somebody is surely worse"


def rank_in_words(standing: Standing | None) -> str:
    """A rank as result lists write it, with an equals sign for a tie; empty where there is none."""
    if standing is None or standing.rank is None:
        return ""
    return f"{standing.rank}{'=' if standing.tied else ''}"


def ranks_of(group: Group, label: str) -> dict[str, str]:
    """Row field -> the rank of a backend in words, where it has one."""
    found = {field: rank_in_words(group.standing(field, label)) for field in group.rankings}
    return {field: rank for field, rank in found.items() if rank}


def best_legend(comparison: Comparison) -> str:
    """What a mark means; empty where there is none."""
    marked = [group for group in comparison.groups if any(group.best.values())]
    return "; ".join(dict.fromkeys(RANKED if group.ranked else UNRANKED for group in marked))
