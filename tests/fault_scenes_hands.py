"""Scenes of the fault matrix around the command itself: its output, signals, and its end at any moment."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

from bench.record.store import read_record
from tests.fault_place import Found, Place, scene, worker_is_gone


@scene("output: closed")
def _closed(place: Place) -> Found:
    return place.simple("early-fails", flags=(), before=lambda: [os.close(number) for number in range(3)])  # type: ignore[arg-type,return-value]


@scene("output: reader gone")
def _reader_gone(place: Place) -> Found:
    process = subprocess.Popen(place.arguments("early-fails", "early-exits"), env=place.variables(),
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    assert process.stdout is not None and process.stderr is not None
    assert process.stdout.readline()
    process.stdout.close()
    errors = process.stderr.read().decode()
    process.stderr.close()
    process.wait(60)
    found = Found(process.returncode, errors, place.records())
    assert len(found.records) == 2, "the runs go on"
    return found


def _hear_ctrl_c() -> None:
    # A shell that started the tests in the background had them ignore SIGINT, and children inherit that.
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def _interrupted(place: Place, backend: str, times: int, **options: Any) -> Found:
    process = place.start(backend, before=_hear_ctrl_c, **options)
    try:
        for _ in range(times):
            process.send_signal(signal.SIGINT)
            time.sleep(1)
        errors = process.communicate(timeout=60)[1].decode()
    finally:
        process.kill()
        process.communicate()
    assert "interrupted: finished records are kept" in errors
    assert worker_is_gone(place.workers()[0])
    return Found(process.returncode, errors, place.records())


@scene("Ctrl-C")
def _ctrl_c(place: Place) -> Found:
    return _interrupted(place, "early-hangs", 1)


@scene("Ctrl-C twice")
def _ctrl_c_twice(place: Place) -> Found:
    return _interrupted(place, "early-deaf", 2)


@scene("Ctrl-C while repeating")
def _ctrl_c_while_repeating(place: Place) -> Found:
    place.simple("early-fails")
    found = _interrupted(place, "early-fails", 1, flags=("--force",), more={"QLORA_PLANT_SECONDS": "600"})
    assert "leave --force out" in found.errors
    return found


@scene("command killed")
def _killed(place: Place) -> Found:
    process = place.start("early-deaf")
    process.kill()
    errors = process.communicate()[1].decode()
    assert worker_is_gone(place.workers()[0])
    shutil.rmtree(place.out)
    return Found(process.returncode, errors)


# ---- power cuts at random moments

ROUND = ("early-fails", "early-exits", "early-not-text")
REPEATS = 3
LONGEST_SECONDS = 2.0
"""Of a command's life: by then it has written several records."""


@scene("power cut: at random moments")
def _at_random(place: Place) -> Found:
    """Each command goes on from what the killed one before it left, until a sweep is complete."""
    chance = random.Random(7)
    kills, whole = 0, 0
    while kills < place.moments:
        place.folder = place.folder.parent / f"sweep-{whole}"
        place.folder.mkdir()
        while True:
            before = _recorded(place.out)
            ran = len(place.workers())
            killed = _killed_after(place, chance.uniform(0.3, LONGEST_SECONDS) if kills < place.moments else None)
            after = _recorded(place.out)
            assert before.items() <= after.items(), "a record was lost or changed"
            # A run whose worker was there but whose record was not yet is run again; nothing else is.
            new, started = len(after) - len(before), len(place.workers()) - ran
            assert new <= started <= new + killed, (new, started)
            kills += killed
            if not killed:
                break
        assert len(after) == len(ROUND) * REPEATS
        # Of a report that was being written something may stay: another command can be writing one meanwhile.
        left = [file.name for file in place.out.glob(".*") if not file.name.startswith(".report.")]
        assert left == [], "what killed commands have left of records is gone"
        whole += 1
    found = place.simple(*ROUND, flags=("--quiet", "--repeats", str(REPEATS)))
    assert _recorded(place.out) == after, "nothing is missing, so nothing is run"
    return found


def _recorded(out: Path) -> dict[str, bytes]:
    """Every record of a folder by its name; each is whole."""
    files = list(out.glob("*.record.json"))
    for file in files:
        assert read_record(file).message
    return {file.name: file.read_bytes() for file in files}


def _killed_after(place: Place, seconds: float | None) -> bool:
    """Run the sweep, and kill the command after so long. Returns whether it was still there."""
    process = subprocess.Popen(place.arguments(*ROUND, flags=("--quiet", "--repeats", str(REPEATS))),
                               env=place.variables(), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
    try:
        errors = process.communicate(timeout=seconds)[1]
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        for worker in place.workers()[-1:]:
            assert worker_is_gone(worker)
        return True
    assert process.returncode == 1, errors
    return False
