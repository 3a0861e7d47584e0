"""Builds an environment from its lock: ``make env ENV=legacy``.

    python -m bench.run.environment_build NAME

Does nothing where it is built from the present lock and works; makes it anew where it is not, or is broken.
It counts as built only once everything is installed and its interpreter has said so, so that a build which
was interrupted is not taken for one.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
import venv
from collections.abc import Sequence
from pathlib import Path

from bench.ask.versions import STAMP
from bench.errors import UserError
from bench.load.registry import find_backends
from bench.record.writing import held
from bench.run.environments import BUILT, LOCK, Environment, find_environment
from bench.run.interpreters import ask


def build(environment: Environment) -> bool:
    """Make the environment unless it is there. Returns whether anything was done.

    Raises UserError where pip fails, where what was installed does not work, or where another command is
    building it.
    """
    if environment.description.interpreter is not None:
        raise UserError(
            f"environment '{environment.name}' has an interpreter of its own and is not built from a lock"
        )
    digest = environment.digest
    with held(environment.folder):
        packages = _packages_of(environment.name)
        if environment.problem(packages) is None:
            return False
        ask.cache_clear()
        target = environment.folder / BUILT
        print(f"environment {environment.name}: {environment.description.description}")
        print(f"building {target} from {environment.folder / LOCK} (minutes)", flush=True)
        shutil.rmtree(target, ignore_errors=True)
        try:
            venv.EnvBuilder(with_pip=True, symlinks=True).create(target)
            _install(environment)
            (target / STAMP).write_text(digest + "\n", encoding="utf-8")
        except (OSError, subprocess.CalledProcessError) as error:
            raise UserError(f"environment '{environment.name}' could not be built: {error}") from None
        if (problem := environment.problem(packages)) is not None:
            (target / STAMP).unlink()
            raise UserError(problem)
    return True


def _packages_of(name: str) -> tuple[str, ...]:
    """What the backends that ordinarily run in an environment need of it."""
    entries = (entry.backend for entry in find_backends().values() if name in entry.backend.environments)
    return tuple(sorted({package for backend in entries for package in backend.requires}))


def _install(environment: Environment) -> None:
    """The lock's packages with wheels first, then those that are built against them."""
    last = {_canonical(name) for name in environment.description.build.from_source}
    lines = (environment.folder / LOCK).read_text(encoding="utf-8").splitlines()
    locked = [line for line in lines if line.strip() and not line.lstrip().startswith("#")]
    absent = last - {_canonical(name_of(line)) for line in locked}
    if absent:
        raise UserError(f"environment '{environment.name}': {', '.join(sorted(absent))} is not in its {LOCK}")
    wheels = [line for line in locked if _canonical(name_of(line)) not in last]
    sources = [line for line in locked if _canonical(name_of(line)) in last]
    _pip(environment, wheels, ())
    if sources:
        _pip(environment, sources, ("--no-build-isolation",))


def name_of(line: str) -> str:
    """The distribution that a line of a lock is about: ``name==1.0`` or ``name @ address``."""
    return line.partition("@")[0].partition("=")[0].partition(";")[0].strip()


def _canonical(name: str) -> str:
    return name.lower().replace("_", "-").replace(".", "-")


def _pip(environment: Environment, lines: Sequence[str], flags: Sequence[str]) -> None:
    """Install exactly these lines: the lock is complete, so nothing is resolved."""
    if not lines:
        return
    with tempfile.TemporaryDirectory(prefix="qlora-bench-env-") as scratch:
        requirements = Path(scratch) / LOCK
        requirements.write_text("\n".join(lines) + "\n", encoding="utf-8")
        done = subprocess.run(
            [
                environment.interpreter.absolute(),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--disable-pip-version-check",
                "--no-deps",
                *flags,
                "-r",
                requirements,
            ],
            env={**os.environ, **environment.description.build.variables},
            check=False,
        )
    if done.returncode != 0:
        raise UserError(
            f"environment '{environment.name}' could not be built: pip ended with {done.returncode}",
            "what it said stands above",
        )


def main(arguments: Sequence[str]) -> int:
    """Build the named environment. Returns the exit code: 2 where it could not be built."""
    try:
        if len(arguments) != 1:
            raise UserError("which environment is to be built?", "make env ENV=legacy")
        environment = find_environment(arguments[0])
        done = build(environment)
    except UserError as error:
        print(f"qlora-bench: {error}", file=sys.stderr)
        return 2
    print(f"environment {environment.name}: {'built' if done else 'is built already'}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
