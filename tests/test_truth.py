"""Known answers. The verdicts can be wrong both ways; the real thing is run in part here, whole as ``make truth``."""

from __future__ import annotations

import math
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bench.judge.intervals import NOISE_MARGIN, differs, paired_ratio
from bench.record.schema import Record
from bench.record.store import Store
from tests.command import ROOT
from tests.record_factory import MIB, record, step
from tests.truth import memory, verdicts
from tests.truth.__main__ import line
from tests.truth.plants import HELD_MIB, MEMORY_REACH, MEMORY_REPEATS, MEMORY_REPEATS_AT_MOST
from tests.truth.session import Session

A, B = "bf16", "hqq"


def under(made: Record, backend: str) -> Record:
    """The same run under another adapter's name."""
    return made.model_copy(update={"request": made.request.model_copy(update={"backend": backend})})


def twins(repeats: int, ratio: Callable[[int], float], noise: float = 0.0) -> list[Record]:
    draw, made = random.Random(0), []
    for repeat in range(repeats):
        for name, factor in ((A, 1.0), (B, ratio(repeat))):
            seconds = 0.2 * factor * (1 + draw.gauss(0, noise))
            one = record(A, repeat=repeat, steps=tuple(step(i, seconds=seconds) for i in range(8)))
            made.append(under(one, name))
    return made


def findings(repeats: int, ratio: Callable[[int], float], **noise: float) -> dict[str, verdicts.Finding]:
    found = verdicts.judge_ties(twins(repeats, ratio, **noise), (A, B), 5)
    return {finding.name.removeprefix("the same twice: "): finding for finding in found}


def test_the_same_adapter_ties_in_every_comparison() -> None:
    found = findings(20, lambda repeat: 1.0, noise=0.003)
    assert set(found) >= {"step_seconds_median", "tokens_per_second", "peak_memory_bytes", "load_seconds"}
    assert all(finding.right for finding in found.values()), [line(finding) for finding in found.values()]
    assert found["step_seconds_median"].values["comparisons"] == 4


def test_one_comparison_that_does_not_tie_is_wrong() -> None:
    found = findings(20, lambda repeat: 1.03 if 5 <= repeat < 10 else 1.0, noise=0.001)
    assert not found["step_seconds_median"].right
    assert found["step_seconds_median"].values["ties"] == 3
    assert found["peak_memory_bytes"].right


def test_comparisons_share_no_run() -> None:
    records = twins(11, lambda repeat: 1.0)
    blocks = [verdicts.records_of_block(records, start, 5) for start in verdicts._starts(records, 5)]
    keys = [(r.request.backend, r.request.repeat) for block in blocks for r in block]
    assert len(blocks) == 2
    assert len(keys) == len(set(keys)) == 20


@pytest.mark.parametrize(("measured", "right"), [(1.05, True), (1.0, False), (1.09, False)])
def test_a_delay_is_right_where_it_is_measured_as_planted(measured: float, right: bool) -> None:
    records = twins(8, lambda repeat: measured, noise=0.002)
    assert verdicts.judge_delay(records, A, B, seconds_per_step=0.01).right is right


@pytest.mark.parametrize(("pairs", "most", "least"), [(16, 0.65, 0.0), (64, 1.0, 0.95)])
def test_how_often_a_delay_is_found_hangs_on_the_pairs(pairs: int, most: float, least: float) -> None:
    """The scatter is that of a real session; so many pairs are not for show."""
    rng, sessions, found = random.Random(4), 60, 0
    for _ in range(sessions):
        made = [(math.exp(rng.gauss(math.log(1.0467), 0.066)), 1.0) for _ in range(pairs)]
        found += differs(paired_ratio(made), NOISE_MARGIN) == "higher"
    assert least <= found / sessions <= most


def test_an_interval_reaches_less_far_with_more_pairs() -> None:
    few, many = (verdicts.reach(twins(repeats, lambda repeat: 1.05, noise=0.03), A, B) for repeats in (8, 32))
    assert many < few / 1.5
    assert verdicts.reach(twins(1, lambda repeat: 1.05), A, B) == math.inf


def holding(more_mib: dict[str, int], repeats: int = 10, noise_mib: float = 2.0) -> list[Record]:
    """Runs, and the same with so much more in the readings of some phases, none exactly."""
    draw, made = random.Random(1), []
    for repeat in range(repeats):
        plain = record(A, repeat=repeat, cpu=True)
        readings = tuple(
            reading.model_copy(
                update={
                    name: value + round((more_mib.get(reading.phase, 0) + draw.gauss(0, noise_mib)) * MIB)
                    for name in memory.PHASE_READINGS[reading.phase]
                    if (value := getattr(reading, name)) is not None
                }
            )
            for reading in plain.memory.readings
        )
        held = plain.model_copy(update={"memory": plain.memory.model_copy(update={"readings": readings})})
        made += [plain, under(held, B)]
    return made


@pytest.mark.parametrize(
    ("more_mib", "right"),
    [({"backward": 64}, True), ({}, False), ({"backward": 58}, False), ({"forward": 64}, False),
     ({"backward": 64, "optimizer_step": 64}, False), ({"backward": 64, "loaded": 6}, False)],
)  # fmt: skip
def test_held_memory_is_right_in_its_phase_alone(more_mib: dict[str, int], right: bool) -> None:
    assert memory.judge_held(holding(more_mib), A, B, "backward", 64 * MIB).right is right


def held_sessions(repeats_at_most: int, sessions: int = 300) -> float:
    """Share of sessions that are right, where pairs scatter as those of two real ones did: by 4 to 10 MiB."""
    rng, right = random.Random(5), 0
    for _ in range(sessions):
        # Of each adapter one: the readings of a run scatter together.
        columns: list[list[float]] = [[] for _ in range(4)]
        scatters = [rng.uniform(4, 10) * MIB for _ in columns]
        while True:
            for column, scatter in zip(columns, scatters, strict=True):
                column += [rng.gauss(0, scatter) for _ in range(MEMORY_REPEATS)]
            found = [memory.Difference.of(column) for column in columns]
            if len(columns[0]) >= repeats_at_most or max((one.high - one.low) / 2 for one in found) <= MEMORY_REACH:
                break
        right += all(one.is_what_was_planted(0, HELD_MIB * MIB) for one in found)
    return right / sessions


@pytest.mark.parametrize(("repeats", "most", "least"), [(MEMORY_REPEATS, 0.8, 0.5), (MEMORY_REPEATS_AT_MOST, 1.0, 0.95)])
def test_how_often_held_memory_is_found_hangs_on_the_repeats(repeats: int, most: float, least: float) -> None:
    assert least <= held_sessions(repeats) <= most


def test_the_widest_reach_is_of_all_adapters_and_phases() -> None:
    few, many = (memory.widest_reach(holding({}, repeats=repeats), A, [B]) for repeats in (5, 20))
    assert many < few / 1.5
    assert memory.widest_reach(holding({}, repeats=1), A, [B]) == math.inf


@pytest.mark.parametrize("unfit", [{"noise_mib": 30.0}, {"repeats": 1}])
def test_memory_in_which_the_plant_could_hide_is_no_right_answer(unfit: dict[str, Any]) -> None:
    assert not memory.judge_held(holding({"backward": 64}, **unfit), A, B, "backward", 64 * MIB).right


@pytest.mark.parametrize(("slope_mib", "right"), [(2, True), (0, False)])
def test_a_leak_is_right_where_it_alone_is_named(slope_mib: int, right: bool) -> None:
    def growing(backend: str, slope: int) -> Record:
        many = tuple(step(i, resident_bytes=(1000 + slope * i) * MIB) for i in range(24))
        return under(record(A, steps=many), backend)

    records = [growing(A, 0), growing(B, slope_mib)]
    assert verdicts.judge_leak(records, A, B, 2 * MIB).right is right
    both = [growing(A, 2), growing(B, slope_mib)]
    assert not verdicts.judge_leak(both, A, B, 2 * MIB).right


def test_a_run_that_was_not_refused_is_wrong() -> None:
    finding = verdicts.judge_refused([record(A)], A, "nothing", "quantized", "bits per weight")
    assert not finding.right
    assert line(finding).startswith("WRONG  bf16: planted nothing; measured completed")


def test_runs_that_were_not_split_are_wrong() -> None:
    condition = "initial LoRA values (digest)"
    alike = [record(A), under(record(A), B)]
    assert not verdicts.judge_split(alike, B, "nothing", condition, condition).right
    other = alike[1].model_copy(
        update={"lora": alike[1].lora and alike[1].lora.model_copy(update={"initial_digest": "other"})}
    )
    assert verdicts.judge_split([alike[0], other], B, "other", condition, f"differ in {condition}").right
    assert not verdicts.judge_split([alike[0], other], B, "other", condition, "a report without it").right


@pytest.mark.parametrize(("share", "right"), [(1.0, True), (0.9, False), (0.0, False)])
def test_hidden_weights_are_right_where_memory_shows_all_of_them(share: float, right: bool) -> None:
    weights = record(A).quantization.weights  # type: ignore[union-attr]
    records = holding({"loaded": round(share * 2 * weights / MIB)})
    assert memory.judge_hidden_weights(records, A, B).right is right


# ---- through the real command --------------------------------------------------------------------


@pytest.fixture(scope="module")
def toy(tmp_path_factory: pytest.TempPathFactory) -> tuple[Session, list[Record]]:
    session = Session(tmp_path_factory.mktemp("truth"), preset="tiny")
    backends = ["twin-a", "planted-other-data", "planted-other-adapters"]
    return session, session.run("split", backends)


@pytest.mark.parametrize(
    ("backend", "condition"),
    [
        ("planted-other-data", "token ids, labels and masks (digest)"),
        ("planted-other-adapters", "initial LoRA values (digest)"),
    ],
)
def test_other_work_is_split_off_and_named(
    toy: tuple[Session, list[Record]], backend: str, condition: str
) -> None:
    session, records = toy
    pair = [one for one in records if one.request.backend in ("twin-a", backend)]
    finding = verdicts.judge_split(pair, backend, "other work", condition, session.report("split"))
    assert finding.right, line(finding)


@pytest.mark.soak
@pytest.mark.alone
def test_every_known_answer(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.truth", "--out", tmp_path / "records", "--json", tmp_path / "truth.json"],
        cwd=ROOT, capture_output=True, text=True, timeout=14_000, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    assert len(list(Store(tmp_path / "records" / "twice").records())) == 200
