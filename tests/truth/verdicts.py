"""What was planted beside what the records say, with the project's own rules: no process is started here."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from statistics import median
from typing import Any

from bench.judge.comparison import compare
from bench.judge.groups import FIGURES, find_groups
from bench.judge.intervals import NOISE_MARGIN, Ratio, differs, paired_ratio
from bench.judge.rows import make_rows
from bench.record.schema import Record

MIB = 2**20


@dataclass(frozen=True)
class Finding:
    """One planted thing, and what became of it."""

    name: str
    planted: str
    measured: str
    right: bool
    values: Mapping[str, Any] = field(default_factory=dict)
    """For ``--json``."""


def of(records: Sequence[Record], backend: str) -> list[Record]:
    """The runs of one backend, by repeat."""
    own = [record for record in records if record.request.backend == backend]
    return sorted(own, key=lambda record: record.request.repeat)


# ---- the same twice, and a delay -----------------------------------------------------------------


def judge_ties(records: Sequence[Record], twins: tuple[str, str], repeats: int) -> list[Finding]:
    """Each ``repeats`` repeats in a row are one comparison, so that no run is in two of them. One finding for
    each figure that has a better end: in all comparisons, both twins must stand first and tied."""
    blocks = [records_of_block(records, start, repeats) for start in _starts(records, repeats)]
    findings = []
    for figure in (name for name, end in FIGURES.items() if end):
        standings = [_standings(block, twins, figure) for block in blocks]
        if not any(all(pair) for pair in standings):
            continue
        ties = sum(all(one and one.rank == 1 and one.tied for one in pair) for pair in standings)
        ratios = [pair[1].ratio for pair in standings if pair[1] and pair[1].ratio]
        widest = max((_half(ratio) for ratio in ratios), default=math.nan)
        furthest = max((abs(math.log(ratio.estimate)) for ratio in ratios), default=math.nan)
        # Shows what no single comparison could: whether the second of two runs in a row is slower by itself.
        whole = _standings(records, twins, figure)[1]
        overall = whole.ratio if whole else None
        findings.append(
            Finding(
                f"the same twice: {figure}",
                f"{len(blocks)} ties of {repeats} repeats each",
                f"{ties} ties; furthest estimate {100 * math.expm1(furthest):.2f} % from 1, widest interval "
                f"+-{100 * math.expm1(widest):.2f} %" + (f"; over all {_percent(overall)}" if overall else ""),
                right=ties == len(blocks) > 0,
                values={
                    "comparisons": len(blocks),
                    "ties": ties,
                    "ratios": [_ratio_values(ratio) for ratio in ratios],
                    "overall": _ratio_values(overall) if overall else None,
                },
            )
        )
    return findings


def records_of_block(records: Sequence[Record], start: int, repeats: int) -> list[Record]:
    """The runs of the repeats from ``start`` on."""
    return [record for record in records if start <= record.request.repeat < start + repeats]


def reach(records: Sequence[Record], plain: str, other: str) -> float:
    """How far the interval of the ratio of their steps reaches to either side, as a factor less one."""
    ratio = paired_ratio(_steps_of_both(records, plain, other))
    return math.inf if ratio.interval is None else math.sqrt(ratio.interval.high / ratio.interval.low) - 1


def _steps_of_both(records: Sequence[Record], plain: str, other: str) -> list[tuple[float, float]]:
    return [
        (one.step_seconds_median or math.nan, base.step_seconds_median or math.nan)
        for one, base in zip(make_rows(of(records, other)), make_rows(of(records, plain)), strict=True)
    ]


def judge_delay(records: Sequence[Record], plain: str, delayed: str, seconds_per_step: float) -> Finding:
    """The slower one must not tie, and what it is measured as must tie with what was planted."""
    pairs = _steps_of_both(records, plain, delayed)
    planted = 1 + seconds_per_step / median(base for _, base in pairs)
    ratio = paired_ratio(pairs)
    beside = paired_ratio([(slow, base * planted) for slow, base in pairs])
    inside = ratio.interval is not None and ratio.interval.low <= planted <= ratio.interval.high
    right = differs(ratio, NOISE_MARGIN) == "higher" and differs(beside, NOISE_MARGIN) is None
    return Finding(
        "a delay in every layer's forward",
        f"{100 * (planted - 1):+.2f} % of the step, {1000 * seconds_per_step:.3g} ms",
        f"{_percent(ratio)} over {ratio.pairs} pairs, which {'holds' if inside else 'does not hold'} it",
        right,
        {"planted_ratio": planted, "seconds_per_step": seconds_per_step, **_ratio_values(ratio),
         "interval_holds_planted": inside},
    )  # fmt: skip


# ---- a leak --------------------------------------------------------------------------------------


def judge_leak(records: Sequence[Record], plain: str, leaking: str, bytes_per_step: int) -> Finding:
    """A warning names the leaking run alone, with about what it leaks."""
    found = [text for text in compare(records).warnings if " a step" in text and "memory grew" in text]
    named = [text for text in found if text.startswith(leaking)]
    return Finding(
        "leaks",
        f"{bytes_per_step / MIB:g} MiB a step, never let go of",
        "; ".join(found) or "no warning",
        right=len(named) == len(found) == 1,
        values={"bytes_per_step": bytes_per_step, "warnings": found},
    )


# ---- refused, and split --------------------------------------------------------------------------


def judge_refused(records: Sequence[Record], backend: str, planted: str, proof: str, words: str) -> Finding:
    """The run ended as an error of that proof, with those words."""
    (record,) = of(records, backend)
    failed = getattr(record.proof, proof) is False
    return Finding(
        backend.removeprefix("planted-").removeprefix("bad-").replace("-", " "),
        planted,
        f"{record.status} in {record.stage}: {record.message}",
        right=record.status == "error" and failed and words in (record.message or ""),
        values={"status": record.status, "message": record.message, "breaches": list(record.proof.breaches)},
    )


def judge_split(
    records: Sequence[Record], backend: str, planted: str, condition: str, report: str
) -> Finding:
    """The run stands in a group of its own, and the one condition that sets it apart is named, in the report
    too."""
    completed = make_rows([record for record in records if record.status == "completed"])
    groups = [sorted({row.label for row in group.rows}) for group in find_groups(completed)]
    differing = [one.name for one in compare(records).conditions if one.kind == "breaking" and one.differs]
    right = [backend] in groups and len(groups) == 2 and differing == [condition] and condition in report
    return Finding(
        backend.removeprefix("planted-").replace("-", " "),
        planted,
        f"groups {' | '.join(', '.join(group) for group in groups)}; differ in {', '.join(differing) or 'nothing'}",
        right,
        {"groups": groups, "differing": differing},
    )


# ---- details -------------------------------------------------------------------------------------


def _starts(records: Sequence[Record], repeats: int) -> range:
    last = max(record.request.repeat for record in records)
    return range(0, last + 2 - repeats, repeats)


def _standings(records: Sequence[Record], twins: tuple[str, str], figure: str) -> list[Any]:
    groups = find_groups(make_rows([r for r in records if r.status == "completed"]), baseline=twins[0])
    if len(groups) != 1:
        return [None, None]
    return [groups[0].standing(figure, twin) for twin in twins]


def _half(ratio: Ratio) -> float:
    return math.log(ratio.interval.high / ratio.interval.low) / 2 if ratio.interval else math.nan


def _ratio_values(ratio: Ratio) -> dict[str, Any]:
    low, high = (ratio.interval.low, ratio.interval.high) if ratio.interval else (None, None)
    return {"ratio": ratio.estimate, "low": low, "high": high, "pairs": ratio.pairs}


def _percent(ratio: Ratio) -> str:
    if ratio.interval is None:
        return f"{100 * (ratio.estimate - 1):+.2f} %"
    low, high = (100 * (end - 1) for end in (ratio.interval.low, ratio.interval.high))
    return f"{100 * (ratio.estimate - 1):+.2f} % [{low:+.2f} %, {high:+.2f} %]"
