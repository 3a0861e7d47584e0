"""The main job through the front door: run, resume, report, list, dry run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.command import Command


@pytest.fixture(scope="module")
def finished(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with one finished run."""
    folder = tmp_path_factory.mktemp("finished") / "records"
    done = command.run("run", "--preset", "tiny", "--backend", "eetq", "--out", folder)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "report:" in done.stdout
    assert "tokens/s" in done.stdout or "tok/s" in done.stdout
    return folder


def test_a_run_leaves_a_record_and_a_report(finished: Path) -> None:
    (record,) = finished.glob("*.record.json")
    body = json.loads(record.read_text())
    assert body["status"] == "completed"
    assert [step["warmup"] for step in body["steps"]] == [True, False, False, False]
    for name in ("report.html", "report.md", "report.csv"):
        assert (finished / name).stat().st_size > 100
    assert not list(finished.glob("*.part"))


def test_the_same_command_skips_what_is_done(command: Command, finished: Path) -> None:
    (record,) = finished.glob("*.record.json")
    before = record.stat().st_mtime_ns
    done = command.run("run", "--preset", "tiny", "--backend", "eetq", "--out", finished)
    assert done.returncode == 0
    assert "skipped" in done.stdout
    assert record.stat().st_mtime_ns == before


def test_force_repeats_and_gives_the_same_numbers(command: Command, finished: Path) -> None:
    (record,) = finished.glob("*.record.json")
    before = json.loads(record.read_text())
    (after,) = command.json("run", "--preset", "tiny", "--backend", "eetq", "--out", finished, "--force")
    assert after["started_at"] >= before["started_at"]
    for old, new in zip(before["steps"], after["steps"], strict=True):
        assert new["losses"] == old["losses"]
        assert new["gradient_norm"] == old["gradient_norm"]


def test_the_recorded_command_repeats_the_run(command: Command, finished: Path) -> None:
    import shlex

    (record,) = finished.glob("*.record.json")
    body = json.loads(record.read_text())
    program, *arguments = shlex.split(body["command"])
    assert program == "qlora-bench"
    (planned,) = command.json(*arguments, "--dry-run")
    assert planned["backend"] == "eetq"
    done = command.run(*arguments, "--out", finished, "--dry-run")
    assert body["key"] in done.stdout
    assert "recorded already" in done.stdout


def test_dry_run_writes_nothing(command: Command, out: Path) -> None:
    done = command.run("run", "--preset", "tiny", "--backend", "all", "--dry-run", "--out", out)
    assert done.returncode == 0
    assert done.stdout.count("to run") == 8
    assert not out.exists()


def test_runs_lists_records_as_one_json_array(command: Command, finished: Path) -> None:
    bodies = command.json("runs", finished)
    assert [body["request"]["backend"] for body in bodies] == ["eetq"]


def test_report_of_a_folder(command: Command, finished: Path) -> None:
    (finished / "report.html").unlink()
    paths = command.json("report", finished)
    assert Path(paths["page"]).is_file()


def test_seeds_and_rounds(command: Command, out: Path) -> None:
    planned = command.json("run", "--preset", "tiny", "--backend", "bf16", "--backend", "hqq", "--repeats", "2",
                           "--seed", "5", "--dry-run", "--out", out)  # fmt: skip
    assert [(run["backend"], run["seed"]) for run in planned] == [
        ("bf16", 5), ("hqq", 5), ("bf16", 6), ("hqq", 6)]  # fmt: skip


def test_float16_scaler_is_recorded(command: Command, out: Path) -> None:
    (body,) = command.json("run", "--preset", "tiny", "--backend", "bf16", "--dtype", "float16", "--out", out)
    assert body["status"] == "completed"
    assert body["quantization"]["effective_dtype"] == "float16"
    assert all(step["loss_scale"] > 0 for step in body["steps"])


def test_accumulation_padding_and_own_data(command: Command, out: Path, tmp_path: Path) -> None:
    data = tmp_path / "mine.jsonl"
    data.write_text('{"prompt": "Say yes.", "response": "Yes, of course."}\n', encoding="utf-8")
    (body,) = command.json(
        "run", "--preset", "tiny", "--backend", "eetq", "--out", out, "--data", data, "--steps", "2",
        "--set", "workload.padding=right", "--set", "workload.gradient_accumulation_steps=3",
        "--set", "workload.micro_batch_size=2")  # fmt: skip
    assert body["status"] == "completed", body["message"]
    assert [len(step["losses"]) for step in body["steps"]] == [3, 3]
    assert body["steps"][0]["tokens"] < 3 * 2 * 64
    assert body["workload"]["examples"] == 2 * 3 * 2
    assert body["request"]["data_digest"]
