"""Repeats through the front door: paired seeds, interleaved runs, ratios, and another baseline."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import pytest

from bench.record.store import Store
from tests.command import Command

BACKENDS = ("bf16", "eetq")
REPEATS = 2

pytestmark = pytest.mark.soak
"""Four real runs and a report: half a minute."""


@pytest.fixture(scope="module")
def folder(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two backends, twice each."""
    folder = tmp_path_factory.mktemp("repeats") / "records"
    asked = [part for backend in BACKENDS for part in ("--backend", backend)]
    done = command.run("run", "--preset", "tiny", *asked, "--repeats", str(REPEATS), "--seed", "7", "--out", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "Ratios to bf16" in done.stdout
    return folder


def test_repeat_k_of_every_backend_is_the_same_work(folder: Path) -> None:
    facts: dict[int, set[Any]] = {}
    for record in Store(folder).records():
        assert record.workload is not None
        assert record.lora is not None
        assert record.load is not None
        seen = (
            record.request.seed, record.lora.initial_digest, record.workload.digest, record.load.weights_digest,
        )  # fmt: skip
        facts.setdefault(record.request.repeat, set()).add(seen)
    assert set(facts) == set(range(REPEATS))
    assert all(len(found) == 1 for found in facts.values()), "backends of one repeat differ"
    (first,), (second,) = facts.values()
    assert (first[0], second[0]) == (7, 8)
    assert first[1] != second[1], "two repeats share their initial LoRA values"
    # The seed draws the adapters. Data and synthetic weights are the same in every run.
    assert first[2:] == second[2:]


def test_rounds_are_interleaved(folder: Path) -> None:
    records = sorted(Store(folder).records(), key=lambda record: record.started_at)
    rounds = [record.request.repeat for record in records]
    assert rounds == sorted(rounds)


def test_each_run_was_watched_from_outside(folder: Path) -> None:
    for record in Store(folder).records():
        seen = record.surroundings
        assert seen is not None
        measured = sum(step.seconds for step in record.steps if not step.warmup)
        assert 0.5 * measured < seen.seconds < record.wall_seconds
        assert record.memory.allocator_retries is None, "there is no CUDA allocator on a CPU"


def test_the_report_has_ratios_to_the_baseline_that_was_asked_for(command: Command, folder: Path) -> None:
    paths = command.json("report", folder, "--baseline", "eetq")
    assert "Ratios to eetq" in Path(paths["page"]).read_text(encoding="utf-8")
    assert "ratio-step-time.svg" in {Path(path).name for path in paths["plots"]}
    with Path(paths["figures_csv"]).open(encoding="utf-8", newline="") as stream:
        lines = {(line["label"], line["figure"]): line for line in csv.DictReader(stream)}
    step = lines["bf16", "step_seconds_median"]
    assert (step["baseline"], step["pairs"], step["runs"]) == ("eetq", "2", "2")
    assert float(step["ratio_low"]) <= float(step["ratio"]) <= float(step["ratio_high"])
    bits = lines["eetq", "storage_bits_per_weight"]
    assert (bits["ratio"], bits["rank"], bits["tied"]) == ("1.0", "1", "no")


def test_an_unknown_baseline_is_refused(command: Command, folder: Path) -> None:
    before = (folder / "report.html").stat().st_mtime_ns
    line = command.refused("report", folder, "--baseline", "eetk")
    assert line == "qlora-bench: unknown baseline 'eetk'; did you mean 'eetq'?"
    assert (folder / "report.html").stat().st_mtime_ns == before
