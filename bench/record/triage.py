"""The triage of one failing run: what was changed, one thing at a time, and which change healed it.

Written by ``qlora-bench triage`` as ``triage.json`` beside the records that it speaks of, so that the ladder
can be shown from the folder alone. Every run in it is an ordinary record, named by its key.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Literal

from bench.record.recorded import Recorded
from bench.record.schema import Status
from bench.record.store import read_document
from bench.record.writing import write_atomically

TRIAGE_VERSION: Final = 1
FILE_NAME = "triage.json"

RungKind = Literal["setting", "precision", "training", "backend"]
"""What a change costs, smallest first. ``setting``: the same training, computed or laid out otherwise;
``precision``: other number formats; ``training``: it learns otherwise; ``backend``: another quantization."""
Target = Literal["python", "llamafactory", "axolotl"]


class Evidence(Recorded):
    """What one run showed."""

    key: str
    """Of its record."""
    outcome: Status
    verdict: str
    """The word of ``bench.judge.stability``."""
    finite: bool | None
    """Whether it trained with finite numbers (``bench.judge.finiteness``); null: the run does not say."""
    reason: str
    """Why, in one sentence."""
    steps: int
    """Steps that were run."""
    failing_step: int | None = None
    failing_module: str | None = None
    """Null: nothing failed, or the record does not tell."""
    first_loss: float | None = None
    """Mean over the micro-batches of the first step; null: there was no step."""
    last_loss: float | None = None
    """The same of the last step."""


class Rung(Recorded):
    """One thing changed and everything else left as it was."""

    name: str
    """Unique in a ladder, for example "dtype=bfloat16" or "backend=hqq"."""
    group: str
    """What kind of change it is, in words: "double quantization", "learning rate", "attention kernel" ..."""
    kind: RungKind
    change: str
    """In words."""
    settings: Mapping[str, Any]
    """Dotted name in the request -> its new value."""
    evidence: Evidence | None
    """Null: the rung was not run, see ``note``."""
    heals: bool | None
    """Null: not applicable, or the run does not say."""
    note: str | None = None
    """Why a rung was not run, or what else should be known of it."""

    @property
    def applicable(self) -> bool:
        """Whether there was something to run."""
        return self.evidence is not None


class Confirmation(Recorded):
    """One seed: as it was, and with a change that healed the first seed."""

    rung: str
    """Name of the change."""
    seed: int
    unhealed: Evidence
    healed: Evidence

    @property
    def confirms(self) -> bool:
        """It fails without the change and trains with finite numbers with it."""
        return self.fails_unhealed and self.heals

    @property
    def fails_unhealed(self) -> bool:
        """The run as asked fails with this seed too."""
        return self.unhealed.finite is False

    @property
    def heals(self) -> bool:
        """With the change this seed trains with finite numbers."""
        return self.healed.finite is True


class Configuration(Recorded):
    """The healed run as settings of a tool that people train with."""

    target: Target
    title: str
    """Name of the tool, and what the text is."""
    language: Literal["python", "yaml"]
    text: str


class Triage(Recorded):
    """The whole ladder of one failing run."""

    triage_version: Literal[1] = TRIAGE_VERSION
    command: str
    """The command line that repeats the run as asked."""
    backend: str
    model: str
    weights: Literal["real", "synthetic"]
    requested_dtype: str
    base: Evidence
    """The run as asked. Nothing failed where ``finite`` is not false, and there are no rungs then."""
    cause: str | None
    """What failed first, where and why, in one sentence; null: the record does not tell."""
    rungs: tuple[Rung, ...] = ()
    """In the order in which they were tried."""
    chosen: str | None = None
    """Name of the smallest rung that heals every seed; null: no single change does."""
    confirmations: tuple[Confirmation, ...] = ()
    """One a seed, of the chosen rung and of smaller ones that did not heal every seed."""
    configurations: tuple[Configuration, ...] = ()
    """Of the run with the chosen change."""
    conclusion: str
    """The result in one sentence."""
    ended_at: str
    """UTC, ISO 8601."""

    @property
    def failed(self) -> bool:
        """Whether the run as asked failed."""
        return self.base.finite is False

    @property
    def confirmed(self) -> bool | None:
        """Whether every seed fails as asked and is healed by the chosen change; None: nothing was chosen."""
        own = [seed for seed in self.confirmations if seed.rung == self.chosen]
        return all(seed.confirms for seed in own) if self.chosen else None

    @property
    def chosen_rung(self) -> Rung | None:
        """The rung that was chosen."""
        return next((rung for rung in self.rungs if rung.name == self.chosen), None)

    @property
    def rung_keys(self) -> frozenset[str]:
        """Keys of the runs that only the ladder is about: all but the run as asked, and the first seed with
        the chosen change."""
        own = {rung.evidence.key for rung in self.rungs if rung.evidence}
        own |= {run.key for seed in self.confirmations for run in (seed.unhealed, seed.healed)}
        healed = [seed.healed.key for seed in self.confirmations if seed.rung == self.chosen]
        return frozenset(own - {self.base.key, *healed[:1]})


def save_triage(folder: Path, triage: Triage) -> Path:
    """Write ``triage.json`` into ``folder``, whole or not at all."""
    return write_atomically(folder / FILE_NAME, triage.model_dump_json(indent=1) + "\n")


def triages_below(folder: Path) -> list[Triage]:
    """Every triage in the folder and below it. Raises BrokenFile as `read_triage` does."""
    found = (read_triage(path.parent) for path in sorted(folder.rglob(FILE_NAME)))
    return [triage for triage in found if triage is not None]


def read_triage(folder: Path) -> Triage | None:
    """The triage in ``folder``; None: there is none. Raises BrokenFile, naming the first thing wrong."""
    return read_document(folder / FILE_NAME, Triage, "a triage")
