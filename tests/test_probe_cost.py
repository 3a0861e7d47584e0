"""``make probes`` on a toy: every way is timed, and a step's recorded time leaves out the reading of the probes."""

from __future__ import annotations

import re
import subprocess
import sys

from tests.command import ROOT, Command

ROUNDS = 3
LINE = re.compile(r"^  (\w+) +median ([\d.]+)   5 % to 95 % [\d.]+ to [\d.]+   over (\d+) rounds$", re.M)


def test_every_way_is_timed_and_the_record_leaves_the_reading_out(command: Command) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.run.probe_cost", "--preset", "tiny", "--rounds", str(ROUNDS)],
        cwd=ROOT, env=command.environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {name: (float(median), int(rounds)) for name, median, rounds in LINE.findall(done.stdout)}
    assert set(found) == {"bare", "observed", "recorded"}
    assert {rounds for _, rounds in found.values()} == {ROUNDS}
    assert 0 < found["recorded"][0] < found["observed"][0]


def test_a_preset_that_does_not_exist_is_one_line(command: Command) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "bench.run.probe_cost", "--preset", "no-such"],
        cwd=ROOT, env=command.environment, capture_output=True, text=True, timeout=200, check=False,
    )  # fmt: skip
    assert done.returncode != 0
    assert "Traceback" not in done.stderr
    assert "no-such" in done.stderr
