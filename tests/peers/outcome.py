"""What is kept of a session: one outcome for each run of each arm, whatever became of it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from bench.ask.plan import RunRequest
from bench.record.recorded import Bytes, Recorded, Seconds


class StepSeen(Recorded):
    """One optimizer step. Losses are the raw ones; null: not observed."""

    tokens: int
    """Non-padding tokens."""
    loss_tokens: int
    """Tokens that a loss is computed for."""
    loss: float
    """As the arm's backward started from it."""
    divisor: float | None = None
    """What the peer divided its sum of losses by; null: it took a mean by itself."""
    gradient_norm: float | None
    seconds: Seconds
    """Forward, backward, clipping, update."""
    ended: float | None
    """When the step's end was seen, on a clock of the machine that the arm's other steps share."""
    logged_loss: float | None = None
    """As the peer printed it."""

    @property
    def loss_per_token(self) -> float:
        """The sum of the losses over the tokens that were predicted, whatever the peer divided it by."""
        return self.loss if self.divisor is None else self.loss * self.divisor / max(self.loss_tokens, 1)


class Outcome(Recorded):
    """One run of one arm."""

    case: str
    arm: str
    round: int
    """From 0."""
    status: Literal["completed", "error", "timeout", "crashed", "unavailable", "out_of_memory", "interrupted"]
    stage: str | None
    """Where a run that is not completed ended."""
    message: str | None
    wall_seconds: Seconds
    """Of the whole process, imports and loading included."""
    steps: tuple[StepSeen, ...] = ()
    data_digest: str | None = None
    """SHA-256 over ids, labels and masks as they were trained on."""
    adapters_digest: str | None = None
    """SHA-256 over names and initial float32 values of all adapters."""
    quantized_layers: int | None = None
    step_peak_bytes: Bytes | None = None
    """Highest resident memory within the last warm-up step."""
    process_peak_bytes: Bytes | None = None
    """Highest resident memory of the training process over its life."""
    own: Mapping[str, Any] = {}
    """What the arm says of itself, by its own names."""
    log: Mapping[str, float | None] = {}
    """The last entry of a Trainer's log, and its summary."""
    versions: Mapping[str, str | None] = {}


class CaseFacts(Recorded):
    """What a case was."""

    name: str
    says: str
    request: RunRequest
    """This project's own."""


class Session(Recorded):
    """Everything of one interleaved session."""

    started_at: str
    wall_seconds: Seconds
    rounds: int
    cpu: str
    threads: int
    commit: str | None
    dirty: bool | None
    cases: tuple[CaseFacts, ...]
    outcomes: tuple[Outcome, ...]
    """In the order in which they ran."""

    def of(self, case: str, arm: str) -> list[Outcome]:
        """The outcomes of one arm in one case, by round."""
        return [outcome for outcome in self.outcomes if (outcome.case, outcome.arm) == (case, arm)]

    def arms(self, case: str) -> list[str]:
        """The arms of a case, in the order in which they first ran."""
        return list(dict.fromkeys(outcome.arm for outcome in self.outcomes if outcome.case == case))
