"""Python's garbage collector is put off within, and back again however that ends."""

from __future__ import annotations

import subprocess
import sys

from tests.command import ROOT

IN_A_PROCESS_OF_ITS_OWN = """
import gc
from bench.probe.collector import no_full_collections, old_objects_left_alone
full, normal = [], gc.get_threshold()
gc.callbacks.append(lambda phase, about: full.append(phase) if about["generation"] == 2 else None)
kept = []
def fill():
    for _ in range(400_000):
        kept.append([kept])
fill()
assert full, "nothing would have been put off"
full.clear()
try:
    with no_full_collections():
        fill()
        assert not full
        raise ValueError
except ValueError:
    assert gc.get_threshold() == normal
try:
    with old_objects_left_alone():
        assert gc.get_freeze_count() > 800_000
        raise ValueError
except ValueError:
    assert gc.get_freeze_count() == 0
"""


def test_the_collector_is_put_off_and_comes_back() -> None:
    done = subprocess.run(
        [sys.executable, "-c", IN_A_PROCESS_OF_ITS_OWN], cwd=ROOT, capture_output=True, text=True,
        timeout=100, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
