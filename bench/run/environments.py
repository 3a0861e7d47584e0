"""Environments: named, locked sets of packages, each with an interpreter of its own.

``current`` is the interpreter that runs the command. Every other one is a folder::

    environments/legacy/environment.toml     what it is for, and how it is built
    environments/legacy/requirements.lock    every package with its version
    environments/legacy/.venv/               built by `make env ENV=legacy` (``bench.run.environment_build``)

Folders of environments are the checkout's ``environments`` and those that the variable
QLORA_BENCH_ENVIRONMENTS names, as PATH names folders of programs. They are files and no entry points: nothing
of an environment is imported to find it, and the one that makes it need not have anything else installed.

Nothing of an environment is ever imported on this side. Its interpreter is asked, in a process of its own,
what it has; what is wrong with it is a reason why a run is unavailable, and no more than that.
"""

from __future__ import annotations

import hashlib
import os
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pydantic import Field, ValidationError

from bench.ask.experiment import Frozen, describe
from bench.ask.versions import CURRENT, HARNESS_LIBRARIES, STAMP, installed_versions
from bench.errors import BadValue, BrokenFile, UserError, unknown
from bench.load.registry import Entry
from bench.probe.machine import REPOSITORY
from bench.run.interpreters import WORKER_NEEDS, ask, variables_of_worker

VARIABLE = "QLORA_BENCH_ENVIRONMENTS"
DESCRIPTION, LOCK, BUILT = "environment.toml", "requirements.lock", ".venv"


class Build(Frozen):
    """How the packages of the lock are installed."""

    from_source: tuple[str, ...] = ()
    """Those that have no wheel and whose setup looks at what is installed: built last, without isolation."""
    variables: Mapping[str, str] = Field(default_factory=dict)
    """Of the environment in which that happens."""


class Description(Frozen):
    """What stands in ``environment.toml``."""

    description: str
    """One line."""
    backends: tuple[str, ...] = ()
    """Ids that may run in it with ``--environment``, besides those whose adapters name it."""
    interpreter: str | None = None
    """A Python that somebody has built already, instead of a lock; a relative path begins at the folder."""
    build: Build = Build()


@dataclass(frozen=True)
class Environment:
    """One that is described."""

    name: str
    folder: Path
    description: Description

    @property
    def interpreter(self) -> Path:
        """Its Python, built or not."""
        given = self.description.interpreter
        return self.folder / (f"{BUILT}/bin/python" if given is None else given)

    @property
    def digest(self) -> str:
        """SHA-256 over the lock and how it is installed. Raises BrokenFile where there is no lock."""
        try:
            lock = (self.folder / LOCK).read_bytes()
        except OSError as error:
            raise BrokenFile(f"environment '{self.name}' has no lock: {error}") from None
        return hashlib.sha256(lock + self.description.build.model_dump_json().encode()).hexdigest()

    @property
    def build_line(self) -> str:
        """The command that builds it."""
        return f"make env ENV={self.name}"

    def problem(self, packages: tuple[str, ...] = ()) -> str | None:
        """Why nothing that needs ``packages`` can be run in it now; None: nothing speaks against it."""
        if self.description.interpreter is not None:
            if not self.interpreter.exists():
                return f"environment '{self.name}': its interpreter '{self.interpreter}' is not there"
        elif reason := self._not_built():
            return reason
        answer = ask(self.interpreter, (*WORKER_NEEDS, *packages), ())
        again = "" if self.description.interpreter else f"; build it again with: {self.build_line}"
        return answer.problem and f"environment '{self.name}' is broken: {answer.problem}{again}"

    def _not_built(self) -> str | None:
        stamp = self.folder / BUILT / STAMP
        if not stamp.exists():
            return f"environment '{self.name}' is not built here; build it with: {self.build_line}"
        try:
            if stamp.read_text(encoding="utf-8").strip() == self.digest:
                return None
        except (BrokenFile, OSError, UnicodeDecodeError) as error:
            return f"environment '{self.name}' is broken: {error}"
        return (
            f"environment '{self.name}' was built from another lock than is there now; "
            f"build it again with: {self.build_line}"
        )


def environment_names() -> list[str]:
    """Every environment that there is, ``current`` first."""
    described = (path for folder in _folders() for path in sorted(folder.glob(f"*/{DESCRIPTION}")))
    return list(dict.fromkeys([CURRENT, *(path.parent.name for path in described)]))


def find_environment(name: str) -> Environment:
    """A described environment by name, the checkout's own first. Raises BadValue for one that is described
    nowhere and BrokenFile for a description that cannot be read."""
    known = environment_names()[1:]
    if name not in known:
        raise unknown("environment", name, [CURRENT, *known])
    path = next(path for folder in _folders() if (path := folder / name / DESCRIPTION).is_file())
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
        return Environment(name, path.parent, Description.model_validate(values))
    except ValidationError as error:
        raise BrokenFile(f"'{path}': {'; '.join(describe(error, Description))}") from None
    except (OSError, ValueError) as error:
        raise BrokenFile(f"'{path}' is not readable TOML: {error}") from None


def _folders() -> list[Path]:
    named = os.environ.get(VARIABLE, "").split(os.pathsep)
    return [REPOSITORY / "environments", *(Path(one) for one in named if one)]


def runs_in(entry: Entry, name: str) -> bool:
    """Whether a backend may run in an environment: its adapter says so, or the environment does. Raises what
    `find_environment` raises."""
    if name in entry.backend.environments:
        return True
    return name != CURRENT and entry.id in find_environment(name).description.backends


def environment_of(entry: Entry, asked: str | None) -> str:
    """Where a backend runs: as asked, or where it ordinarily does. Raises BadValue where it does not run in
    what was asked for."""
    if asked is None:
        return entry.backend.environments[0]
    if not runs_in(entry, asked):
        ways = ", ".join(entry.backend.environments)
        raise BadValue(f"backend '{entry.id}' does not run in environment '{asked}'", f"it runs in: {ways}")
    return asked


def obstacle(name: str, entry: Entry) -> str | None:
    """Why a backend cannot be run in an environment now, with the line that mends it; None: it can."""
    if name == CURRENT:
        if not entry.missing:
            return None
        return f"backend '{entry.id}' needs {', '.join(entry.missing)}; install with: {entry.install_line}"
    try:
        problem = find_environment(name).problem(entry.backend.requires)
    except UserError as error:
        problem = str(error)
    return problem and f"backend '{entry.id}': {problem}"


def versions_in(name: str, distributions: tuple[str, ...]) -> dict[str, str | None]:
    """Version of each distribution in an environment, None where it is not installed, or the environment not
    built. This harness is the same everywhere."""
    ours = installed_versions(["qlora-bench"])
    if name == CURRENT:
        return installed_versions(distributions)
    try:
        found = find_environment(name)
    except UserError:
        return {**dict.fromkeys(distributions), **ours}
    if found.problem() is not None:
        return {**dict.fromkeys(distributions), **ours}
    return {**ask(found.interpreter, (), distributions).versions, **ours}


def versions_of(
    entries: Mapping[str, Entry], environments: Mapping[str, str]
) -> dict[str, dict[str, str | None]]:
    """Of each backend, the versions of every library in play where it runs. ``environments``: id -> where."""
    return {
        name: versions_in(where, (*HARNESS_LIBRARIES, *entries[name].distributions))
        for name, where in environments.items()
    }


def python_path() -> str:
    """A worker of the current environment finds the same harness as its parent, installed or not."""
    present = os.environ.get("PYTHONPATH")
    return f"{REPOSITORY}{os.pathsep}{present}" if present else str(REPOSITORY)


def command_in(name: str, scratch: Path) -> tuple[str, dict[str, str]]:
    """The interpreter that a worker is started with, and its variables, so that it finds the same harness as
    this process and nothing else of it. ``scratch``: a folder that lives as long as the worker.

    Raises OSError where the environment is no longer described.
    """
    if name == CURRENT:
        return sys.executable, {**os.environ, "PYTHONPATH": python_path()}
    try:
        interpreter = find_environment(name).interpreter
    except UserError as error:
        raise OSError(str(error)) from None
    # The two packages alone: where the harness is installed, they lie among the packages of this interpreter.
    code = scratch / "code"
    code.mkdir()
    for package in ("bench", "backends"):
        (code / package).symlink_to(REPOSITORY / package, target_is_directory=True)
    return str(interpreter.absolute()), {**variables_of_worker(), "PYTHONPATH": str(code)}
