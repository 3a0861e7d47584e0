"""Runs of the planted adapters, through the real command and worker, each in a folder of its own."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from bench.record.schema import Record
from bench.record.store import Store
from tests import misbehaving
from tests.command import Command

PRESET = str(Path(__file__).with_name("truth.toml"))
ENTRY_POINT = "[qlora_bench.backends]\nplanted = tests.truth.adapters:Planted\n"
SECONDS_PER_RUN = 120
"""After which a session is given up; a run takes about seven."""


def install(site: Path) -> None:
    """Announce the planted adapters in ``site`` as a distribution would, and those of `misbehaving` too."""
    misbehaving.install(site)
    metadata = site / "planted_adapters-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: planted-adapters\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINT)


class Session:
    """The command of a person who has the planted adapters installed."""

    def __init__(self, folder: Path, preset: str = PRESET) -> None:
        site = folder / "site"
        site.mkdir(parents=True)
        install(site)
        self.folder, self.preset = folder, preset
        self.command = Command(folder / "cache", site)

    def run(
        self, name: str, backends: Sequence[str], *, repeats: int = 1, settings: Sequence[str] = ()
    ) -> list[Record]:
        """Every record of one ``qlora-bench run``, in the order in which they were made.

        Raises AssertionError where the command did not end as it should.
        """
        out = self.folder / name
        flags = [part for setting in settings for part in ("--set", setting)]
        done = self.command.run(
            "run", "--preset", self.preset, "--backend", ",".join(backends), "--repeats", str(repeats),
            *flags, "--out", out, "--quiet", timeout=SECONDS_PER_RUN * repeats * len(backends),
        )  # fmt: skip
        assert done.returncode in (0, 1), done.stderr
        records = sorted(Store(out).records(), key=lambda record: record.started_at)
        assert len(records) == repeats * len(backends), done.stdout + done.stderr
        return records

    def report(self, name: str) -> str:
        """The report of that run's folder, as Markdown."""
        return (self.folder / name / "report.md").read_text(encoding="utf-8")
