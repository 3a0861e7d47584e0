"""A report in other formats than text, what of it is asked for, and a page that is kept current."""

from __future__ import annotations

import io
import math
import signal
import subprocess
import time
from pathlib import Path

import pytest
from pyarrow.parquet import read_table

from bench.judge.comparison import compare
from bench.record.store import Store
from bench.show.files import parquet, png
from bench.show.plots import plots
from bench.show.report import DEFAULT_FORMATS, FORMATS
from bench.show.tables import run_fields
from tests.command import Command
from tests.record_factory import eight_backends, failed, record

PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    store = Store(tmp_path / "records")
    for made in (record("bf16"), record("hqq")):
        store.save(made)
    return store.folder


def test_parquet_holds_every_field_of_every_run_as_it_is() -> None:
    broken = record("gptq")
    steps = tuple(step.model_copy(update={"gradient_norm": math.nan}) for step in broken.steps)
    comparison = compare([
        *eight_backends(), failed("awq", "crashed", "load", "killed"),
        broken.model_copy(update={"steps": steps, "key": "other"}),
    ])  # fmt: skip
    table = read_table(io.BytesIO(parquet(comparison))).to_pylist()
    assert len(table) == len(comparison.rows)
    for found, row in zip(table, comparison.rows, strict=True):
        for name, value in run_fields(row, comparison):
            if isinstance(value, float) and math.isnan(value):
                assert math.isnan(found[name]), name
            else:
                assert found[name] == value, name
    norms = [found["gradient_norm_max"] for found in table]
    assert math.isnan(norms[-1])
    assert norms[-2] is None


def test_parquet_of_nothing_is_a_table_without_rows() -> None:
    assert read_table(io.BytesIO(parquet(compare([])))).num_rows == 0


def test_every_figure_can_be_drawn_as_pixels() -> None:
    drawn = plots(compare(eight_backends()))
    assert len(drawn) > 4
    for plot in drawn:
        content = png(plot)
        assert content.startswith(PNG_SIGNATURE)
        # An empty sheet of this size is below 5 kB.
        assert len(content) > 8_000, plot.name


def test_only_what_is_asked_for_is_written(command: Command, folder: Path) -> None:
    paths = command.json("report", folder, "--format", "csv,parquet", "--format", "png")
    assert set(paths) == {"csv", "figures_csv", "parquet", "plots"}
    written = {path.name for path in folder.iterdir() if "record" not in path.name}
    assert written == {"report.csv", "figures.csv", "report.parquet", "plots"}
    assert {path.suffix for path in (folder / "plots").iterdir()} == {".png"}


def test_the_usual_formats_leave_out_what_is_slow_or_said_twice(command: Command, folder: Path) -> None:
    assert set(DEFAULT_FORMATS) < set(FORMATS)
    assert set(command.json("report", folder)) == {"page", "markdown", "csv", "figures_csv", "plots"}


def test_a_format_that_does_not_exist_is_refused_with_the_nearest(command: Command, folder: Path) -> None:
    assert "'markdwon'; did you mean 'markdown'?" in command.refused("report", folder, "--format", "markdwon")
    assert "--format html" in command.refused("report", folder, "--format", "csv", "--open")
    assert not (folder / "report.csv").exists()


def test_a_page_is_kept_current_until_it_is_told_to_end(command: Command, tmp_path: Path) -> None:
    """It begins before there is a folder, survives a broken record, and ends with a page that is still."""
    store = Store(tmp_path / "sweep")
    process = subprocess.Popen(
        command.arguments("watch", store.folder, "--every", "0.2"),
        env={**command.environment, "PYTHONUNBUFFERED": "1"}, text=True,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
    )  # fmt: skip
    page = store.folder / "report.html"

    def told(words: str) -> str:
        for line in process.stdout or ():
            if words in line:
                return line
        raise AssertionError(f"ended without saying '{words}'")

    try:
        told("watching")
        store.save(record("hqq"))
        told("1 of 1 runs completed")
        assert '<meta http-equiv="refresh" content="0.2">' in page.read_text(encoding="utf-8")
        broken = store.folder / "broken.record.json"
        broken.write_text("{", encoding="utf-8")
        told("broken.record.json' is not a record")
        broken.unlink()
        store.save(failed("awq", "crashed", "load", "killed"))
        told("1 of 2 runs completed")
        process.send_signal(signal.SIGINT)
        told("report: ")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.communicate()
    text = page.read_text(encoding="utf-8")
    assert 'http-equiv="refresh"' not in text
    assert "killed" in text
    assert time.time() - page.stat().st_mtime < 60


def test_what_cannot_be_watched_is_refused(command: Command, tmp_path: Path) -> None:
    file = tmp_path / "file"
    file.touch()
    assert "is a file" in command.refused("watch", file)
    assert "cannot be watched: file name too long" in command.refused("watch", "x" * 300)
