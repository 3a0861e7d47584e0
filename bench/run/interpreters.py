"""What another interpreter has: asked in a process of its own, once, and nothing of it imported here.

    answer = ask(interpreter, ("torch", "auto_gptq"), ("torch", "auto-gptq"))

Used by ``bench.run.environments``.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.errors import one_line

OLDEST_PYTHON = (3, 11)
WORKER_NEEDS = (
    "accelerate", "huggingface_hub", "numpy", "peft", "platformdirs", "psutil", "pydantic", "pynvml",
    "safetensors", "torch", "transformers",
)  # fmt: skip
"""What the worker's own code imports: an environment without one of these runs nothing of ours."""
PATIENCE_SECONDS = 120.0
"""For an interpreter to say what it has. It takes a tenth of a second from a warm disk."""
ASKING = """
import importlib.metadata, importlib.util, json, sys

def version(name):
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None

asked = json.loads(sys.argv[1])
print(json.dumps({
    "python": sys.version_info[:2],
    "versions": {name: version(name) for name in asked["distributions"]},
    "missing": [name for name in asked["packages"] if importlib.util.find_spec(name) is None],
}))
"""


@dataclass(frozen=True)
class Answer:
    """What an interpreter says of itself."""

    versions: Mapping[str, str | None]
    problem: str | None
    """Why a worker cannot run under it; None: it can."""


@functools.cache
def ask(interpreter: Path, packages: tuple[str, ...], distributions: tuple[str, ...]) -> Answer:
    """Ask an interpreter for its packages, once in this process. Nothing of them is imported."""
    asked = json.dumps({"packages": packages, "distributions": distributions})
    nothing = dict.fromkeys(distributions)
    try:
        done = subprocess.run(
            [interpreter, "-c", ASKING, asked],
            capture_output=True,
            text=True,
            errors="replace",
            timeout=PATIENCE_SECONDS,
            stdin=subprocess.DEVNULL,
            env=variables_of_worker(),
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return Answer(nothing, f"its interpreter does not start: {one_line(str(error))}")
    try:
        told: Any = json.loads(done.stdout.strip().splitlines()[-1])
        python, missing, versions = tuple(told["python"]), list(told["missing"]), dict(told["versions"])
    except (LookupError, TypeError, ValueError):
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        return Answer(nothing, f"its interpreter ended with {done.returncode} and said: {one_line(said)}")
    problem = None
    if python < OLDEST_PYTHON:
        problem = f"it has Python {'.'.join(map(str, python))}, and the worker needs 3.11 or later"
    elif missing:
        problem = f"it has no {', '.join(missing)}"
    return Answer(versions, problem)


def variables_of_worker() -> dict[str, str]:
    """The command's variables without those that lead another interpreter to the command's own packages."""
    return {name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "PYTHONHOME")}
