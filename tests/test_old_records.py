"""Records that earlier states of the project wrote still load and render, one of every shape that there was.

tests/data/records holds them. 2 and 3 are the runs that were committed under results/ then, as they are; of
4-probed, one of those too, the first three steps are kept. The others stand for shapes of which no run was
committed: their numbers are made up, and the models of the commit itself wrote them (f3e8c8a, 054bcad, ec668cb,
36b2343), which is what fixes a shape. None is written anew when the models change.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.errors import BrokenFile
from bench.judge.comparison import compare
from bench.record.migration import without_removed_fields
from bench.record.schema import SCHEMA_VERSION
from bench.record.store import Store, read_document, read_record
from bench.record.triage import Triage, save_triage
from bench.show.page import page
from bench.show.tables import csv, markdown
from tests.command import Command
from tests.record_factory import record, triage

FOLDER = Path(__file__).parent / "data" / "records"
OLD = sorted(FOLDER.glob("*.record.json"))
SHAPES = {
    "1-first": {"request.calibration": False, "proof.first_gradients_finite": False, "workload.batches_without_targets": False},
    "2-committed": {"request.calibration": True, "proof.first_gradients_finite": False, "workload.batches_without_targets": True},
    "3-finite-gradients": {"proof.first_gradients_finite": True, "request.stress": False},
    "4-probed": {"steps.0.probe": True, "request.stress": True, "placement": False},
    "4-overflow": {"first_failure.kind": True, "replay.remedies": True, "placement": False},
    "5-placed": {"placement.places.0.wire_bytes_per_step": True, "load.from_cache": False, "preflight": False},
    "6-cached": {"placement.places.0.wire_bytes_per_step": True, "load.from_cache": True, "preflight": True},
}  # fmt: skip
"""Beginning of a file's name -> which fields its shape has, and which it has not."""


def has(body: Any, path: str) -> bool:
    """Whether a field was written, be it null."""
    for part in path.split("."):
        if isinstance(body, list):
            body = body[int(part)]
        elif isinstance(body, dict) and part in body:
            body = body[part]
        else:
            return False
    return True


def test_there_is_a_record_of_every_shape() -> None:
    assert {path.name.partition(".")[0] for path in OLD} == set(SHAPES)
    assert sum(path.stat().st_size for path in OLD) < 250_000


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.name)
def test_it_is_as_it_was_written(path: Path) -> None:
    body = json.loads(path.read_text(encoding="utf-8"))
    for place, there in SHAPES[path.name.partition(".")[0]].items():
        assert has(body, place) is there, place


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.name)
def test_it_loads_whole(path: Path) -> None:
    """Every value that was written is there; what was added since is null, empty or at its default."""
    body = json.loads(path.read_text(encoding="utf-8"))
    without_removed_fields(body)
    assert not differing(body, json.loads(read_record(path).model_dump_json()))


def differing(old: Any, new: Any, where: str = "") -> list[str]:
    if isinstance(old, dict):
        return [found for key, value in old.items() for found in differing(value, new.get(key), f"{where}.{key}")]
    if isinstance(old, list):
        if len(old) != len(new):
            return [where]
        return [found for place, pair in enumerate(zip(old, new, strict=True)) for found in differing(*pair, f"{where}.{place}")]
    return [] if old == new else [f"{where}: {old!r} is {new!r}"]


@pytest.mark.parametrize("path", [path for path in OLD if not path.name.startswith("1-")], ids=lambda path: path.name)
def test_it_is_still_the_record_of_its_run(path: Path) -> None:
    """Its key is what the request gives today, so that the same command does not repeat the run."""
    found = read_record(path)
    assert found.request.key == found.key


@pytest.mark.parametrize("path", OLD, ids=lambda path: path.name)
def test_it_renders(path: Path) -> None:
    comparison = compare([read_record(path)])
    assert "<table" in page(comparison, ())
    assert read_record(path).request.backend in markdown(comparison)
    assert csv(comparison).count("\n") == 2


def test_all_of_them_stand_in_one_report(command: Command, tmp_path: Path) -> None:
    for path in OLD:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    done = command.run("report", tmp_path)
    # Records of one run by two versions: the run counts once.
    runs = {read_record(path).key for path in OLD}
    assert (done.returncode, len(done.stderr.splitlines())) == (0, len(runs) < len(OLD))
    assert done.stderr.startswith("Recorded more than once")
    assert len(command.json("runs", tmp_path)) == len(OLD)


# ---- what came later, or is none ---------------------------------------------------------------------


def changed(path: Path, **changes: Any) -> Path:
    path.write_text(json.dumps(json.loads(path.read_text(encoding="utf-8")) | changes), encoding="utf-8")
    return path


def test_a_record_of_a_later_version_is_refused_with_what_to_do(command: Command, tmp_path: Path) -> None:
    path = changed(Store(tmp_path).save(record("hqq")), schema_version=SCHEMA_VERSION + 1, a_field_of_then=1, steps=None)
    line = command.refused("report", tmp_path)
    assert path.name in line
    assert f"has record schema {SCHEMA_VERSION + 1}, this version reads {SCHEMA_VERSION}" in line
    assert "upgrade" in line


@pytest.mark.parametrize("version", [0, -1, "1", 1.5, None, [1]])
def test_what_is_no_version_is_refused(tmp_path: Path, version: Any) -> None:
    with pytest.raises(BrokenFile, match="has record schema"):
        read_record(changed(Store(tmp_path).save(record("hqq")), schema_version=version))


def test_a_record_without_a_version_is_refused(tmp_path: Path) -> None:
    path = Store(tmp_path).save(record("hqq"))
    body = json.loads(path.read_text(encoding="utf-8"))
    del body["schema_version"]
    path.write_text(json.dumps(body), encoding="utf-8")
    with pytest.raises(BrokenFile, match="has record schema None, this version reads 1"):
        read_record(path)


def test_a_document_of_a_later_version_is_refused_with_what_to_do(tmp_path: Path) -> None:
    path = changed(save_triage(tmp_path, triage()), triage_version=7, rungs=None)
    with pytest.raises(BrokenFile, match=r"has triage version 7, this version reads 1; .*upgrade"):
        read_document(path, Triage, "a triage")
