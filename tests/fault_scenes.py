"""Scenes of the fault matrix around folders, memory, clocks and paths (``tests/fault_place.py``)."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from bench.record.store import read_record
from tests.fault_place import ODD_NAME, Found, Place, scene


def on_a_disk(place: Place, options: str, arguments: Sequence[str]) -> list[str]:
    """The arguments, with the results on a disk in memory that only this command sees."""
    unshare = ["unshare", "--mount"] if os.geteuid() == 0 else ["unshare", "--user", "--map-root-user", "--mount"]
    place.out.mkdir(exist_ok=True)
    script = 'mount -t tmpfs -o "$1" planted "$2" && shift 2 && exec "$@"'
    mounted = [*unshare, "sh", "-c", script, "sh", options, str(place.out)]
    if subprocess.run([*mounted, "true"], capture_output=True, check=False).returncode:
        pytest.skip("this system lets nobody mount a disk of his own (unshare --mount)")
    return [*mounted, *arguments]


# ---- memory


@scene("memory: command")
def _command_memory(place: Place) -> Found:
    return place.simple("early-fills-its-parent", more={"QLORA_PLANT": "parent-memory"})


@scene("memory: a full card")
def _full_card(place: Place) -> Found:
    if Path("/proc/driver/nvidia").exists():
        pytest.skip("this machine has a card, which torch would find")
    found = place.simple("bf16", more={"QLORA_PLANT": "filled-card"})
    (record,) = found.records
    (warning,) = (text for text in record["preflight"]["warnings"] if "4242" in text)
    assert "pid 4242 /usr/bin/somebody with 23.00 GiB" in warning
    assert record["preflight"]["cards"][0]["used_bytes"] == 23 * 2**30
    return found


# ---- disk and folder


@scene("disk: full before")
def _full_before(place: Place) -> Found:
    return place.run(on_a_disk(place, "size=256k", place.arguments("early-fails", flags=["--quiet"])))


@scene("disk: read-only before")
def _read_only_before(place: Place) -> Found:
    return place.run(on_a_disk(place, "ro", place.arguments("early-fails", flags=["--quiet"])))


def _kept_elsewhere(place: Place, backend: str) -> Found:
    kept = place.folder / "kept"
    kept.mkdir()
    arguments = place.arguments(backend, "early-exits", flags=["--quiet"])
    found = place.run(on_a_disk(place, "size=2m", arguments), more={"TMPDIR": str(kept)})
    (file,) = kept.rglob("*.record.json")
    assert str(file) in found.errors
    assert read_record(file).message == "planted"
    assert len(place.workers()) == 1, "nothing more is run where nothing can be kept"
    return found


@scene("disk: full meanwhile")
def _full_meanwhile(place: Place) -> Found:
    return _kept_elsewhere(place, "early-fills-the-disk")


@scene("disk: read-only meanwhile")
def _read_only_meanwhile(place: Place) -> Found:
    return _kept_elsewhere(place, "early-makes-read-only")


@scene("folder: removed meanwhile")
def _removed(place: Place) -> Found:
    found = place.simple("early-fails", "early-removes-the-folder")
    assert "1 of 2 records were removed" in found.errors
    assert [body["request"]["backend"] for body in found.records] == ["early-removes-the-folder"]
    return found


@scene("files: no descriptors left")
def _no_descriptors(place: Place) -> Found:
    hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
    return place.simple("early-fails", before=lambda: resource.setrlimit(resource.RLIMIT_NOFILE, (8, hard)))


def _spoilt_record(place: Place, spoil: Callable[[str], str]) -> Found:
    place.simple("early-fails")
    (file,) = place.out.glob("*.record.json")
    file.write_text(spoil(file.read_text()))
    spoilt = file.read_text()
    arguments = place.arguments("early-fails", flags=["--quiet"])
    done = subprocess.run(arguments, env=place.variables(), capture_output=True, text=True, check=False)
    assert file.name in done.stderr
    assert file.read_text() == spoilt, "it is not written over"
    return Found(done.returncode, done.stderr)


@scene("record: truncated")
def _truncated_record(place: Place) -> Found:
    return _spoilt_record(place, lambda text: text[: len(text) // 2])


@scene("record: alien")
def _alien_record(place: Place) -> Found:
    return _spoilt_record(place, lambda text: json.dumps(json.loads(text) | {"schema_version": 99}))


@scene("folder: two commands")
def _two_commands(place: Place) -> Found:
    first = place.start("early-hangs")
    try:
        found = place.simple("early-fails")
        assert first.poll() is None
        assert len(place.workers()) == 1
    finally:
        first.kill()
        first.communicate()
    assert not found.records
    # The system lets go of what a killed command held.
    assert place.simple("early-fails").of("early-fails")["message"] == "planted"
    return found


def _power_cut(place: Place, when: str, recorded: int) -> Found:
    cut = place.simple("early-fails", "early-exits", more={"QLORA_PLANT": f"dies-{when}-rename"})
    assert cut.code == -signal.SIGKILL
    assert len(cut.records) == recorded
    assert len(list(place.out.glob(".*.part"))) == 1 - recorded
    found = place.simple("early-fails", "early-exits")
    assert len(place.workers()) == 1 + 2 - recorded, "exactly what was missing is run"
    assert not list(place.out.glob(".*"))
    return found


@scene("power cut: before the rename")
def _before_rename(place: Place) -> Found:
    return _power_cut(place, "before", 0)


@scene("power cut: after the rename")
def _after_rename(place: Place) -> Found:
    return _power_cut(place, "after", 1)


# ---- clock, locale, paths


@scene("clock: set back")
def _clock(place: Place) -> Found:
    found = place.simple("bf16", more={"QLORA_PLANT": "clock-back"})
    (record,) = found.records
    parts = [record["load"]["import_seconds"], record["load"]["load_seconds"], *(s["seconds"] for s in record["steps"])]
    assert all(0 < seconds < found.seconds for seconds in parts)
    assert sum(parts) < record["wall_seconds"] < found.seconds
    return found


@scene("locale: C")
def _ascii(place: Place) -> Found:
    place.folder = place.folder / ODD_NAME
    place.folder.mkdir()
    narrow = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "PYTHONIOENCODING": "ascii",
              "TMPDIR": str(place.folder)}  # fmt: skip
    found = place.simple("early-fails", flags=(), more=narrow)
    assert found.output.isascii()
    assert "report: " in found.output
    return found


@scene("locale: Turkish")
def _turkish(place: Place) -> Found:
    known = subprocess.run(["locale", "-a"], capture_output=True, text=True, check=False).stdout
    name = next((line for line in known.split() if line.startswith("tr_TR")), None)
    if name is None:
        pytest.skip("no Turkish locale is installed here")
    return place.simple("bf16", more={"LC_ALL": name, "LANG": name})


@scene("paths: not ASCII")
def _odd_paths(place: Place) -> Found:
    place.folder = place.folder / ODD_NAME
    (place.folder / "tmp x").mkdir(parents=True)
    data = place.folder / "eğitim verisi.jsonl"
    pairs = [{"prompt": f"Was ist {n}? {ODD_NAME}", "response": f"{n} {ODD_NAME}"} for n in range(64)]
    data.write_text("\n".join(json.dumps(pair) for pair in pairs), encoding="utf-8")
    folders = {"TMPDIR": str(place.folder / "tmp x"), "QLORA_BENCH_CACHE": str(place.folder / "cache ü")}
    found = place.simple("bf16", flags=("--quiet", "--data", str(data)), more=folders)
    assert found.records[0]["request"]["workload"]["data"] == str(data)
    return found


@scene("paths: not text")
def _no_text(place: Place) -> Found:
    out = place.folder / os.fsdecode(b"\xff\xfe \x80")
    return place.run(place.arguments("early-fails", out=out), out=out)
