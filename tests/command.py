"""Runs the real command in a process of its own, with a cache of the test's own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]


@dataclass(frozen=True)
class Command:
    """``qlora-bench`` as a person runs it."""

    cache: Path
    extra_path: Path | None = None
    """A folder of third-party distributions."""

    @property
    def environment(self) -> dict[str, str]:
        paths = [str(path) for path in (self.extra_path, ROOT) if path]
        return {**os.environ, "QLORA_BENCH_CACHE": str(self.cache), "PYTHONPATH": os.pathsep.join(paths),
                "COLUMNS": "160", "NO_COLOR": "1", "HF_HOME": str(self.cache / "hub")}  # fmt: skip

    def arguments(self, *arguments: str | Path) -> list[str]:
        return [sys.executable, "-m", "bench", *map(str, arguments)]

    def run(self, *arguments: str | Path, cwd: Path | None = None, timeout: float = 300
            ) -> subprocess.CompletedProcess[str]:  # fmt: skip
        return subprocess.run(self.arguments(*arguments), capture_output=True, text=True, timeout=timeout,
                              env=self.environment, cwd=cwd, check=False)  # fmt: skip

    def json(self, *arguments: str | Path) -> Any:
        done = self.run(*arguments, "--json")
        assert done.returncode in (0, 1), done.stderr
        return json.loads(done.stdout)

    def refused(self, *arguments: str | Path) -> str:
        """The one line of a refusal: exit code 2, no traceback, nothing on stdout."""
        done = self.run(*arguments, timeout=60)
        assert done.returncode == 2, (done.returncode, done.stdout, done.stderr)
        assert "Traceback" not in done.stderr
        assert done.stdout == ""
        lines = done.stderr.strip().splitlines()
        assert len(lines) == 1, lines
        return lines[0]
