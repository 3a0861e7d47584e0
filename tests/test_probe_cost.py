"""What watching costs: ``make probes`` times every way, and the time of a step leaves the reading of probes out."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from typing import Any

import pytest

from bench.probe.observation import Observation
from bench.run.watch import Watch
from tests.command import ROOT, Command
from tests.rig import Rig, ask, quiet, settled

__all__ = ["settled"]  # a fixture of the test that uses it

ROUNDS = 3
LINE = re.compile(r"^  (\w+) +median ([\d.]+)   5 % to 95 % ([\d.]+) to ([\d.]+)   over (\d+) rounds$", re.M)


def test_every_way_is_timed(command: Command) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.run.probe_cost", "--preset", "tiny", "--rounds", str(ROUNDS)],
        cwd=ROOT, env=command.environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {line[0]: [float(part) for part in line[1:]] for line in LINE.findall(done.stdout)}
    assert set(found) == {"bare", "observed", "recorded"}
    assert {rounds for *_, rounds in found.values()} == {ROUNDS}
    assert all(0 < low <= median <= high for median, low, high, _ in found.values())


def test_a_preset_that_does_not_exist_is_one_line(command: Command) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.run.probe_cost", "--preset", "no-such"],
        cwd=ROOT, env=command.environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "no-such" in done.stderr


@quiet
def test_the_reading_stands_beside_the_time_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    observe = Watch.observe

    def slowly(*given: Any) -> Observation:
        time.sleep(1.0)
        return observe(*given)

    monkeypatch.setattr(Watch, "observe", slowly)
    steps = Rig(ask("bf16")).train().record.steps
    assert steps
    for step in steps:
        assert step.watching_seconds is not None
        assert step.watching_seconds >= 1.0
        assert 0 < step.seconds < 1.0
