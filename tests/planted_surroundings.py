"""Spoils the surroundings of the command or of its workers: installed as ``sitecustomize`` by ``tests/fault_site``.

Python runs it before anything else, in every process; what it does is named by QLORA_PLANT.
"""

from __future__ import annotations

import os
import resource
import signal
import sys
import time
from pathlib import Path
from typing import Any

PARENT_BYTES = 3 * 2**29
"""Of address space for the command: enough for the report's libraries, not for a worker that tells 3 GiB."""
IN_WORKER = "bench.run.worker" in sys.orig_argv


def _parent_memory() -> None:
    hard = resource.getrlimit(resource.RLIMIT_AS)[1]
    resource.setrlimit(resource.RLIMIT_AS, (hard if IN_WORKER else PARENT_BYTES, hard))


def _clock_back() -> None:
    """An hour back at each look."""
    real, looks = time.time, iter(range(10**9))
    time.time = lambda: real() - 3600 * next(looks)  # type: ignore[assignment]
    time.time_ns = lambda: int(time.time() * 10**9)  # type: ignore[assignment]


def _filled_card() -> None:
    from tests.fake_nvml import GIB, FakeCard, FakeNvml

    card = FakeCard(
        "GPU-aaaa1111",
        used_bytes=23 * GIB,
        processes=[(4242, 23 * GIB)],
        process_names={4242: "/usr/bin/somebody"},
    )
    sys.modules["pynvml"] = FakeNvml([card])


def _dies(when: str) -> None:
    """The command is killed at the rename of its first record."""
    if IN_WORKER:
        return
    replace = Path.replace

    def die(self: Path, target: Any) -> Path:
        if not str(target).endswith(".record.json"):
            return replace(self, target)
        if when == "after":
            replace(self, target)
        os.kill(os.getpid(), signal.SIGKILL)
        raise AssertionError("killed")

    Path.replace = die  # type: ignore[method-assign, assignment]


PLANTS = {
    "parent-memory": _parent_memory,
    "clock-back": _clock_back,
    "filled-card": _filled_card,
    "dies-before-rename": lambda: _dies("before"),
    "dies-after-rename": lambda: _dies("after"),
}
if plant := os.environ.get("QLORA_PLANT"):
    PLANTS[plant]()
