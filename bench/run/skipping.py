"""Runs that need not be tried: a run that needs no more memory has run out of it already.

    rule = SkipRule(memory_bytes)
    rule.observe(record)           # of every run, as soon as there is one
    rule.reason(request)           # why it is skipped; None: it is to be run

Only what was observed counts, never an estimate: analytic ones have been wrong by a factor of 2.5 and were
given up for this rule (lablup/mlxcel#807). ``--no-skip`` runs everything.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from bench.ask.plan import RunRequest
from bench.probe.card_concerns import UNEXPLAINED_BYTES
from bench.record.preflight import Preflight
from bench.record.schema import Record

SIZES = ("sequence_length", "micro_batch_size", "layers")
"""What a run can have more of. With as much of each or more, and all else equal, it needs no less memory."""
OF_NO_CONSEQUENCE: dict[str, Any] = {
    "preset": True,
    "seed": True,
    "repeat": True,
    "timeout_seconds": True,
    "model": {"note", "layers"},
    "workload": {"sequence_length", "micro_batch_size", "steps", "warmup_steps"},
    "optimizer": {"learning_rate", "max_gradient_norm"},
}
"""Parts of a request that may differ: sizes are compared on their own, the rest takes no memory."""
SAME_MEMORY = 1.01
"""A machine tells its memory a little differently from one boot to the next. What has more than that is a
larger one, on which nothing has been observed."""


@dataclass
class SkipRule:
    """What has been seen to run out of memory, and what follows."""

    memory_bytes: int | None
    """Of the device that runs; None: unknown."""
    _exhausted: list[Record] = field(default_factory=list)

    def observe(self, record: Record) -> None:
        """Take a record; all but those that ran out of memory by themselves teach nothing."""
        if record.status == "out_of_memory" and not _shared(record.preflight) and not self._smaller(record):
            self._exhausted.append(record)

    def reason(self, request: RunRequest) -> str | None:
        """Why ``request`` is skipped, in one line; None: nothing speaks against it."""
        for record in self._exhausted:
            if needs_no_less(request, record.request):
                sizes = sizes_of(record.request)
                layers = "layer" if sizes["layers"] == 1 else "layers"
                return (
                    f"{record.key} ran out of memory with {sizes['sequence_length']} tokens in a "
                    f"micro-batch of {sizes['micro_batch_size']} on {sizes['layers']} {layers}, and this run "
                    "needs no less; --no-skip runs it"
                )
        return None

    def _smaller(self, record: Record) -> bool:
        """Whether a record is of a device with less memory than this one has."""
        had = _memory_of(record)
        return had is not None and self.memory_bytes is not None and self.memory_bytes > had * SAME_MEMORY


def needs_no_less(request: RunRequest, other: RunRequest) -> bool:
    """Whether ``request`` is ``other`` again, with as many tokens, rows and layers or more."""
    own, others = sizes_of(request), sizes_of(other)
    return all(own[name] >= others[name] for name in SIZES) and _rest(request) == _rest(other)


def sizes_of(request: RunRequest) -> dict[str, int]:
    """The sizes that the rule compares."""
    return {
        "sequence_length": request.workload.sequence_length,
        "micro_batch_size": request.workload.micro_batch_size,
        "layers": int(request.model.architecture.get("num_hidden_layers") or request.model.layers or 0),
    }


def _rest(request: RunRequest) -> dict[str, Any]:
    """Everything else that memory can depend on."""
    body = request.model_dump(mode="json", exclude=OF_NO_CONSEQUENCE)
    model = body["model"]
    # The first layers of one model are of one model. Drawn weights have their fingerprint from their shape.
    model["architecture"] = {
        name: value
        for name, value in model["architecture"].items()
        if name not in ("num_hidden_layers", "layer_types")
    }
    if model["weights"] == "synthetic":
        del model["fingerprint"]
    return body


def _shared(preflight: Preflight | None) -> bool:
    """Whether somebody else used the cards: then it was not this run that filled them."""
    cards = preflight.cards if preflight else ()
    return any(card.processes or (card.used_bytes or 0) >= UNEXPLAINED_BYTES for card in cards)


def _memory_of(record: Record) -> int | None:
    """Memory of the record's largest device; None: the run ended before it was told."""
    if record.request.device == "cpu":
        return record.environment.total_memory_bytes if record.environment else None
    cards = record.preflight.cards if record.preflight else ()
    devices = record.environment.devices if record.environment else ()
    sizes = [*(card.total_bytes for card in cards), *(device.total_memory_bytes for device in devices)]
    return max((size for size in sizes if size), default=None)
