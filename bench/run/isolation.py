"""What a worker does before anything else: an environment that is the same for every backend.

Imported first in the worker, before torch. Libraries that a backend does not need are hidden, because
PEFT and transformers import whatever they find: with gptqmodel installed, for instance, every run would
import it, and it rewrites the CUDA allocator's settings and patches transformers.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Collection, Mapping, Sequence
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType

ALLOCATOR_VARIABLE = "PYTORCH_ALLOC_CONF"
OLDER_ALLOCATOR_VARIABLE = "PYTORCH_CUDA_ALLOC_CONF"
SETTINGS: Mapping[str, str] = {
    ALLOCATOR_VARIABLE: "backend:native",  # torch's own default, spelt out
    "CUDA_DEVICE_ORDER": "PCI_BUS_ID",  # the order NVML and nvidia-smi use
    "HF_HUB_OFFLINE": "1",  # weights were found by the parent; a worker never fetches
    "HF_HUB_DISABLE_PROGRESS_BARS": "1",
    "TOKENIZERS_PARALLELISM": "false",  # its thread pool would share the cores with the training
    "TRANSFORMERS_VERBOSITY": "error",
    "BITSANDBYTES_NOWELCOME": "1",
}


WATCHED_PREFIXES = ("PYTORCH_", "CUDA_", "NCCL_", "OMP_", "MKL_")
"""Variables on which speed, memory or numerics of a run can depend."""


class _Hiding(PathFinder):
    """The ordinary path finder, blind to some packages."""

    hidden: Collection[str] = frozenset()

    @classmethod
    def find_spec(
        cls, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """As PathFinder, but a hidden package does not exist."""
        if fullname.partition(".")[0] in cls.hidden:
            return None
        return super().find_spec(fullname, path, target)


def hide_packages(names: Collection[str]) -> None:
    """Make packages unfindable in this process: to ``find_spec`` and ``import`` they are not installed."""
    _Hiding.hidden = frozenset(names)
    if PathFinder in sys.meta_path:
        sys.meta_path[sys.meta_path.index(PathFinder)] = _Hiding


def apply_settings() -> None:
    """Set the environment variables that every worker runs with."""
    os.environ.update(SETTINGS)
    # The allocator's older name, which older torch reads and newer does not: a shell that sets it would rule
    # the runs of one environment and not those of another.
    os.environ.pop(OLDER_ALLOCATOR_VARIABLE, None)


class WatchedVariables:
    """Environment variables that a library changes behind our back, while its code runs.

    Used as a context manager; afterwards the harness's own settings stand again, and ``changed`` says
    what was wanted.
    """

    def __init__(self) -> None:
        self.changed: dict[str, str | None] = {}

    def __enter__(self) -> WatchedVariables:
        self._before = dict(os.environ)
        return self

    def __exit__(self, *exception: object) -> None:
        for name in {*self._before, *os.environ}:
            if name.startswith(WATCHED_PREFIXES) and self._before.get(name) != os.environ.get(name):
                self.changed[name] = os.environ.get(name)
        apply_settings()
