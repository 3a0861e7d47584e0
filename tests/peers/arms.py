"""How one run of an arm is done, and what is left of it: a process for a peer, the front door's sweep for us."""

from __future__ import annotations

import json
import os
import re
import subprocess
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.ask.plan import RunRequest
from bench.judge.rows import make_rows
from bench.record.preflight import Preflight
from bench.record.schema import Record
from bench.run.arrange import arrange
from bench.run.asked import Asked
from bench.run.launch import Listener, end
from bench.run.sweep import run_sweep
from bench.run.told import ended_in_words
from tests.command import ROOT
from tests.peers.cases import OURS, Arm, Environment
from tests.peers.outcome import Outcome, StepSeen
from tests.peers.work import OBSERVED_FILE, OWN_FILE, STAGE_FILE

LAST_LINES = 200
PATH_TO_PACKAGES = re.compile(r"/\S*site-packages/")
"""Of this machine, and nobody else's concern."""
ERROR_LINE = re.compile(r"^[A-Za-z_][\w.]*(?:Error|Exception|Interrupt|Exit)\b.*")


@dataclass(frozen=True)
class Place:
    """Which run of a session this is."""

    case: str
    round: int


# ---- a peer --------------------------------------------------------------------------------------


def run_peer(
    arm: Arm,
    place: Place,
    work_file: Path,
    folder: Path,
    pythons: Mapping[Environment, Path],
    timeout_seconds: float,
) -> Outcome:
    """One run in a fresh process, whose files are left in ``folder``."""
    assert arm.module is not None
    folder.mkdir(parents=True)
    python = pythons[arm.environment]
    if not python.exists():
        why = f"there is no environment at '{python}'; make one with: make peers"
        return _outcome(arm, place, folder, "unavailable", why, 0.0)
    scratch = folder / "tmp"  # optimum-benchmark leaves a pickle there after each run
    scratch.mkdir()
    command = [str(python), "-m", arm.module, str(work_file), str(folder), *arm.flags]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "TMPDIR": str(scratch)}
    log = folder / "output.log"
    began = time.monotonic()
    with log.open("wb") as output:
        process = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=output,
            stderr=output,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        timed_out = False
        try:
            process.wait(timeout_seconds)
        except subprocess.TimeoutExpired:
            timed_out = True
        finally:
            end(process)
    wall = time.monotonic() - began
    if timed_out:
        return _outcome(arm, place, folder, "timeout", f"no result within {timeout_seconds:g} s", wall)
    if process.returncode == 0 and not _missing(folder):
        return _outcome(arm, place, folder, "completed", None, wall)
    status, message = _failure(log, process.returncode, _missing(folder))
    return _outcome(arm, place, folder, status, message, wall)


def _missing(folder: Path) -> list[str]:
    return [name for name in (OBSERVED_FILE, OWN_FILE) if not (folder / name).is_file()]


def _failure(log: Path, code: int, missing: list[str]) -> tuple[str, str]:
    """Status and message of a process that did not complete: its last error line, else how it ended."""
    if code == 0:
        return "error", f"it ended well and left no {' and no '.join(missing)}"
    if code < 0:
        return "crashed", f"the process {ended_in_words(code)}"
    lines = log.read_text(encoding="utf-8", errors="replace").splitlines()[-LAST_LINES:]
    lines = [line.strip() for line in lines if line.strip()]
    errors = [line for line in lines if ERROR_LINE.match(line)] or lines
    message = errors[-1] if errors else f"the process {ended_in_words(code)}"
    return "error", PATH_TO_PACKAGES.sub("", message)[:1000]


def _outcome(
    arm: Arm, place: Place, folder: Path, status: Any, message: str | None, wall_seconds: float
) -> Outcome:
    observed = _read(folder / OBSERVED_FILE)
    stage = folder / STAGE_FILE
    reached = stage.read_text(encoding="utf-8") if stage.is_file() else "launch"
    return Outcome(
        case=place.case,
        arm=arm.name,
        round=place.round,
        status=status,
        stage=None if status == "completed" else reached,
        message=message,
        wall_seconds=wall_seconds,
        own=_read(folder / OWN_FILE),
        **observed,
    )


def _read(path: Path) -> dict[str, Any]:
    """A file that a peer's process left, empty where there is none. They are written whole or not at all."""
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}


# ---- ourselves -----------------------------------------------------------------------------------


class Clock:
    """Watches a sweep of one run, and notes when the end of each step is heard of."""

    def __init__(self) -> None:
        self.ended_at: dict[int, float] = {}

    def examining(self, cards: int) -> None:
        """Nothing: there are no cards."""

    def examined(self, preflight: Preflight) -> None:
        """Nothing."""

    def skipped(self, request: RunRequest) -> None:
        """Nothing: every run has a folder of its own."""

    def listener(self, place: int, total: int, request: RunRequest) -> Listener:
        """Note the steps."""

        def hear(event: Mapping[str, Any]) -> None:
            if event["event"] == "step":
                self.ended_at[int(event["step"]["index"])] = time.perf_counter()

        return hear

    def ended(self, record: Record) -> None:
        """Nothing: the sweep yields it."""


def run_ours(asked: Asked, place: Place, folder: Path) -> Outcome:
    """One run by the front door's own code, in the worker that ``qlora-bench run`` starts."""
    clock = Clock()
    sweep = replace(arrange(replace(asked, out=folder)).sweep, replay=False)
    sweep.store.open_for_writing()
    (record,) = run_sweep(sweep, clock)
    return outcome_of(record, place, clock.ended_at)


def outcome_of(record: Record, place: Place, ended_at: Mapping[int, float]) -> Outcome:
    """A record in the terms that all arms share. ``ended_at``: step -> when its end was heard of."""
    (row,) = make_rows((record,))
    quantized = record.quantization.layers if record.quantization else None
    return Outcome(
        case=place.case,
        arm=OURS,
        round=place.round,
        status=record.status,
        stage=record.stage,
        message=record.message,
        wall_seconds=record.wall_seconds,
        steps=tuple(
            StepSeen(
                tokens=step.tokens,
                loss_tokens=step.loss_tokens,
                loss=sum(step.losses) / len(step.losses),
                gradient_norm=step.gradient_norm,
                seconds=step.seconds,
                ended=ended_at.get(step.index),
            )
            for step in record.steps
        ),
        data_digest=record.workload.digest if record.workload else None,
        adapters_digest=record.lora.initial_digest if record.lora else None,
        quantized_layers=0 if record.request.backend == "bf16" else quantized,
        step_peak_bytes=row.peak_memory_bytes,
        process_peak_bytes=record.memory.process_peak_resident_bytes,
        own={"tokens_per_second": row.tokens_per_second},
        versions=record.environment.versions if record.environment else {},
    )
