"""Which backends exist: the files of ``backends/``, and the entry points of other distributions.

Finding and listing import the adapters' modules, which never import a quantization library or torch at
the top; the library is imported when a layer is built, in the worker.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import pkgutil
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from bench.ask.experiment import Dtype, describe
from bench.errors import BadValue, MissingLibrary, UserError, unknown
from bench.load.contract import Backend, Options

ENTRY_POINT_GROUP = "qlora_bench.backends"

PROBED_BY_PEFT = (
    "bitsandbytes",
    "hqq",
    "gptqmodel",
    "eetq",
    "aqlm",
    "torchao",
    "awq",
    "auto_gptq",
    "neural_compressor",
    "transformer_engine",
    "kernels",
    "optimum",
    "quanto",
)
"""Packages that peft and transformers import on their own when they are installed. A worker hides those
its backend does not require, so that what is measured is what a user of that backend alone has."""


@dataclass(frozen=True)
class Entry:
    """A backend id and what stands behind it."""

    id: str
    backend: type[Backend]
    defaults: Options
    origin: str

    @property
    def description(self) -> str:
        """First line of the adapter's docstring."""
        return (self.backend.__doc__ or "").strip().splitlines()[0]

    @property
    def missing(self) -> tuple[str, ...]:
        """Required packages that are not importable here. Nothing is imported to find out."""
        return tuple(name for name in self.backend.requires if not _importable(name))

    @property
    def distributions(self) -> tuple[str, ...]:
        """The distributions of what it requires."""
        return tuple(self.backend.distributions.get(name, name) for name in self.backend.requires)

    @property
    def install_line(self) -> str:
        """The command that brings what is missing."""
        wanted = f"'qlora-bench[{self.backend.extra}]'" if self.backend.extra else " ".join(self.missing)
        return f"pip install {wanted}"

    def options(self, changes: Mapping[str, Any]) -> Options:
        """The complete options after ``changes``. Raises BadValue naming the nearest valid option."""
        try:
            return type(self.defaults).model_validate({**self.defaults.model_dump(), **changes})
        except ValidationError as error:
            problems = describe(error, type(self.defaults))
            raise BadValue("; ".join(f"{self.id}: {problem}" for problem in problems)) from None

    def create(self, options: Mapping[str, Any], device: str, dtype: Dtype) -> Backend:
        """The backend, ready to build layers. Raises MissingLibrary with the install line."""
        if self.missing:
            raise MissingLibrary(
                f"backend '{self.id}' needs {', '.join(self.missing)}", f"install with: {self.install_line}"
            )
        return self.backend(self.options(options), device, dtype)


def find_backends() -> dict[str, Entry]:
    """Every backend id, ours first. Raises UserError where two adapters claim one id."""
    entries: dict[str, Entry] = {}
    for origin, backend in [*_own(), *_foreign()]:
        for identifier, defaults in backend.variants.items():
            if identifier in entries:
                raise UserError(
                    f"backend '{identifier}' is claimed by {entries[identifier].origin} and by {origin}",
                    "uninstall one of them",
                )
            entries[identifier] = Entry(identifier, backend, defaults, origin)
    return entries


def get_backend(identifier: str) -> Entry:
    """One backend by id. Raises BadValue with the nearest valid id."""
    entries = find_backends()
    if identifier not in entries:
        raise unknown("backend", identifier, [*entries, "all"])
    return entries[identifier]


def foreign_libraries(backend: type[Backend]) -> frozenset[str]:
    """Quantization libraries that a run of ``backend`` has no business importing."""
    ours = {name for entry in find_backends().values() for name in entry.backend.requires}
    return frozenset({*ours, *PROBED_BY_PEFT} - set(backend.requires))


def _own() -> list[tuple[str, type[Backend]]]:
    package = importlib.import_module("backends")
    # The reference first: tables read best when what everything is compared with leads.
    names = sorted(
        (module.name for module in pkgutil.iter_modules(package.__path__) if not module.name.startswith("_")),
        key=lambda name: (name != "reference", name),
    )
    return [
        (f"backends/{name}.py", backend)
        for name in names
        for backend in _backends_in(importlib.import_module(f"backends.{name}"))
    ]


def _backends_in(module: Any) -> list[type[Backend]]:
    return [
        value
        for value in vars(module).values()
        if isinstance(value, type)
        and issubclass(value, Backend)
        and value.__module__ == module.__name__
        and "variants" in vars(value)
    ]


def _foreign() -> list[tuple[str, type[Backend]]]:
    found = []
    for point in importlib.metadata.entry_points(group=ENTRY_POINT_GROUP):
        try:
            backend = point.load()
        except (Exception, SystemExit) as error:
            raise UserError(
                f"backend entry point '{point.name}' ({point.value}) does not import: {error}",
                "fix or uninstall its distribution",
            ) from error
        if not (isinstance(backend, type) and issubclass(backend, Backend)):
            raise UserError(f"backend entry point '{point.name}' ({point.value}) is no Backend")
        found.append((point.value, backend))
    return found


def _importable(name: str) -> bool:
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False
