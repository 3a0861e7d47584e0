"""What comes after the training costs nothing of it: an error of the replay, and a worker that cannot be ended."""

from __future__ import annotations

import subprocess
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest

from bench.record.stability import Replay
from bench.run import launch
from bench.run.aftermath import Aftermath


@pytest.mark.parametrize("come", [0, 1])
def test_an_error_of_the_replay_is_told_with_as_much_as_there_was(monkeypatch: pytest.MonkeyPatch, come: int) -> None:
    """As where a card fails meanwhile, and even its cache cannot be emptied any more."""
    told: list[tuple[str, Any]] = []

    def replayed(aftermath: Aftermath) -> Iterator[Replay]:
        yield from [Replay(reproduced=True, module="up_proj")][:come]
        raise RuntimeError("CUDA error: an illegal memory\naccess was encountered")

    monkeypatch.setattr(Aftermath, "_replayed", replayed)
    aftermath: Any = object.__new__(Aftermath)
    aftermath._telling = SimpleNamespace(channel=SimpleNamespace(section=lambda *told_of: told.append(told_of)))
    aftermath.investigate()
    name, last = told[-1]
    assert len(told) == come + 1
    assert (name, last.reproduced, last.module) == ("replay", bool(come), "up_proj" if come else None)
    assert last.error == "RuntimeError: CUDA error: an illegal memory access was encountered"


def test_a_worker_that_the_system_cannot_end_is_left_behind(monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float | None] = []

    def wait(seconds: float | None) -> None:
        waited.append(seconds)
        raise subprocess.TimeoutExpired("worker", seconds or 0.0)

    monkeypatch.setattr("os.killpg", lambda *_: None)
    launch.end(SimpleNamespace(pid=0, poll=lambda: None, wait=wait, stdin=None))  # type: ignore[arg-type]
    assert waited == [launch.GRACE_SECONDS, launch.KILL_SECONDS]
