"""Which libraries every run has in play, where they are installed, and of which version each is here.

Nothing is imported to find out.
"""

from __future__ import annotations

import importlib.metadata
from collections.abc import Sequence

CURRENT = "current"
"""The environment of the interpreter that runs the command."""
STAMP = ".ready"
"""File in the folder of an environment that was built from a lock: the lock's digest."""
HARNESS_LIBRARIES = ("qlora-bench", "torch", "transformers", "peft", "accelerate")


def installed_versions(distributions: Sequence[str]) -> dict[str, str | None]:
    """Version of each distribution, None where it is not installed. Nothing is imported."""
    return {name: _version(name) for name in distributions}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None
