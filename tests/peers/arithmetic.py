"""What an arm says of itself, beside what was measured on it, with the arithmetic that leads from one to the other.

Times are from the end of one step to the end of the next, seen from outside of the loop, for every arm alike: so
they hold fetching, logging and whatever else an arm does between two steps. A figure that was not observed is
None; one that is not finite stays as it is.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from tests.peers.outcome import Outcome, StepSeen

MEGABYTE = 1e6
"""What optimum-benchmark calls MB (trackers/memory.py: ``/ 1e6``)."""


@dataclass(frozen=True)
class Claim:
    """One figure of an arm's own."""

    name: str
    """As the arm names it."""
    says: float | None
    measured: float | None
    unit: str
    why: str
    """The arithmetic, in words and numbers."""

    @property
    def ratio(self) -> float | None:
        """What it says over what was measured."""
        if self.says is None or self.measured is None or self.measured == 0:
            return None
        return self.says / self.measured


# ---- measured ------------------------------------------------------------------------------------


def cycle_seconds(outcome: Outcome, warmup_steps: int) -> float | None:
    """From the end of the warm-up to the end of the last step; None where an end was not seen."""
    if len(outcome.steps) <= warmup_steps or warmup_steps < 1:
        return None
    first, last = outcome.steps[warmup_steps - 1].ended, outcome.steps[-1].ended
    return None if first is None or last is None else last - first


def tokens_per_second(outcome: Outcome, warmup_steps: int) -> float | None:
    """Non-padding tokens of the measured steps over the time that they took from end to end."""
    seconds = cycle_seconds(outcome, warmup_steps)
    tokens = sum(step.tokens for step in outcome.steps[warmup_steps:])
    return tokens / seconds if seconds else None


def within_steps(outcome: Outcome, warmup_steps: int) -> float | None:
    """The same tokens over the time within the steps alone: forward, backward, clipping, update."""
    measured = outcome.steps[warmup_steps:]
    seconds = sum(step.seconds for step in measured)
    return sum(step.tokens for step in measured) / seconds if seconds else None


# ---- claimed -------------------------------------------------------------------------------------


def claims(outcome: Outcome, warmup_steps: int, rows_per_step: int) -> list[Claim]:
    """Every figure of an arm's own that something was measured for; none of a run that did not complete."""
    if outcome.status != "completed":
        return []
    if "report" in outcome.own:
        return _of_optimum(outcome, warmup_steps, rows_per_step)
    if "train_runtime" in outcome.own:
        return _of_trainer(outcome, warmup_steps, rows_per_step)
    return _of_ours(outcome, warmup_steps)


def _of_ours(outcome: Outcome, warmup_steps: int) -> list[Claim]:
    says = outcome.own.get("tokens_per_second")
    measured = tokens_per_second(outcome, warmup_steps)
    why = (
        "the record's steps are timed within the worker, from the forward to the update; measured here is when "
        "the parent hears of their ends, so what the worker does between two steps is in it"
    )
    return [Claim("tokens_per_second", _float(says), measured, "tokens/s", why)]


def _of_trainer(outcome: Outcome, warmup_steps: int, rows_per_step: int) -> list[Claim]:
    own, steps = outcome.own, outcome.steps
    cycle = cycle_seconds(outcome, warmup_steps)
    count = len(steps) - warmup_steps
    runtime = float(own["train_runtime"])
    rows = rows_per_step * len(steps)
    warm = sum(step.seconds for step in steps[:warmup_steps])
    rest = runtime - warm - (cycle or math.nan)
    found = [
        Claim(
            "train_samples_per_second",
            _float(own.get("train_samples_per_second")),
            rows_per_step * count / cycle if cycle else None,
            "rows/s",
            f"{rows} rows / train_runtime {runtime:.2f} s: the whole of train(), of which {warm:.2f} s are the "
            f"first {_steps(warmup_steps)} and {rest:.2f} s come before the first step, between those and at the "
            f"end; the other {_steps(count)} took {_seconds(cycle)}",
        ),
        _input_tokens(outcome),
        *_logged_speed(outcome, warmup_steps),
        _mean_loss(outcome),
    ]
    return [claim for claim in found if claim is not None]


def _input_tokens(outcome: Outcome) -> Claim | None:
    says = outcome.log.get("num_input_tokens_seen")
    if says is None:
        return None
    real = sum(step.tokens for step in outcome.steps)
    padding = says - real
    why = f"every id is counted: {real:,} tokens and {padding:,.0f} of padding" if padding else "no padding"
    return Claim("num_input_tokens_seen", says, float(real), "tokens", why)


def _logged_speed(outcome: Outcome, warmup_steps: int) -> list[Claim]:
    says, seen = outcome.log.get("train_tokens_per_second"), outcome.log.get("num_input_tokens_seen")
    if not says or seen is None:
        return []
    why = (
        f"num_input_tokens_seen {seen:,.0f} / {seen / says:.2f} s since the beginning, the first steps included; "
        f"it is the last of the log's, a running mean and no speed of any step"
    )
    measured = tokens_per_second(outcome, warmup_steps)
    return [Claim("train_tokens_per_second", says, measured, "tokens/s", why)]


def _mean_loss(outcome: Outcome) -> Claim:
    steps = outcome.steps
    true = math.fsum(step.loss_per_token for step in steps) / len(steps)
    bad = [place for place, step in enumerate(steps) if not math.isfinite(step.loss)]
    whole = "the mean over all steps, those of the warm-up included"
    if bad:
        why = (
            f"the losses of {len(bad)} of {len(steps)} steps were not finite, first in step {bad[0]}; "
            f"logging_nan_inf_filter puts the average since the last log entry in their place, which is "
            f"{_shown(steps[bad[0]].logged_loss)} there: {whole}"
        )
    elif _shifted(steps):
        counted = next(step for step in steps if _differs(step))
        why = (
            f"{whole}; each is a sum over predicted tokens divided by the labels before they are shifted (step "
            f"{steps.index(counted)}: {counted.divisor:.0f} where {counted.loss_tokens} are predicted)"
        )
    else:
        why = whole
    return Claim("train_loss", _float(outcome.own.get("train_loss")), true, "", why)


def _shifted(steps: Sequence[StepSeen]) -> bool:
    return any(map(_differs, steps))


def _differs(step: StepSeen) -> bool:
    return step.divisor is not None and step.divisor != step.loss_tokens


def _of_optimum(outcome: Outcome, warmup_steps: int, rows_per_step: int) -> list[Claim]:
    report = outcome.own["report"]
    count = len(outcome.steps) - warmup_steps
    cycle = cycle_seconds(outcome, warmup_steps)
    truth = rows_per_step * count / cycle if cycle else None
    found = [
        _throughput(report, "train", truth, rows_per_step * count),
        _throughput(report, "overall", truth, rows_per_step * len(outcome.steps)),
    ]
    memory = (report["train"].get("memory") or {}).get("max_ram")
    if memory is not None and outcome.process_peak_bytes is not None:
        why = (
            "looked at every 10 ms by another process, from the training's start to its end: what the load "
            "needed is not in it, and a peak between two looks is missed"
        )
        peak = outcome.process_peak_bytes / MEGABYTE
        found.append(Claim("train.memory.max_ram", float(memory), peak, "MB", why))
    busy, wall = (_float(outcome.own.get(f"launch_{kind}_seconds")) for kind in ("cpu", "wall"))
    if outcome.own.get("launcher") == "process" and busy is not None and wall:
        why = (
            f"seconds of processor time that the launching process used in the {wall:.1f} s in which it waited for "
            f"the measured one: it asks in a loop without a pause (launchers/process/launcher.py, launch())"
        )
        found.append(Claim("processor time of the waiting launcher", busy, None, "s", why))
    return found


def _throughput(report: Any, target: str, truth: float | None, volume: int) -> Claim:
    part = report[target]
    says, latency = part["throughput"]["value"], part["latency"]
    total, count, mean = latency["total"], latency["count"], latency["mean"]
    why = (
        f"volume / latency.mean = {volume} rows / {mean:.4f} s (scenarios/training/scenario.py, trackers/latency.py): "
        f"the rows of all {count} steps over the time of one. By its own latencies {volume} rows took "
        f"{total:.2f} s, which is {volume / total:.4f} rows/s: {says / (volume / total):.2f} times less"
    )
    return Claim(f"{target}.throughput.value", float(says), truth, "rows/s", why)


def _float(value: Any) -> float | None:
    return None if value is None else float(value)


def _seconds(value: float | None) -> str:
    return "an unknown time" if value is None else f"{value:.2f} s"


def _shown(value: float | None) -> str:
    return "unknown" if value is None else f"{value:g}"


def _steps(count: int) -> str:
    return "step" if count == 1 else f"{count} steps"
