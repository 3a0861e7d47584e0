"""What the harness's loop costs, in the terminal and as JSON."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

from bench.judge.intervals import Ratio
from bench.judge.overhead import FEW_ROUNDS, LOSS_AGREEMENT, POWER, TARGET, VIEWS, Cost, Overhead
from bench.record.overhead import OverheadTimes

VERDICTS = {
    "held": f"at most {TARGET:.0%}: the whole interval is below it",
    "exceeded": f"more than {TARGET:.0%}: the whole interval is above it",
    "undecided": f"undecided: the interval holds {TARGET:.0%}. Use more --rounds, on a quieter machine",
}


def overhead_lines(found: Overhead) -> Iterator[str]:
    """Every figure, for a person."""
    for cost in found.costs:
        yield f"{VIEWS[cost.view]}:"
        seconds = ", ".join(f"{way.replace('_', ' ')} {value:.4g} s" for way, value in cost.seconds.items())
        yield f"  medians           {seconds}"
        yield f"  by hand, again    {_percent(cost.noise)}{_floor(cost)}"
        yield f"  the harness       {_percent(cost.overhead)}{_beside_the_floor(cost)}"
        yield f"  detectable        {_detectable(cost)}"
        yield f"  verdict           {VERDICTS[cost.verdict]}"
    if not found.same_work:
        yield (
            f"Losses differ by up to {found.loss_difference:.2g} of their size, more than "
            f"{LOSS_AGREEMENT:g}: the loops did not train the same, and no figure above can be used."
        )
    if found.rounds < FEW_ROUNDS:
        yield f"Fewer than {FEW_ROUNDS} rounds: their intervals are wide. Use --rounds {FEW_ROUNDS} or more."


def overhead_values(times: OverheadTimes, found: Overhead) -> dict[str, Any]:
    """What was measured and what follows, for ``--json``. Shares, not percent."""
    return {
        "measured": json.loads(times.model_dump_json()),
        "rounds": found.rounds,
        "target": TARGET,
        "loss_difference": found.loss_difference if found.same_work else str(found.loss_difference),
        "same_work": found.same_work,
        "views": {cost.view: _values(cost) for cost in found.costs},
    }


def _values(cost: Cost) -> dict[str, Any]:
    return {
        "what": VIEWS[cost.view],
        "median_seconds": dict(cost.seconds),
        "noise": _ratio_values(cost.noise),
        "noise_floor": cost.noise_floor,
        "overhead": _ratio_values(cost.overhead),
        "within_noise": cost.within_noise,
        "minimum_detectable": cost.minimum_detectable,
        "verdict": cost.verdict,
    }


def _ratio_values(ratio: Ratio) -> dict[str, Any]:
    interval = ratio.interval
    return {
        "ratio": ratio.estimate,
        "low": None if interval is None else interval.low,
        "high": None if interval is None else interval.high,
        "pairs": ratio.pairs,
    }


def _percent(ratio: Ratio) -> str:
    text = f"{100 * (ratio.estimate - 1):+.2f} %"
    if ratio.interval is None:
        return f"{text} (one round: no interval)"
    low, high = (100 * (end - 1) for end in (ratio.interval.low, ratio.interval.high))
    return f"{text}  [{low:+.2f} %, {high:+.2f} %]"


def _floor(cost: Cost) -> str:
    return "" if cost.noise_floor is None else f"  noise floor {100 * cost.noise_floor:.2f} %"


def _beside_the_floor(cost: Cost) -> str:
    if cost.within_noise is None:
        return ""
    return "  within the noise floor" if cost.within_noise else "  beyond the noise floor"


def _detectable(cost: Cost) -> str:
    if cost.minimum_detectable is None:
        return "unknown from one round"
    return f"{100 * cost.minimum_detectable:.2f} % with a probability of {POWER:.0%}"
