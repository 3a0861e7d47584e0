"""The parent's ear, with small programs in the worker's place."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Mapping
from typing import Any

from bench.run.launch import NO_WORKER, _guarded
from bench.run.listening import listen
from bench.run.told import Ending, Told

CHILD = "import os, time\nif os.fork() == 0:\n    time.sleep(20)\n"


def heard(program: str, seconds: float = 30) -> tuple[bool, float, Told, list[Mapping[str, Any]]]:
    """In time or not, how long it took, what was kept, and what the display heard."""
    read_end, write_end = os.pipe()
    process = subprocess.Popen([sys.executable, "-c", program, str(write_end)], pass_fds=[write_end])
    os.close(write_end)
    told, shown, began = Told(), [], time.monotonic()
    try:
        with os.fdopen(read_end, "rb") as events:
            in_time = listen(events, process, told, shown.append, began + seconds)
    finally:
        process.kill()
        process.wait()
    return in_time, time.monotonic() - began, told, shown


def writing(text: str) -> str:
    return f"import os, sys\nos.write(int(sys.argv[1]), {text.encode()!r})\n"


def test_events_are_kept_and_shown_and_what_is_none_is_passed_over() -> None:
    lines = '{"event": "stage", "name": "load"}\nnoise\n{"event": "stage"}\n{"event": "progress", "done": 1}\n{"ev'
    in_time, _, told, shown = heard(writing(lines))
    assert in_time
    assert told.stage == "load"
    assert [event["event"] for event in shown] == ["stage", "progress"]


def test_a_display_that_cannot_show_an_event_does_not_end_the_run() -> None:
    def show(event: Mapping[str, Any]) -> None:
        raise KeyError("total")

    read_end, write_end = os.pipe()
    os.write(write_end, b'{"event": "stage", "name": "load"}\n{"event": "stage", "name": "train"}\n')
    os.close(write_end)
    told = Told()
    with os.fdopen(read_end, "rb") as events:
        process = subprocess.Popen([sys.executable, "-c", ""])
        assert listen(events, process, told, show, time.monotonic() + 30)
        process.wait()
    assert told.stage == "train"


def test_a_process_that_outlives_the_worker_with_its_pipe_is_not_waited_for() -> None:
    in_time, seconds, told, _ = heard(writing('{"event": "stage", "name": "train"}\n') + CHILD)
    assert in_time
    assert seconds < 10
    assert told.stage == "train"


def test_the_time_is_over_also_for_one_that_never_stops_talking() -> None:
    program = 'import os, sys\nwhile True:\n    os.write(int(sys.argv[1]), b\'{"event": "progress"}\\n\' * 99)\n'
    in_time, seconds, _, shown = heard(program, seconds=1)
    assert not in_time
    assert seconds < 5
    assert shown


def test_the_time_is_over_for_one_that_says_nothing() -> None:
    in_time, seconds, _, _ = heard("import time\ntime.sleep(60)", seconds=0.5)
    assert not in_time
    assert 0.5 <= seconds < 5


def test_what_fails_on_this_side_is_told_as_the_outcome() -> None:
    def work(error: BaseException) -> Ending:
        raise error

    told = Told(stage="load", steps=[1])
    assert _guarded(told, lambda: work(OSError(24, "Too many open files"))) == NO_WORKER
    assert (told.status, told.steps) == ("error", [1])
    assert told.message == "the worker could not be started or heard: [Errno 24] Too many open files"
    told = Told(stage="train", steps=[1])
    assert _guarded(told, lambda: work(MemoryError())) == NO_WORKER
    assert (told.status, told.stage, told.steps) == ("error", "train", [])
