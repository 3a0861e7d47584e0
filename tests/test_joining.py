"""Records that several machines made, joined: every run once, and what is twice or missing is named."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest

from bench.ask.plan import RunRequest
from bench.ask.slices import Slice, deal
from bench.record.joining import join
from bench.record.schema import Record
from bench.record.slices import save_slice
from bench.record.store import Store, read_record
from tests.command import ROOT, Command
from tests.front import Ended, Front
from tests.record_factory import eight_backends, failed

SHARDS = 3


@pytest.fixture
def records() -> list[Record]:
    return eight_backends(repeats=2, cpu=True)


def spread(folder: Path, records: list[Record], shards: int = SHARDS) -> dict[str, Path]:
    """Every record in the folder of its shard, as ``run --shard`` leaves them. Key -> its file."""
    plan: list[RunRequest] = [record.request for record in records]
    of_key = {record.key: record for record in records}
    files = {}
    for place, part in enumerate(deal(plan, shards), start=1):
        own = Slice(place, shards)
        save_slice(folder / own.folder_name, own, plan)
        for request in part:
            files[request.key] = Store(folder / own.folder_name).save(of_key[request.key])
    return files


def folders(folder: Path, shards: int = SHARDS) -> list[Path]:
    return [folder / Slice(place, shards).folder_name for place in range(1, shards + 1)]


def test_joined_shards_are_the_whole(tmp_path: Path, records: list[Record]) -> None:
    spread(tmp_path / "parts", records)
    whole = Store(tmp_path / "whole")
    for record in records:
        whole.save(record)
    joined = join(folders(tmp_path / "parts"))
    assert joined.notes == ()
    assert list(joined.records) == list(whole.records())


def test_a_folder_named_twice_or_within_another_is_read_once(tmp_path: Path, records: list[Record]) -> None:
    spread(tmp_path, records)
    joined = join([tmp_path, *folders(tmp_path), tmp_path])
    assert joined.notes == ()
    assert len(joined.records) == len(records)


def test_a_missing_record_is_named_with_its_command(tmp_path: Path, records: list[Record]) -> None:
    files = spread(tmp_path, records)
    (key, lost), *_ = files.items()
    command = read_record(lost).command
    lost.unlink()
    (note,) = join([tmp_path]).notes
    assert note.startswith("Shard 1 of 3: 1 of its ")
    assert key in note
    assert "--shard 1/3" in note
    assert command in note


def test_a_missing_shard_is_named(tmp_path: Path, records: list[Record]) -> None:
    spread(tmp_path, records)
    first, _, third = folders(tmp_path)
    (note,) = join([first, third]).notes
    assert note.startswith("Shard 2 of 3, whose folder is not among these: ")
    assert " and 2 more" in note or " and 3 more" in note


def test_a_run_recorded_twice_counts_once_and_is_named(tmp_path: Path, records: list[Record]) -> None:
    files = spread(tmp_path, records)
    kept = records[0]
    again = kept.model_copy(update={"started_at": "2030-01-01T00:00:00+00:00"})
    Store(tmp_path / "again").save(again)
    joined = join([tmp_path])
    assert len(joined.records) == len(records)
    assert kept in joined.records
    assert again not in joined.records
    (note,) = joined.notes
    assert note.startswith(f"Recorded more than once: {kept.key}.")
    assert len(files) == len(records)


def test_a_run_that_completed_is_kept_before_one_that_did_not(tmp_path: Path, records: list[Record]) -> None:
    spread(tmp_path, records)
    kept = records[0]
    dead = failed("bf16", "crashed", "train", "the node went away").model_copy(
        update={"key": kept.key, "request": kept.request, "started_at": "2020-01-01T00:00:00+00:00"}
    )
    Store(tmp_path / "aside").save(dead)
    joined = join([tmp_path])
    assert kept in joined.records
    assert dead not in joined.records
    assert len(joined.notes) == 1


def test_slices_of_two_plans_say_so(tmp_path: Path, records: list[Record]) -> None:
    spread(tmp_path / "a", records, 2)
    spread(tmp_path / "b", eight_backends(cpu=True), 2)
    notes = join([tmp_path / "a" / "shard-1-of-2", tmp_path / "b" / "shard-2-of-2"]).notes
    assert any(note.startswith("The shards are of 2 plans") for note in notes)
    assert any(note.startswith("Shard 2 of 2 of plan 1, whose folder is not among these") for note in notes)


def report(*arguments: str | Path) -> Ended:
    return Front().run("report", *map(str, arguments))


def test_the_report_of_several_folders(tmp_path: Path, records: list[Record]) -> None:
    files = spread(tmp_path, records)
    next(iter(files.values())).unlink()
    done = report(*folders(tmp_path), "--out", tmp_path / "joined", "--format", "html,markdown,csv")
    assert done.code == 0, done.err
    assert "Shard 1 of 3: 1 of its" in done.err
    for name in ("report.html", "report.md"):
        assert "Shard 1 of 3: 1 of its" in (tmp_path / "joined" / name).read_text()
    # A line for each run, and one above them.
    assert len((tmp_path / "joined" / "report.csv").read_text().splitlines()) == len(records)
    assert not list(tmp_path.glob("shard-*/report.*"))


def test_the_report_stands_in_the_first_folder_unless_told_otherwise(
    tmp_path: Path, records: list[Record]
) -> None:
    spread(tmp_path, records)
    done = report(*folders(tmp_path), "--format", "markdown", "--json")
    assert done.code == 0, done.err
    assert json.loads(done.out)["markdown"] == str(folders(tmp_path)[0] / "report.md")


@pytest.mark.parametrize("content", ["", "{", "[]", '{"slice_version": 2, "place": 1, "slices": []}'])
def test_a_broken_slice_is_refused(tmp_path: Path, records: list[Record], content: str) -> None:
    spread(tmp_path, records)
    (tmp_path / "shard-2-of-3" / "slice.json").write_text(content)
    done = report(tmp_path)
    assert (done.code, done.out) == (2, "")
    (line,) = done.err.splitlines()
    assert "slice.json" in line


@pytest.mark.soak
def test_shards_run_apart_are_the_runs_of_the_whole(command: Command, tmp_path: Path) -> None:
    asked = ["run", "--preset", "tiny", "--backend", "bf16,eetq", "--repeats", "2", "--quiet"]
    whole = command.run(*asked, "--out", tmp_path / "whole")
    assert whole.returncode == 0, whole.stderr
    for place in (1, 2):
        part = command.run(*asked, "--shard", f"{place}/2", "--out", tmp_path / "parts")
        assert part.returncode == 0, part.stderr
    empty = command.run(*asked, "--shard", "5/5", "--out", tmp_path / "parts-of-5")
    assert empty.returncode == 0, empty.stderr
    joined = join([tmp_path / "parts"])
    assert joined.notes == ()

    def work(record: Record) -> tuple[object, ...]:
        assert record.workload is not None
        assert record.lora is not None
        losses = [step.losses for step in record.steps]
        return record.key, record.workload.digest, record.lora.initial_digest, losses

    whole_work = sorted(map(work, Store(tmp_path / "whole").records()))
    assert sorted(map(work, joined.records)) == whole_work

    # What the note offers makes what is missing, either way.
    def of_the_shard(note: str) -> list[str | Path]:
        return [*asked, *shlex.split(re.findall(r"--shard \d/\d", note)[0]), "--out", tmp_path / "parts"]

    def of_one_run(note: str) -> list[str | Path]:
        return [*shlex.split(note.rsplit(": qlora-bench ", 1)[1]), "--quiet", "--out", folder]

    folder = tmp_path / "parts" / "shard-2-of-2"
    for mending in (of_the_shard, of_one_run):
        next(folder.glob("*.record.json")).unlink()
        (note,) = join([tmp_path / "parts"]).notes
        mended = command.run(*mending(note))
        assert mended.returncode == 0, mended.stderr
        joined = join([tmp_path / "parts"])
        assert joined.notes == ()
        assert sorted(map(work, joined.records)) == whole_work


def test_a_forecast_s_slices_are_no_runs_of_the_model_wherever_the_report_is_written(tmp_path: Path) -> None:
    folder = ROOT / "results" / "xeon-2-cores" / "forecast-proxy"
    done = report(folder, "--out", tmp_path, "--format", "csv,markdown")
    assert done.code == 0, done.err
    full = list(folder.glob("*.record.json"))
    assert len(list(folder.rglob("*.record.json"))) > len(full) == 24
    assert len((tmp_path / "report.csv").read_text().splitlines()) == len(full) + 1
    assert "Forecast of the whole model" in (tmp_path / "report.md").read_text()


def test_a_folder_that_is_not_there_is_named_as_it_was_given(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    done = report("nowhere")
    assert (done.code, done.out) == (2, "")
    assert "'nowhere' is not a folder of records" in done.err
