"""A stand-in for the worker process: records without a training, for tests of what decides which run is next.

``FakeWorker(outcome)`` replaces ``run_sweep`` in ``bench.run.one_by_one``: it saves a record for every request
that has none yet, as the real sweep does. ``outcome(request)`` says what becomes of a request.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

from bench.ask.plan import RunRequest
from bench.record.schema import Record
from bench.run.sweep import Sweep, Watcher
from tests.record_factory import first_failure, record, step

Outcome = Callable[[RunRequest], dict[str, Any]]


class FakeWorker:
    """Counts what it was asked to run."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.ran: list[RunRequest] = []

    def __call__(self, sweep: Sweep, watcher: Watcher) -> Iterator[Record]:
        for request in sweep.waiting():
            self.ran.append(request)
            made = record_of(request, **self.outcome(request))
            sweep.store.save(made)
            yield made


def record_of(request: RunRequest, **changes: Any) -> Record:
    """A completed, finite record of ``request``; keywords change the record."""
    made = record("bf16", steps=healthy(request))
    quantization = made.quantization
    assert quantization is not None
    known = {"requested_dtype": request.dtype, "effective_dtype": request.dtype}
    values = {
        "key": request.key,
        "command": request.command,
        "request": request,
        "quantization": quantization.model_copy(update=known),
    }
    return made.model_copy(update=values | changes)


def healthy(request: RunRequest) -> tuple[Any, ...]:
    return tuple(
        step(index, warmup=index < request.workload.warmup_steps) for index in range(request.workload.steps)
    )


def failing(request: RunRequest, at: int = 0, module: str = "model.layers.0.mlp.down_proj") -> dict[str, Any]:
    """What becomes of a run whose loss is NaN from step ``at`` on; finite where it is too short for that."""
    if at >= request.workload.steps:
        return {}
    steps = tuple(
        made
        if made.index < at
        else made.model_copy(update={"losses": (math.nan,), "gradient_norm": math.nan})
        for made in healthy(request)
    )
    return {"steps": steps, "first_failure": first_failure(step=at, module=module)}


def skipping(request: RunRequest, until: int) -> dict[str, Any]:
    """What becomes of a float16 run whose scaler skips all steps before ``until``, with a finite loss."""
    steps = tuple(
        made if made.index >= until else made.model_copy(update={"applied": False, "gradient_norm": math.inf})
        for made in healthy(request)
    )
    spared = first_failure(step=0, phase="backward", kind="backward_overflow", skipped_by_scaler=True)
    return {"steps": steps, "first_failure": spared}


def out_of_memory(request: RunRequest) -> dict[str, Any]:
    return {"status": "out_of_memory", "stage": "load", "message": "CUDA out of memory", "steps": ()}
