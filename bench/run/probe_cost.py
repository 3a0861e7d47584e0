"""What watching costs: the same training step in several ways, on one model, interleaved in one process.

    python -m bench.run.probe_cost [--preset NAME] [--backend ID] [--rounds N] [--all]      (``make probes``)

    bare         as it would be written by hand (``bench.run.bare``)
    unobserved   the harness's loop with no probe
    observed     with the always-on probe, as every run has it
    recorded     the same steps as their records tell their time, which leaves the reading of the probe out
    trace        with the fine hooks of --trace                                     (--all)
    anomaly      unobserved, under torch.autograd.detect_anomaly                     (--all)
    debug        unobserved, under transformers' DebugUnderflowOverflow              (--all)

In each round every way runs once, in rotating order, so that drift of the machine hits all alike; the ratio
of a round to its own unobserved step is one value. One process tells the parts of the loop apart more finely
than several can, and says nothing about the next process: for that there is ``qlora-bench overhead``.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import statistics
import sys
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager

import torch

from bench.errors import UserError
from bench.load.model import linear_shapes
from bench.load.registry import foreign_libraries, get_backend
from bench.probe.clock import now
from bench.probe.collector import old_objects_left_alone
from bench.record.schema import Step
from bench.run.asked import Asked
from bench.run.bare import bare_step, read_batches
from bench.run.building import Builder
from bench.run.events import Channel
from bench.run.isolation import WatchedVariables, apply_settings, hide_packages
from bench.run.order import Order
from bench.run.overhead import arrange_overhead
from bench.run.training import one_step
from bench.run.watch import Watch

WARMUP_ROUNDS = 2
BASE = "unobserved"

Way = Callable[[], AbstractContextManager[Callable[[], Step | None]]]
"""Enters what must be in place, outside of the time taken, and gives the step."""


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="cost of the probes, and of the harness's loop")
    parser.add_argument("--preset", default="proxy")
    parser.add_argument("--backend", default="bnb-nf4")
    parser.add_argument("--rounds", type=int, default=20)
    parser.add_argument(
        "--all", action="store_true", help="with --trace, detect_anomaly, DebugUnderflowOverflow"
    )
    asked = parser.parse_args()
    apply_settings()
    try:
        order, headline = arrange_overhead(Asked(preset=asked.preset, backends=(asked.backend,)))
    except UserError as error:
        sys.exit(f"probe_cost: {error}")
    hide_packages(foreign_libraries(get_backend(asked.backend).backend))
    print(headline)
    subject = Subject(order)
    ratios = measure(subject.ways(everything=asked.all), asked.rounds, subject.trainer.devices)
    print("step time over the unobserved step of the same round")
    for name, values in ratios.items():
        # Of so few rounds the other method reaches beyond what was measured, below zero even.
        cuts = statistics.quantiles(values, n=20, method="inclusive")
        spread = f"5 % to 95 % {cuts[0]:.4f} to {cuts[-1]:.4f}"
        print(f"  {name:<11} median {statistics.median(values):.4f}   {spread}   over {len(values)} rounds")


def measure(ways: dict[str, Way], rounds: int, devices: Sequence[torch.device]) -> dict[str, list[float]]:
    """Ratio to the unobserved step in each round, after two rounds of warm-up; what a step left queued on
    ``devices`` is waited for."""
    ratios: dict[str, list[float]] = {}
    names = list(ways)
    with old_objects_left_alone():
        for place in range(rounds + WARMUP_ROUNDS):
            seconds = {}
            turn = place % len(names)
            for name in names[turn:] + names[:turn]:
                with ways[name]() as step:
                    began = now(devices)
                    told = step()
                    seconds[name] = now(devices) - began
                if told and name == "observed":
                    seconds["recorded"] = told.seconds
            if place >= WARMUP_ROUNDS:
                base = seconds.pop(BASE)
                for name, value in seconds.items():
                    ratios.setdefault(name, []).append(value / base)
    return ratios


class Subject:
    """One model that is trained in every way."""

    def __init__(self, order: Order) -> None:
        request = order.request
        torch.set_num_threads(request.cpu_threads)
        # Nobody listens to what building tells of its progress.
        channel = Channel(os.open(os.devnull, os.O_WRONLY))
        builder = Builder(order, channel, WatchedVariables())
        _, empty, _ = builder.open(request, order.model_folder)
        self._linears = tuple(linear_shapes(empty))
        self.trainer, self._bare_reader = builder.trainer_of(request), builder.reader()
        self._steps = 0

    def ways(self, *, everything: bool) -> dict[str, Way]:
        """Name -> how the step is done."""
        ways: dict[str, Way] = {"bare": self._bare, BASE: self._harness, "observed": self._observed}
        if everything:
            ways |= {"trace": self._trace, "anomaly": self._anomaly, "debug": self._debug}
        return ways

    def _step(self) -> Step:
        self._steps += 1
        step, _ = one_step(self.trainer, self._steps)
        return step

    def _bare_step(self) -> None:
        bare_step(self.trainer, read_batches(self.trainer, self._bare_reader))

    @contextlib.contextmanager
    def _bare(self) -> Iterator[Callable[[], Step | None]]:
        yield self._bare_step

    @contextlib.contextmanager
    def _harness(self) -> Iterator[Callable[[], Step | None]]:
        yield self._step

    @contextlib.contextmanager
    def _watched(self, *, fine: bool) -> Iterator[Callable[[], Step | None]]:
        trainer = self.trainer
        trainer.watch = Watch(
            trainer.adapters, self._linears, {}, trainer.devices[0], trainer.dtype, fine=fine
        )
        try:
            yield self._step
        finally:
            trainer.watch.remove()
            trainer.watch = None

    def _observed(self) -> AbstractContextManager[Callable[[], Step | None]]:
        return self._watched(fine=False)

    def _trace(self) -> AbstractContextManager[Callable[[], Step | None]]:
        return self._watched(fine=True)

    @contextlib.contextmanager
    def _anomaly(self) -> Iterator[Callable[[], Step | None]]:
        with torch.autograd.detect_anomaly():
            yield self._step

    @contextlib.contextmanager
    def _debug(self) -> Iterator[Callable[[], Step | None]]:
        from transformers.debug_utils import DebugUnderflowOverflow

        modules = list(self.trainer.adapters.model.modules())
        # It has no way to take its hooks off.
        before = [OrderedDict(module._forward_hooks) for module in modules]
        DebugUnderflowOverflow(self.trainer.adapters.model)
        try:
            yield self._step
        finally:
            for module, hooks in zip(modules, before, strict=True):
                module._forward_hooks = hooks


if __name__ == "__main__":
    main()
