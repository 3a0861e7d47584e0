"""Doubts about the circumstances of the measuring, in words, each with what to do about it: a machine that
drifted, was busy with something else or throttled its cards, steps of two kinds, an allocator that was full.

``of_the_session(groups, completed)`` looks at all runs side by side, ``of_a_run(row)`` at one.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from datetime import UTC, datetime

from bench.judge.groups import Group
from bench.judge.intervals import NOISE_MARGIN, Ratio, differs, paired_ratio
from bench.judge.modes import Modes, find_modes
from bench.judge.rows import Row
from bench.judge.stability import measured_steps
from bench.record.surroundings import SLOWING_REASONS, CardDuringSteps

BUSY_SHARE: Mapping[str, float] = {"cpu": 0.05, "cuda": 0.5}
"""Device of a run -> the share of the machine's cores that others may keep busy. This project's own. A run on
a CPU uses all cores, so what others take lengthens its steps by about as much: 5 % is the smallest effect
that is meant to be seen. A run on a card needs a core that is free when it wants one, which is no longer
sure once more than half of them are taken."""
NAMED = 3
"""Runs named in one warning, the worst first: forty runs on a busy machine are one doubt, not forty."""
DRIFT_LABELS = 3
"""Fewer backends than this say nothing about the machine: one that became slower may have its own reason."""


def of_the_session(groups: Sequence[Group], completed: Sequence[Row]) -> Iterator[str]:
    """What the repeats of several backends show together, and what the machine did meanwhile."""
    for group in groups:
        drift = find_drift(group)
        if drift is not None:
            yield _drift_in_words(drift)
        yield from _of_the_order(group)
    yield from _of_others(completed)
    yield from _of_the_cards(completed)
    yield from _of_shared_cards(completed)


def find_drift(group: Group) -> Ratio | None:
    """How much longer a step took in the last repeat than in the first, over all backends that have both;
    None where that is within their scatter or within `NOISE_MARGIN`.

    Each backend is one pair. Rounds are interleaved, so that what all of them show is the machine's doing.
    """
    repeats = {row.repeat for row in group.rows}
    if len(repeats) < 2:
        return None
    ends = (max(repeats), min(repeats))
    pairs = []
    for summary in group.summaries:
        seconds = {row.repeat: row.step_seconds_median for row in summary.rows}
        last, first = (seconds.get(repeat) for repeat in ends)
        if last is not None and first is not None:
            pairs.append((last, first))
    if len(pairs) < DRIFT_LABELS:
        return None
    ratio = paired_ratio(pairs)
    return ratio if differs(ratio, NOISE_MARGIN) else None


def _drift_in_words(drift: Ratio) -> str:
    slower = drift.estimate > 1
    change = 100 * (drift.estimate if slower else 1 / drift.estimate) - 100
    assert drift.interval is not None
    low, high = sorted(
        100 * (bound if slower else 1 / bound) - 100 for bound in (drift.interval.low, drift.interval.high)
    )
    return (
        f"The machine drifted: from the first repeat to the last, steps became {change:.2g} % "
        f"{'slower' if slower else 'faster'} for {drift.pairs} backends alike (interval {low:.2g} to "
        f"{high:.2g} %). Ratios are taken within a repeat and stand; medians are of a machine that was not "
        "the same throughout. Let it settle (heat, other programs) and run again with --force."
    )


def _of_the_order(group: Group) -> Iterator[str]:
    """Backends whose repeats did not take turns with the baseline's: the pairs share a seed and no more."""
    spans = {summary.label: _span(summary.rows) for summary in group.summaries}
    base = spans[group.baseline]
    if base is None:
        return
    apart = [label for label, span in spans.items() if span and (span[0] > base[1] or span[1] < base[0])]
    if apart:
        yield (
            f"{', '.join(apart)}: all repeats ran before or after all those of {group.baseline}, not in "
            "turns with them, so whatever changed on the machine in between is in the ratio. Run them again "
            "with one command and --force."
        )


def _span(rows: Sequence[Row]) -> tuple[datetime, datetime] | None:
    """When the first and the last run of several began; None where there is one, or a time that is none."""
    if len(rows) < 2:
        return None
    try:
        times = [datetime.fromisoformat(row.record.started_at) for row in rows]
    except ValueError:
        return None
    # A time without a zone cannot be set beside one that has it.
    aware = [time if time.tzinfo else time.replace(tzinfo=UTC) for time in times]
    return min(aware), max(aware)


def _of_others(completed: Sequence[Row]) -> Iterator[str]:
    """Other programs, in the runs of each kind of device."""
    for device, limit in BUSY_SHARE.items():
        rows = [row for row in completed if row.record.request.device == device]
        shares = {row: share for row in rows if (share := others_share(row)) is not None}
        busy = {row: share for row, share in shares.items() if share > limit}
        if busy:
            worst = max(busy, key=lambda row: busy[row])
            cores = worst.record.surroundings.machine_cores if worst.record.surroundings else 0
            yield (
                f"Other programs used the machine while {len(busy)} of {len(rows)} runs were measured "
                f"({_named(busy)}; up to {100 * busy[worst]:.0f} % of its {cores} cores, and more than "
                f"{100 * limit:.0f} % is told). Close them and run again with --force."
            )


def others_share(row: Row) -> float | None:
    """The share of the machine's cores that others kept busy while a run was measured; None: not known."""
    seen = row.record.surroundings
    if seen is None or seen.other_busy_cores is None or not seen.machine_cores:
        return None
    return seen.other_busy_cores / seen.machine_cores


def _of_the_cards(completed: Sequence[Row]) -> Iterator[str]:
    """Cards that were held back, in all runs together."""
    seen = [(row, card) for row in completed if (s := row.record.surroundings) for card in s.cards]
    for device in dict.fromkeys(card.device for _, card in seen):
        here = [(row, card) for row, card in seen if card.device == device]
        own = [(row, card, slowed) for row, card in here if (slowed := _slowed(card))]
        if not own:
            continue
        shares = {row: max(slowed.values()) / max(card.looks, 1) for row, card, slowed in own}
        reasons = ", ".join(dict.fromkeys(reason for _, _, slowed in own for reason in slowed))
        heat = [c.highest_temperature_celsius for _, c, _ in own if c.highest_temperature_celsius is not None]
        hottest = f", {max(heat)} degrees Celsius at most" if heat else ""
        yield (
            f"{device} throttled while {len(own)} of {len(here)} runs were measured ({reasons}{hottest}; "
            f"{_named(shares)}): their times are those of a slower card. See to cooling and power, let it "
            "cool down, and run again with --force."
        )


def _of_shared_cards(completed: Sequence[Row]) -> Iterator[str]:
    """Runs on whose card another process computed, or could have."""
    seen = [row for row in completed if (s := row.record.surroundings) and s.cards]
    shared = {row: most for row in seen if (most := _most_processes(row)) > 1}
    if shared:
        yield (
            f"A card of {len(shared)} of {len(seen)} runs had other compute processes on it while they were "
            f"measured ({_named(shared)}): times are those of a shared card, and the driver's memory figure "
            "counts all of them. Run one command on a card at a time, again with --force."
        )


def _most_processes(row: Row) -> int:
    cards = row.record.surroundings.cards if row.record.surroundings else ()
    return max((card.most_compute_processes or 0 for card in cards), default=0)


def _slowed(card: CardDuringSteps) -> dict[str, int]:
    reasons = card.throttle_reasons or {}
    return {reason: count for reason, count in reasons.items() if reason.startswith(SLOWING_REASONS)}


def _named(rows: Mapping[Row, float]) -> str:
    """The worst few runs by name."""
    worst = sorted(rows, key=lambda row: rows[row], reverse=True)
    more = len(worst) - NAMED
    return ", ".join(row.name for row in worst[:NAMED]) + (f" and {more} more" if more > 0 else "")


def of_a_run(row: Row) -> Iterator[str]:
    """What one run shows."""
    modes = modes_of(row)
    if modes is not None:
        yield _modes_in_words(modes)
    yield from _of_the_allocator(row)


def modes_of(row: Row) -> Modes | None:
    """The two groups that the run's measured steps fall into; None where they are one."""
    return find_modes([step.seconds for step in measured_steps(row.record)])


def _modes_in_words(modes: Modes) -> str:
    slow, fast = f"{modes.slow} of {modes.slow_seconds:.3g} s", f"{modes.fast} of {modes.fast_seconds:.3g} s"
    if modes.since is not None:
        return (
            f"its measured steps are of two kinds, first {fast}, then {slow}, and nothing between: something "
            "changed for good while it ran. Look for heat, a power limit or another program, and run again."
        )
    return (
        f"its measured steps are of two kinds, {fast} and {slow}, and nothing between: the median is the "
        "time of one kind, and which one may be chance. Raise --steps, and look for what takes turns with it "
        "(another program, cores of two speeds, batches of two lengths)."
    )


def _of_the_allocator(row: Row) -> Iterator[str]:
    retries = row.record.memory.allocator_retries
    if retries:
        times = "once" if retries == 1 else f"{retries} times"
        yield (
            f"the CUDA allocator ran out of memory {times} in measured steps and gave unused blocks back "
            "before it went on: those steps include the wait, and the card is as good as full. Leave it more "
            "room: a shorter sequence, a smaller micro-batch, or PYTORCH_ALLOC_CONF=expandable_segments:True."
        )
