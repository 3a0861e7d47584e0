"""A session as Markdown: what each arm did, whether it was the same work, what each says of itself, what failed."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Sequence

from tabulate import tabulate

from bench.judge.intervals import Ratio, paired_ratio
from tests.peers.arithmetic import claims, tokens_per_second, within_steps
from tests.peers.cases import OURS
from tests.peers.outcome import CaseFacts, Outcome, Session
from tests.peers.sameness import TOLERANCE, compare

MIB = 2**20
Figure = Callable[[Outcome], float | None]


def markdown(session: Session) -> str:
    """The whole page."""
    parts = [_head(session)]
    for case in session.cases:
        if session.arms(case.name):
            parts += _case(session, case)
    parts.append(_environments(session))
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(session: Session) -> str:
    first = session.cases[0].request
    work, model = first.workload, first.model
    return (
        f"# Peers, side by side\n\n"
        f"{model.name.rpartition('/')[2]}, {model.architecture['num_hidden_layers']} layers, "
        f"{work.steps} steps of {work.micro_batch_size} x {work.sequence_length} tokens, of which "
        f"{work.warmup_steps} are warm-up; bfloat16 on {session.threads} threads of {session.cpu}. "
        f"{session.rounds} {'round' if session.rounds == 1 else 'rounds'}, a fresh process for each run, arms "
        f"rotating; {session.started_at}, {session.wall_seconds / 60:.0f} min; commit {_commit(session)}.\n\n"
        f"Speed is that of non-padding tokens from the end of the warm-up to the end of the last step, memory the "
        f"resident one of the process that trains: both measured the same way for every arm. Ratios are to "
        f"{OURS} of the same round, with 95 % intervals (bench/judge/intervals.py)."
    )


def _commit(session: Session) -> str:
    return f"{(session.commit or 'unknown')[:12]}{' with changes' if session.dirty else ''}"


def _case(session: Session, case: CaseFacts) -> list[str]:
    arms = session.arms(case.name)
    done = [arm for arm in arms if _completed(session, case, arm)]
    parts = [f"## {case.name}: {case.says}"]
    if done:
        parts.append(_speeds(session, case, done))
        parts.append(_same_work(session, case, done))
        parts.append(_claims(session, case, done))
    parts.append(_failures(session, case, arms))
    return parts


def _completed(session: Session, case: CaseFacts, arm: str) -> list[Outcome]:
    return [outcome for outcome in session.of(case.name, arm) if outcome.status == "completed"]


def _table(rows: Sequence[Sequence[str]], headers: Sequence[str]) -> str:
    # A bar would end the cell.
    plain = [[cell.replace("|", "\\|") for cell in row] for row in rows]
    return tabulate(plain, headers, tablefmt="pipe", disable_numparse=True)


# ---- speed and memory ----------------------------------------------------------------------------


def _speeds(session: Session, case: CaseFacts, arms: Sequence[str]) -> str:
    warmup = case.request.workload.warmup_steps
    figures: dict[str, Figure] = {
        "tokens/s": lambda outcome: tokens_per_second(outcome, warmup),
        "within steps": lambda outcome: within_steps(outcome, warmup),
        "peak of a step, MiB": lambda outcome: _mebibytes(outcome.step_peak_bytes),
        "peak of the process, MiB": lambda outcome: _mebibytes(outcome.process_peak_bytes),
        "process, s": lambda outcome: outcome.wall_seconds,
    }
    rows = []
    for arm in arms:
        outcomes = _completed(session, case, arm)
        row = [arm]
        for name, figure in figures.items():
            row.append(_shown(_median([figure(outcome) for outcome in outcomes])))
            if name in ("tokens/s", "peak of a step, MiB", "peak of the process, MiB"):
                row.append("" if arm == OURS else _ratio(_pairs(session, case, outcomes, figure)))
        rows.append([*row, str(len(outcomes))])
    headers = ["arm", "tokens/s", "ratio", "within steps", "peak of a step, MiB", "ratio",
               "peak of the process, MiB", "ratio", "process, s", "runs"]  # fmt: skip
    return _table(rows, headers)


def _pairs(
    session: Session, case: CaseFacts, outcomes: Sequence[Outcome], figure: Figure
) -> list[tuple[float, float]]:
    """(the arm's figure, ours) of every round in which both are known."""
    ours = {outcome.round: figure(outcome) for outcome in _completed(session, case, OURS)}
    found = ((figure(outcome), ours.get(outcome.round)) for outcome in outcomes)
    return [(one, other) for one, other in found if one is not None and other is not None]


def _ratio(pairs: Sequence[tuple[float, float]]) -> str:
    if not pairs:
        return "?"
    return ratio_in_words(paired_ratio(pairs))


def ratio_in_words(ratio: Ratio) -> str:
    """``0.873 [0.851, 0.896]``; without an interval where a single pair gives none."""
    if ratio.interval is None:
        return f"{ratio.estimate:.3f}"
    return f"{ratio.estimate:.3f} [{ratio.interval.low:.3f}, {ratio.interval.high:.3f}]"


def _mebibytes(count: int | None) -> float | None:
    return None if count is None else count / MIB


def _median(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    if any(math.isnan(value) for value in known):
        return math.nan
    return statistics.median(known) if known else None


def _shown(value: float | None) -> str:
    if value is None:
        return "?"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else str(value)
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"


# ---- the same work -------------------------------------------------------------------------------


def _same_work(session: Session, case: CaseFacts, arms: Sequence[str]) -> str:
    ours = {outcome.round: outcome for outcome in _completed(session, case, OURS)}
    rows = []
    for arm in arms:
        pairs = [(o, ours[o.round]) for o in _completed(session, case, arm) if o.round in ours]
        if arm == OURS or not pairs:
            continue
        found = [compare(*pair) for pair in pairs]
        worst = found[0]
        problems = dict.fromkeys(problem for one in found for problem in one.problems)
        rows.append(
            [
                arm,
                _yes(worst.same_data),
                _yes(worst.same_adapters),
                f"{pairs[0][0].quantized_layers} of {pairs[0][1].quantized_layers}",
                _small(_worst([one.loss_difference for one in found])),
                f"{worst.equal_losses} of {worst.steps}",
                _small(_worst([one.norm_difference for one in found])),
                "; ".join(problems) or f"the same{_divisor(pairs[0][0])}",
            ]
        )
    if not rows:
        return ""
    headers = ["arm", "data", "initial adapters", "4-bit layers", "largest loss difference", "equal losses",
               "largest norm difference", "work"]  # fmt: skip
    return (
        f"Is it the same work? Losses are compared per predicted token, step by step; up to {TOLERANCE:.2g} "
        f"(2^-8, one rounding of bfloat16) of the loss counts as rounding.\n\n{_table(rows, headers)}"
    )


def _divisor(outcome: Outcome) -> str:
    """Where a peer divides a step's losses by something else than the tokens that are predicted."""
    for place, step in enumerate(outcome.steps):
        if step.divisor is not None and step.divisor != step.loss_tokens:
            counted = f"in step {place} by {step.divisor:.0f} where {step.loss_tokens} are predicted"
            return f"; its sum of losses is divided by the labels before they are shifted, {counted}"
    return ""


def _yes(same: bool | None) -> str:
    return "?" if same is None else "equal" if same else "OTHER"


def _worst(values: Sequence[float | None]) -> float | None:
    known = [value for value in values if value is not None]
    return math.nan if any(math.isnan(value) for value in known) else max(known, default=None)


def _small(value: float | None) -> str:
    return "?" if value is None else "NaN" if math.isnan(value) else "0" if value == 0 else f"{value:.1e}"


# ---- what they say of themselves -----------------------------------------------------------------


def _claims(session: Session, case: CaseFacts, arms: Sequence[str]) -> str:
    """Of the median round of each arm by speed, so that the numbers of a line belong together."""
    work = case.request.workload
    rows = []
    for arm in arms:
        outcome = _typical(_completed(session, case, arm), work.warmup_steps)
        for claim in claims(outcome, work.warmup_steps, work.micro_batch_size):
            times = "" if claim.ratio is None else f"{claim.ratio:.3f}"
            unit = f" {claim.unit}" if claim.unit else ""
            says, measured = f"{_shown(claim.says)}{unit}", _shown(claim.measured)
            rows.append([arm, f"`{claim.name}`", says, measured, times, claim.why])
    headers = ["arm", "its own figure", "says", "measured", "ratio", "why"]
    return f"What each says of itself, in its median round:\n\n{_table(rows, headers)}" if rows else ""


def _typical(outcomes: Sequence[Outcome], warmup_steps: int) -> Outcome:
    known = sorted(outcomes, key=lambda outcome: tokens_per_second(outcome, warmup_steps) or 0.0)
    return known[len(known) // 2]


def _failures(session: Session, case: CaseFacts, arms: Sequence[str]) -> str:
    rows = [
        [outcome.arm, str(outcome.round + 1), outcome.status, str(outcome.stage), str(outcome.message)]
        for arm in arms
        for outcome in session.of(case.name, arm)
        if outcome.status != "completed"
    ]
    if not rows:
        return ""
    return f"Did not run:\n\n{_table(rows, ['arm', 'round', 'status', 'stage', 'message'])}"


def _environments(session: Session) -> str:
    found: dict[str, dict[str, str | None]] = {}
    for outcome in session.outcomes:
        if outcome.versions:
            found.setdefault(outcome.arm, {}).update(outcome.versions)
    names = ["torch", "transformers", "peft", "accelerate", "bitsandbytes", "optimum-benchmark"]
    rows = [[arm, *(versions.get(name) or "" for name in names)] for arm, versions in found.items()]
    return f"## Versions\n\n{_table(rows, ['arm', *names])}" if rows else ""
