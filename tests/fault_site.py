"""Installs what breaks: third-party backends, and what Python runs before anything else.

    install_faults(site)        # a folder on PYTHONPATH
    spoil_library(folder, "hqq", "raise RuntimeError('...')", version="0.1")
"""

from __future__ import annotations

import shutil
from pathlib import Path

from tests.command import ROOT


def install_faults(site: Path) -> None:
    """Put the backends into ``site`` as pip would, and ``sitecustomize`` beside them."""
    shutil.copy(ROOT / "tests" / "planted_surroundings.py", site / "sitecustomize.py")
    shutil.copy(ROOT / "tests" / "breaking_backends.py", site)
    points = "[qlora_bench.backends]\nearly = breaking_backends:Early\nlate = breaking_backends:Late\n"
    install_distribution(site, "breaking-backends", "1.0", points)


def install_distribution(site: Path, name: str, version: str, entry_points: str = "") -> None:
    """The metadata of a distribution."""
    metadata = site / f"{name.replace('-', '_')}-{version}.dist-info"
    metadata.mkdir(parents=True)
    (metadata / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    (metadata / "entry_points.txt").write_text(entry_points)


def spoil_library(folder: Path, name: str, code: str, version: str = "0.1") -> None:
    """A library in ``folder`` that is found before the real one, and is ``code``."""
    package = folder / name
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code, encoding="utf-8")
    install_distribution(folder, name, version)
