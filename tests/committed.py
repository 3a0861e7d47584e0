"""The records that are kept in the repository, whatever else was run in this checkout."""

from __future__ import annotations

from pathlib import Path

from tests.command import ROOT

RESULTS = ROOT / "results"
LOCAL = "local"
"""Where ``make bench`` writes: ignored by git, and no part of the tests."""


def committed(pattern: str = "**/*.record.json") -> list[Path]:
    """Files below ``results/`` by a glob, in order."""
    return sorted(path for path in RESULTS.glob(pattern) if path.relative_to(RESULTS).parts[0] != LOCAL)
