"""One interleaved session: in each round every case, in each case every arm, in rotating order.

What is known is written after every run, so that a session that is interrupted loses nothing that was finished.
"""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime

from bench.probe.machine import commit_and_dirty, processor_name, usable_cores
from bench.record.writing import write_atomically
from tests.peers.arithmetic import tokens_per_second
from tests.peers.arms import Place, run_ours, run_peer
from tests.peers.cases import ARMS, OURS, Arm, Case
from tests.peers.outcome import Outcome, Session
from tests.peers.preparing import SessionAsked, prepare

SESSION_FILE = "peers.json"
Say = Callable[[str], None]


def run_session(asked: SessionAsked, say: Say) -> Session:
    """Prepare, run, and keep writing what is known. Raises UserError for what cannot be asked."""
    started_at, began = datetime.now(UTC).isoformat(timespec="seconds"), time.monotonic()
    subject = asked.out / "subject"
    shutil.rmtree(subject, ignore_errors=True)
    prepared = prepare(asked, subject)
    commit, dirty = commit_and_dirty()
    runs = asked.out.resolve() / "runs" / datetime.now(UTC).strftime("%Y%m%dT%H%M%SZ")
    outcomes: list[Outcome] = []

    def known() -> Session:
        return Session(
            started_at=started_at,
            wall_seconds=time.monotonic() - began,
            rounds=asked.rounds,
            cpu=processor_name(),
            threads=usable_cores(),
            commit=commit,
            dirty=dirty,
            cases=tuple(ready.facts for ready in prepared),
            outcomes=tuple(outcomes),
        )

    turns = list(order(asked.cases, asked.rounds))
    for done, (place, arm) in enumerate(turns, 1):
        ready = next(ready for ready in prepared if ready.case.name == place.case)
        folder = runs / f"{place.round}-{place.case}-{slug(arm.name)}"
        if arm.name == OURS:
            outcome = run_ours(ready.asked, place, folder)
        else:
            outcome = run_peer(arm, place, ready.work_file, folder, asked.pythons, asked.timeout_seconds)
        outcomes.append(outcome)
        write_atomically(asked.out / SESSION_FILE, known().model_dump_json(indent=1) + "\n")
        say(f"[{done}/{len(turns)}] round {place.round + 1}, {place.case}: {in_words(outcome, asked.warmup_steps)}")
        if done < len(turns) and turns[done][0].round != place.round:
            left = estimate(outcomes, turns[done:])
            say(f"round {place.round + 1} of {asked.rounds} done; about {left / 60:.0f} min left")
    shutil.rmtree(subject, ignore_errors=True)
    return known()


def order(cases: tuple[Case, ...], rounds: int) -> Iterator[tuple[Place, Arm]]:
    """Every run of a session. The arms of a case rotate from round to round, so that none is always the one
    which finds the machine warm."""
    for number in range(rounds):
        for case in cases:
            if case.rounds is not None and number >= case.rounds:
                continue
            chosen = (ARMS[name] for name in case.arms)
            arms = [arm for arm in chosen if arm.rounds is None or number < arm.rounds]
            turn = number % len(arms)
            for arm in arms[turn:] + arms[:turn]:
                yield Place(case.name, number), arm


def estimate(outcomes: list[Outcome], left: list[tuple[Place, Arm]]) -> float:
    """Seconds that the runs which are left will take, by what the same ones took so far."""
    taken: dict[tuple[str, str], list[float]] = {}
    for outcome in outcomes:
        taken.setdefault((outcome.case, outcome.arm), []).append(outcome.wall_seconds)
    means = {key: sum(values) / len(values) for key, values in taken.items()}
    typical = sum(means.values()) / len(means)
    return sum(means.get((place.case, arm.name), typical) for place, arm in left)


def in_words(outcome: Outcome, warmup_steps: int) -> str:
    """How a run ended, in one line."""
    if outcome.status != "completed":
        where = f"{outcome.status.replace('_', ' ')} in stage {outcome.stage}"
        return f"{outcome.arm}: {where}: {outcome.message}"
    speed = tokens_per_second(outcome, warmup_steps)
    told = f", {speed:,.0f} tokens/s" if speed is not None else ""
    return f"{outcome.arm}: completed in {outcome.wall_seconds:.0f} s{told}"


def slug(name: str) -> str:
    """A name as part of a file name."""
    return "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")
