"""Failure is data: each kind of failing worker becomes a record, and the other runs go on."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.command import Command

FAILURES = {
    "bad-killed": ("crashed", "load", "SIGKILL"),
    "bad-aborts": ("crashed", "load", "SIGABRT"),
    "bad-exits": ("crashed", "load", "told no outcome"),
    "bad-raises": ("error", "load", "RuntimeError: planted failure in two lines"),
    "bad-out-of-memory": ("out_of_memory", "load", "20.00 GiB"),
    "bad-shouts": ("error", "load", "after three megabytes"),
    "bad-secretly-dense": ("error", "load", "holds 16.000 bits per weight, the arithmetic says 4.500"),
    "bad-cuts-the-graph": ("error", "train", ""),
    "bad-library": ("unavailable", "launch", "surely_not_installed"),
}


@pytest.fixture(scope="module")
def sweep(command_with_strangers: Command, tmp_path_factory: pytest.TempPathFactory
          ) -> tuple[int, dict[str, Any], Path]:  # fmt: skip
    """One sweep over every failing backend, with a healthy one at the end."""
    folder = tmp_path_factory.mktemp("failures") / "records"
    flags = [flag for name in (*FAILURES, "eetq") for flag in ("--backend", name)]
    done = command_with_strangers.run(
        "run", "--preset", "tiny", *flags, "--out", folder, "--json", timeout=580
    )
    return done.returncode, {body["request"]["backend"]: body for body in json.loads(done.stdout)}, folder


@pytest.mark.parametrize("backend", FAILURES)
def test_failure_becomes_a_record(sweep: tuple[int, dict[str, Any], Path], backend: str) -> None:
    status, stage, message = FAILURES[backend]
    body = sweep[1][backend]
    assert (body["status"], body["stage"]) == (status, stage), body["message"]
    assert message in body["message"]
    assert "\n" not in body["message"]


def test_the_other_runs_go_on(sweep: tuple[int, dict[str, Any], Path]) -> None:
    assert sweep[1]["eetq"]["status"] == "completed"


def test_the_exit_code_says_that_a_run_failed(sweep: tuple[int, dict[str, Any], Path]) -> None:
    assert sweep[0] == 1


def test_the_end_of_stderr_is_kept_and_bounded(sweep: tuple[int, dict[str, Any], Path]) -> None:
    tail = sweep[1]["bad-shouts"]["stderr_tail"]
    assert "after three megabytes of output" in tail
    assert len(tail) <= 4000
    assert "planted failure" in sweep[1]["bad-raises"]["stderr_tail"]


def test_signals_are_recorded_as_negative_exit_codes(sweep: tuple[int, dict[str, Any], Path]) -> None:
    assert sweep[1]["bad-killed"]["exit_code"] == -signal.SIGKILL


def test_a_breach_keeps_what_was_measured_before_it(sweep: tuple[int, dict[str, Any], Path]) -> None:
    body = sweep[1]["bad-secretly-dense"]
    assert body["proof"]["quantized"] is False
    assert body["quantization"]["storage_bits_per_weight"] == 16
    assert body["memory"]["readings"][0]["phase"] == "loaded"


def test_failed_runs_are_rows_of_the_report(
    command: Command, sweep: tuple[int, dict[str, Any], Path]
) -> None:
    folder = sweep[2]
    page = (folder / "report.html").read_text(encoding="utf-8")
    for backend in FAILURES:
        assert backend in page


@pytest.mark.soak  # waits 15 s, so that a slow start is no hang; test_faults plants hangs in other places
def test_a_hanging_run_times_out(command_with_strangers: Command, out: Path) -> None:
    began = time.monotonic()
    (body,) = command_with_strangers.json(
        "run", "--preset", "tiny", "--backend", "bad-hangs", "--timeout-seconds", "15", "--out", out)  # fmt: skip
    assert (body["status"], body["stage"]) == ("timeout", "load")
    assert "15 s" in body["message"]
    assert time.monotonic() - began < 60


def test_noise_and_lies_on_the_pipe_do_not_stop_a_run(command_with_strangers: Command, out: Path) -> None:
    """A library that finds the pipe and writes to it: what is no event is ignored, and the worker's own
    section replaces a false one."""
    (body,) = command_with_strangers.json(
        "run", "--preset", "tiny", "--backend", "bad-lies-on-the-pipe", "--out", out
    )
    assert body["status"] == "completed", body["message"]
    assert body["load"]["load_seconds"] > 0


def test_ctrl_c_leaves_finished_records_and_an_interrupted_one(
    command_with_strangers: Command, out: Path
) -> None:
    arguments = command_with_strangers.arguments(
        "run", "--preset", "tiny", "--backend", "eetq", "--backend", "bad-hangs", "--backend", "bf16",
        "--out", out)  # fmt: skip
    # A shell that started the tests in the background had them ignore SIGINT, and children inherit that.
    process = subprocess.Popen(arguments, env=command_with_strangers.environment, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # noqa: PLW1509 # fmt: skip
    try:
        worker = _wait_for_second_worker(process, out)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
        process.communicate()
    assert process.returncode == 130
    assert "interrupted" in errors
    assert "Traceback" not in errors
    assert not psutil.pid_exists(worker) or psutil.Process(worker).status() == psutil.STATUS_ZOMBIE
    bodies = {body["request"]["backend"]: body for body in command_with_strangers.json("runs", out)}
    assert {name: body["status"] for name, body in bodies.items()} == {
        "eetq": "completed", "bad-hangs": "interrupted"}  # fmt: skip


def test_no_worker_outlives_a_killed_command(command_with_strangers: Command, out: Path) -> None:
    arguments = command_with_strangers.arguments(
        "run", "--preset", "tiny", "--backend", "bad-hangs", "--out", out
    )
    process = subprocess.Popen(arguments, env=command_with_strangers.environment, stdout=subprocess.DEVNULL,
                               stderr=subprocess.DEVNULL)  # fmt: skip
    try:
        worker = _worker_of(process)
    finally:
        process.kill()
        process.wait()
    deadline = time.monotonic() + 30
    while psutil.pid_exists(worker) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not psutil.pid_exists(worker)


def test_a_missing_library_says_how_to_install_it(command_with_strangers: Command) -> None:
    done = command_with_strangers.run("backends")
    assert "needs surely_not_installed: pip install surely_not_installed" in done.stdout


def _worker_of(process: subprocess.Popen[Any], other_than: int | None = None, seconds: float = 60) -> int:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        for child in psutil.Process(process.pid).children():
            if child.pid != other_than and "bench.run.worker" in " ".join(child.cmdline()):
                return child.pid
        time.sleep(0.05)
    raise AssertionError("no worker was started")


def _wait_for_second_worker(process: subprocess.Popen[Any], out: Path) -> int:
    first = _worker_of(process)
    deadline = time.monotonic() + 120
    while not list(out.glob("eetq-*.record.json")) and time.monotonic() < deadline:
        time.sleep(0.1)
    worker = _worker_of(process, other_than=first)
    time.sleep(3)
    return worker


@pytest.mark.soak
def test_what_ends_after_the_last_step_costs_a_run_nothing_but_itself(
    command_with_strangers: Command, out: Path
) -> None:
    (body,) = command_with_strangers.json("run", "--preset", "tiny", "--backend", "bad-dies-afterwards",
                                          "--set", "fidelity=on", "--out", out)  # fmt: skip
    assert (body["status"], body["stage"], body["exit_code"]) == ("completed", None, -signal.SIGKILL)
    assert len(body["steps"]) == 4
    assert body["trainable_weights_finite"] is True
    assert "SIGKILL" in body["fidelity"]["note"]
