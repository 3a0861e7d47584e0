"""What several processes of one run tell, and how it becomes one record: the parent's side, without torch.

    ranks = Ranks(2)
    ranks.take(1, event)        # an event of rank 1's own pipe
    ranks.closed(1, now)        # its pipe ended
    ranks.settle(told)          # everything, as one process would have told it

The micro-batches of a step are given to the ranks in turn (``bench.run.distributed``), so losses stand in the
order of the stream: those that one process would have computed one after another. A run has completed when
every rank has; else the rank that failed first says why.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from bench.ask.experiment import Placement
from bench.ask.plan import RunRequest
from bench.run.merging import (
    highest,
    merged_environment,
    merged_failure,
    merged_load,
    merged_proof,
    merged_step,
)
from bench.run.told import Told

BY_PROCESS: Mapping[Placement, str] = {
    "ddp": "torch.nn.parallel.DistributedDataParallel",
    "fsdp": "torch.distributed.fsdp.fully_shard",
}
"""Placements with a process for each device, and what ties the processes together."""
LAUNCHER = "torchrun"
STAGES = ("launch", "load", "attach", "train")
SILENT_SECONDS = 0.5
"""A rank that ends without a word breaks the others' collective operations at once, so that one of them may
tell its error before the silence is noticed. A rank that is ended because of another's error is ended later:
a worker waits for `LINGER_SECONDS` between telling its error and its end."""
LINGER_SECONDS = 1.0
EQUAL_IN_ALL: Mapping[str, tuple[str, ...]] = {
    "load": ("weights_digest",),
    "lora": ("initial_digest",),
    "workload": ("digest",),
}
"""Parts of a record that every rank must tell alike."""


def processes_of(request: RunRequest) -> int:
    """How many processes train a request."""
    return request.device_count if request.placement in BY_PROCESS else 1


@dataclass
class RankTold:
    """What one rank has told."""

    told: Told = field(default_factory=Told)
    pid: int | None = None
    outcome_at: float | None = None
    """When it told how it ended (monotonic clock of the machine)."""
    closed_at: float | None = None
    """When its pipe ended."""
    share: Mapping[str, Any] = field(default_factory=dict)
    """``workload_digest``: of the batches that it consumed. ``adapters_digest``: after the last step."""

    @property
    def failed_at(self) -> float | None:
        """When it failed; None: it has not. A silent end counts as earlier by `SILENT_SECONDS`."""
        if self.told.status is not None:
            return None if self.told.status == "completed" else self.outcome_at
        return None if self.closed_at is None else self.closed_at - SILENT_SECONDS


class Ranks:
    """The ranks of one run, from 0."""

    def __init__(self, count: int) -> None:
        self.all = [RankTold() for _ in range(count)]

    def take(self, rank: int, event: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
        """Keep one event. Yields what a listener should hear: rank 0's stages and progress, and each step
        once all ranks have told it."""
        one = self.all[rank]
        match event["event"]:
            case "rank":
                one.pid = int(event["pid"])
            case "share":
                one.share = event
            case "outcome":
                one.outcome_at = float(event["at"])
        one.told.take(event)
        if event["event"] == "step":
            index = len(one.told.steps) - 1
            if all(len(other.told.steps) > index for other in self.all):
                yield {"event": "step", "step": self._step(index)}
        elif rank == 0 and event["event"] in ("stage", "progress"):
            yield event

    def closed(self, rank: int, now: float) -> None:
        """The pipe of ``rank`` has ended."""
        self.all[rank].closed_at = now

    @property
    def failing(self) -> int | None:
        """The rank that failed first; None: none has."""
        failed = {rank: at for rank, one in enumerate(self.all) if (at := one.failed_at) is not None}
        return min(failed, key=lambda rank: failed[rank]) if failed else None

    @property
    def _hindmost(self) -> str:
        """The stage of the rank that has not come as far as the others: they wait for it."""
        stages = [one.told.stage for one in self.all]
        return min(stages, key=lambda stage: STAGES.index(stage) if stage in STAGES else -1)

    @property
    def whereabouts(self) -> str:
        """Where each rank has come to, in words."""
        return ", ".join(
            f"rank {rank} in {one.told.stage}"
            + (f" after step {one.told.steps[-1]['index']}" if one.told.steps else "")
            for rank, one in enumerate(self.all)
        )

    def settle(self, told: Told) -> None:
        """Put into ``told`` what one process would have told. Where no rank knows it, it has no status."""
        failing = self.failing
        told.stage = self._hindmost if failing is None else self.all[failing].told.stage
        if failing is not None and self.all[failing].told.status is not None:
            told.status = self.all[failing].told.status
            told.message = f"rank {failing}: {self.all[failing].told.message}"
        elif all(one.told.status == "completed" for one in self.all):
            told.status = "completed"
        told.sections = self._sections()
        told.steps = [self._step(index) for index in range(min(len(one.told.steps) for one in self.all))]
        told.memory = self._memory()
        if told.status == "completed":
            self._prove(told, [*self._differences(), *self._disagreements()])

    def _step(self, index: int) -> dict[str, Any]:
        return merged_step([one.told.steps[index] for one in self.all])

    def _each(self, name: str) -> list[Any]:
        """A section of every rank that has told it."""
        return [one.told.sections[name] for one in self.all if name in one.told.sections]

    def _sections(self) -> dict[str, Any]:
        """Rank 0's, with those that concern every rank made of all."""
        merged: dict[str, Any] = {
            "placement": self._placement,
            "environment": merged_environment,
            "load": merged_load,
            "proof": merged_proof,
            "trainable_weights_finite": all,
        }
        sections = dict(self.all[0].told.sections)
        sections |= {name: merge(found) for name, merge in merged.items() if (found := self._each(name))}
        failures = {
            rank: one.told.sections["first_failure"]
            for rank, one in enumerate(self.all)
            if "first_failure" in one.told.sections
        }
        if failures:
            steps = {rank: one.told.steps for rank, one in enumerate(self.all)}
            sections["first_failure"] = merged_failure(failures, steps, len(self.all))
        return sections

    def _placement(self, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
        places = [
            {
                **place,
                "rank": rank,
                "step_seconds": [step["seconds"] for step in one.told.steps],
                "workload_digest": one.share.get("workload_digest"),
            }
            for rank, one in enumerate(self.all)
            for place in one.told.sections.get("placement", {}).get("places", ())
        ]
        return {**found[0], "places": places}

    def _memory(self) -> dict[str, Any]:
        lists = {
            name: [
                {**item, "rank": rank} for rank, one in enumerate(self.all) for item in one.told.memory[name]
            ]
            for name in ("readings", "bytes_by_kind")
        }
        peaks = [one.told.memory.get("process_peak_resident_bytes") for one in self.all]
        counts = {
            name: sum(known)
            for name in ("allocator_retries", "allocator_ooms")
            if len(known := [m[name] for one in self.all if name in (m := one.told.memory)]) == len(self.all)
        }
        return {
            **lists,
            **counts,
            "phase_step": self.all[0].told.memory.get("phase_step"),
            "process_peak_resident_bytes": highest(peaks),
        }

    def _differences(self) -> Iterator[str]:
        for section, names in EQUAL_IN_ALL.items():
            for name in names:
                if len({found[name] for found in self._each(section)}) > 1:
                    yield f"{section}.{name} is not the same on all ranks"

    def _disagreements(self) -> Iterator[str]:
        """Gradients are the same on all ranks once they are averaged, and so is what follows from them."""
        for steps in zip(*(one.told.steps for one in self.all), strict=False):
            for name in ("gradient_norm", "loss_scale", "applied"):
                # Compared as they are written, so that NaN equals NaN.
                if len({str(step[name]) for step in steps}) > 1:
                    values = ", ".join(str(step[name]) for step in steps)
                    yield f"{name} of step {steps[0]['index']} is not the same on all ranks: {values}"
        if len({one.share.get("adapters_digest") for one in self.all} - {None}) > 1:
            yield "the trained adapters are not the same on all ranks"

    def _prove(self, told: Told, breaches: Sequence[str]) -> None:
        proof = told.sections.get("proof", {})
        known = proof.get("breaches", ())
        told.sections["proof"] = {**proof, "ranks_agree": not breaches, "breaches": [*known, *breaches]}
        if breaches:
            told.status, told.stage, told.message = "error", "train", breaches[0]
