"""The preflight: before the first run of a command on CUDA, a worker of its own looks at the cards.

    found = sweep.examiner.find(requests, watcher)
    replace(sweep, examiner=Examiner(skip=True))   # --no-preflight

Its findings hold for every run of the command. Where a copy arrives changed, none is started. A preflight
that crashes or hangs is a finding too, and stops nothing. ``bench.run.card_checks`` is the worker's side.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import Any, Protocol

from pydantic import ValidationError

from bench.ask.plan import RunRequest
from bench.probe.card_concerns import concerns, stop_message
from bench.record.preflight import Preflight
from bench.run.launch import work_alone
from bench.run.order import Order
from bench.run.told import outcome_of

START_SECONDS = 180.0
"""For the import of torch and the start of CUDA on all cards."""
WAY_SECONDS = 30.0
"""For each card and each ordered pair besides: about 3 GiB move at rest and as much under load, which a PCIe
link of one lane (0.8 GB/s) does in a third of it."""
MOST_SECONDS = 900.0
"""A copy that hangs may not cost more."""

Examine = Callable[[Order], Preflight]
"""Looks at the first ``order.request.device_count`` cards. The order's time limit is the preflight's own."""


class Onlooker(Protocol):
    """What is told of a preflight."""

    def examining(self, cards: int) -> None:
        """It begins."""

    def examined(self, preflight: Preflight) -> None:
        """It has ended."""


@dataclass
class Examiner:
    """Looks at the cards that runs use, once for all sweeps that share it."""

    skip: bool = False
    examine: Examine | None = None
    """None: `examine_cards`."""
    _known: dict[int, Preflight] = field(default_factory=dict)
    """By number of cards."""

    def find(self, requests: Sequence[RunRequest], onlooker: Onlooker) -> Preflight | None:
        """What was found about the cards of ``requests``; None where none of them uses CUDA.

        Raises KeyboardInterrupt after the worker has been stopped.
        """
        on_cuda = [request for request in requests if request.device == "cuda"]
        if not on_cuda:
            return None
        widest = max(on_cuda, key=lambda request: request.device_count)
        count = widest.device_count
        if count not in self._known:
            if not self.skip:
                onlooker.examining(count)
            seen = skipped() if self.skip else self._look(widest)
            self._known[count] = seen.model_copy(update={"warnings": concerns(seen)})
            onlooker.examined(self._known[count])
        found = self._known[count]
        stopped = stop_message(
            found,
            across_processes_only=all(request.placement in ("ddp", "fsdp") for request in on_cuda),
            nccl_avoids_peers=os.environ.get("NCCL_P2P_DISABLE", "0").strip() not in ("", "0"),
        )
        return found.model_copy(update={"stopped": stopped})

    def _look(self, widest: RunRequest) -> Preflight:
        ways = widest.device_count**2  # each card with the host, and each with every other
        limit = min(MOST_SECONDS, START_SECONDS + WAY_SECONDS * ways)
        request = widest.model_copy(update={"timeout_seconds": limit})
        return (self.examine or examine_cards)(Order(request=request, model_folder=None))


def examine_cards(order: Order) -> Preflight:
    """Look at the cards in a fresh worker. Whatever becomes of it is in what is returned."""
    began, started_at = time.monotonic(), _now()
    told, ending = work_alone(order, "--preflight")
    status, message = outcome_of(order, told, ending, interrupted=False)
    sections = told.sections
    known: dict[str, Any] = {
        "status": "completed" if status == "completed" else "failed",
        "message": None if status == "completed" else f"{message}, while {told.stage}",
        "started_at": started_at,
        "seconds": time.monotonic() - began,
    }
    found = {
        "driver": sections.get("driver"),
        "visible_devices": sections.get("visible_devices"),
        "cards": [value for name, value in sections.items() if name.startswith("card ")],
        "pairs": [value for name, value in sections.items() if name.startswith("pair ")],
    }
    try:
        return Preflight.model_validate({**known, **found})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(map(str, first["loc"]))
        why = f"the worker told something that is no finding: {where}: {first['msg']}"
        return Preflight.model_validate({**known, "status": "failed", "message": why})


def skipped() -> Preflight:
    """What is recorded where nobody looked."""
    return Preflight(status="skipped", message="--no-preflight", started_at=_now(), seconds=0.0)


def _now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")
