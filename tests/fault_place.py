"""Where a scene of the fault matrix plays: a real command with backends that break, and what it came to.

A function under ``@scene(name)`` plants the fault of that name around the command of its `Place` and returns a
`Found`. What a scene alone can see (who ran, what is left in a folder) it asserts itself.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil

from bench.record.store import Store
from tests.command import Command

ODD_NAME = "çalışma ıİ für 日本"  # noqa: RUF001


@dataclass
class Found:
    """What a scene came to."""

    code: int
    errors: str
    """Standard error of the command."""
    records: Sequence[dict[str, Any]] = ()
    seconds: float = 0.0
    output: str = ""

    @property
    def main(self) -> dict[str, Any]:
        """The record that the fault's row is about: of the one that fails as planted, where there are others."""
        planted = [body for body in self.records if body["message"] == "planted"]
        return (planted or list(self.records))[0]

    def of(self, backend: str) -> dict[str, Any]:
        return next(body for body in self.records if body["request"]["backend"] == backend)


@dataclass
class Place:
    """Where a scene plays: a command with backends that break, a folder, and how long it may take."""

    command: Command
    folder: Path
    moments: int = 10
    """Of the scene that kills at random."""
    environment: dict[str, str] = field(default_factory=dict)

    @property
    def out(self) -> Path:
        return self.folder / "records"

    @property
    def log(self) -> Path:
        """A line for each worker that breaks early."""
        return self.folder / "workers.log"

    def workers(self) -> list[int]:
        return [int(line) for line in self.log.read_text().split()] if self.log.exists() else []

    def variables(self, more: Mapping[str, str] = {}) -> dict[str, str]:
        own = {"QLORA_PLANT_FOLDER": str(self.out), "QLORA_PLANT_LOG": str(self.log)}
        return {**self.command.environment, **own, **self.environment, **more}

    def arguments(self, *backends: str, out: str | Path | None = None, flags: Sequence[str] = ()) -> list[str]:
        named = [part for name in backends for part in ("--backend", name)]
        where = ["--out", str(self.out if out is None else out)]
        return self.command.arguments("run", "--preset", "tiny", *named, *where, *flags)

    def run(
        self,
        arguments: Sequence[str],
        *,
        more: Mapping[str, str] = {},
        before: Callable[[], None] | None = None,
        out: Path | None = None,
        timeout: float = 300,
    ) -> Found:
        """The command to its end, and the records that are in the folder then."""
        began = time.monotonic()
        done = subprocess.run(arguments, env=self.variables(more), capture_output=True, timeout=timeout,
                              preexec_fn=before, check=False)  # fmt: skip
        seconds = time.monotonic() - began
        output, errors = (stream.decode(errors="replace") for stream in (done.stdout, done.stderr))
        return Found(done.returncode, errors, self.records(out or self.out), seconds, output)

    def records(self, out: Path | None = None) -> list[dict[str, Any]]:
        found = Store(out or self.out).records() if (out or self.out).is_dir() else ()
        return [json.loads(record.model_dump_json()) for record in found]

    def simple(self, *backends: str, flags: Sequence[str] = ("--quiet",), **options: Any) -> Found:
        return self.run(self.arguments(*backends, flags=flags), **options)

    def start(
        self,
        *backends: str,
        flags: Sequence[str] = (),
        more: Mapping[str, str] = {},
        before: Callable[[], None] | None = None,
    ) -> subprocess.Popen[bytes]:
        """The command, until its first worker is there."""
        self.log.unlink(missing_ok=True)
        process = subprocess.Popen(self.arguments(*backends, flags=flags), env=self.variables(more),
                                   preexec_fn=before,  # noqa: PLW1509
                                   stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)  # fmt: skip
        deadline = time.monotonic() + 60
        while not self.workers():
            assert time.monotonic() < deadline and process.poll() is None, "no worker was started"
            time.sleep(0.02)
        return process


Scene = Callable[[Place], Found]
SCENES: dict[str, Scene] = {}


def scene(name: str) -> Callable[[Scene], Scene]:
    """Enter a function under the name of its fault."""

    def enter(function: Scene) -> Scene:
        SCENES[name] = function
        return function

    return enter


def worker_is_gone(pid: int, seconds: float = 15) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if not psutil.pid_exists(pid) or psutil.Process(pid).status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False
