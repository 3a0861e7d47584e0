"""What the harness's loop costs: fresh processes that train the same, by hand or as every run does.

``arrange_overhead`` checks what was asked. ``processes`` runs one process after another: in each round the
loop written by hand (``bench.run.bare``), the same again, and an ordinary run, each in a fresh worker and
each in every place of the order equally often, so that drift of the machine hits all alike. The two loops by
hand differ by nothing, so the spread of their ratio is the noise. ``bench.judge.overhead`` says what follows.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import pairwise
from statistics import fmean
from typing import Any

from bench.errors import BadValue
from bench.record.environment import Environment
from bench.record.overhead import ProcessTimes, Way
from bench.run.arrange import arrange
from bench.run.asked import Asked
from bench.run.launch import run_one, work_alone
from bench.run.order import Order
from bench.run.told import outcome_of

ORDERS: tuple[tuple[Way, Way, Way], ...] = (
    ("bare", "bare_again", "harness"),
    ("bare_again", "harness", "bare"),
    ("harness", "bare", "bare_again"),
    ("harness", "bare_again", "bare"),
    ("bare_again", "bare", "harness"),
    ("bare", "harness", "bare_again"),
)
"""Round k takes order k modulo 6. Every three rounds each way was once first, once second and once third;
after six each also followed each of the others equally often."""


class ProcessFailed(Exception):
    """A process that did not come to its end."""


def arrange_overhead(asked: Asked) -> tuple[Order, str]:
    """The order that every process gets, and a line that says what it is.

    Raises UserError for all that is wrong with what was asked, packed backends included: a loop by hand would
    need their checkpoint made first.
    """
    # Afterwards a run may compare gradients with a reference; that is no part of its loop.
    arranged = arrange(replace(asked, repeats=1, settings=("fidelity=off", *asked.settings)))
    sweep = arranged.sweep
    if len(sweep.requests) != 1:
        raise BadValue(f"{len(sweep.requests)} backends were asked for", "name one with --backend")
    (request,) = sweep.requests
    reason = sweep.obstacle(request)
    if reason:
        raise BadValue(reason)
    if request.calibration is not None:
        raise BadValue(
            f"backend '{request.backend}' reads packed checkpoints", "choose one that quantizes on load"
        )
    if request.device_count != 1:
        raise BadValue("the loop by hand trains on one device", "use --set placement=single")
    if request.workload.steps - request.workload.warmup_steps < 2:
        raise BadValue("one measured step has no time between steps", "use more --steps")
    return sweep.order(request), arranged.headline


def processes(order: Order, rounds: int) -> Iterator[tuple[ProcessTimes, Environment | None]]:
    """Every process of ``rounds`` rounds as it ends; with the environment, where it was a harness process.

    Raises ProcessFailed, with what became of it, and KeyboardInterrupt after the worker has been stopped.
    """
    for number in range(rounds):
        for place, way in enumerate(ORDERS[number % len(ORDERS)]):
            yield _process(order, way, number, place)


def _process(order: Order, way: Way, number: int, place: int) -> tuple[ProcessTimes, Environment | None]:
    reported: list[float] = []
    environment = None

    def listen(event: Mapping[str, Any]) -> None:
        if event["event"] == "step":
            reported.append(time.perf_counter())

    began = time.perf_counter()
    if way == "harness":
        record = run_one(order, listen)
        status, message, environment = str(record.status), record.message, record.environment
        seconds = [step.seconds for step in record.steps]
        losses = [fmean(step.losses) for step in record.steps]
    else:
        told, ending = work_alone(order, "--bare", listen)
        status, message = outcome_of(order, told, ending, interrupted=False)
        seconds = [float(step["seconds"]) for step in told.steps]
        losses = [float(step["loss"]) for step in told.steps]
    if status != "completed":
        raise ProcessFailed(f"round {number}, {way.replace('_', ' ')}: {status}: {message}")
    measured = reported[order.request.workload.warmup_steps :]
    times = ProcessTimes(
        way=way,
        round=number,
        place=place,
        step_seconds=tuple(seconds[order.request.workload.warmup_steps :]),
        between_seconds=tuple(later - earlier for earlier, later in pairwise(measured)),
        losses=tuple(losses),
        wall_seconds=time.perf_counter() - began,
    )
    return times, environment
