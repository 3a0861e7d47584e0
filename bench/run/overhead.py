"""What watching costs: the same training step in several ways, on one model, interleaved in one process.

    python -m bench.run.overhead [--preset NAME] [--backend ID] [--rounds N] [--all]      (``make overhead``)

    bare         as it would be written by hand: forward, loss, backward, clip, step
    unobserved   the harness's loop with no probe
    observed     with the always-on probe, as every run has it
    trace        with the fine hooks of --trace                                     (--all)
    anomaly      unobserved, under torch.autograd.detect_anomaly                     (--all)
    debug        unobserved, under transformers' DebugUnderflowOverflow              (--all)

In each round every way runs once, in rotating order, so that drift of the machine hits all alike; the ratio
of a round to its own unobserved step is one value.
"""

from __future__ import annotations

import argparse
import contextlib
import statistics
import time
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import nn

from bench.ask.experiment import build_experiment
from bench.ask.models import resolve_model
from bench.ask.plan import plan
from bench.ask.preset import load_preset
from bench.load.contract import PackedBackend
from bench.load.layout import Layout
from bench.load.lora import attach
from bench.load.model import build_model, skeleton
from bench.load.registry import foreign_libraries, get_backend
from bench.load.weights import CheckpointWeights, SyntheticWeights
from bench.probe.machine import usable_cores
from bench.run.attention import choose_kernel, implementation
from bench.run.isolation import apply_settings, hide_packages
from bench.run.training import Trainer, enable_checkpointing, make_trainer, one_step
from bench.run.watch import Watch
from bench.run.workload import IGNORED_LABEL, Batch, WorkloadReader, encoder_for

WARMUP_ROUNDS = 2
BASE = "unobserved"

Way = Callable[[], AbstractContextManager[Callable[[], object]]]
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
    hide_packages(foreign_libraries(get_backend(asked.backend).backend))
    subject = Subject(asked.preset, asked.backend)
    ratios = measure(subject.ways(everything=asked.all), asked.rounds)
    print(f"{asked.preset}, {asked.backend}: step time over the unobserved step of the same round")
    for name, values in ratios.items():
        cuts = statistics.quantiles(values, n=20)
        spread = f"5 % to 95 % {cuts[0]:.4f} to {cuts[-1]:.4f}"
        print(f"  {name:<11} median {statistics.median(values):.4f}   {spread}   over {len(values)} rounds")


def measure(ways: dict[str, Way], rounds: int) -> dict[str, list[float]]:
    """Ratio to the unobserved step in each round, after two rounds of warm-up."""
    ratios: dict[str, list[float]] = {name: [] for name in ways if name != BASE}
    names = list(ways)
    for place in range(rounds + WARMUP_ROUNDS):
        seconds = {}
        turn = place % len(names)
        for name in names[turn:] + names[:turn]:
            with ways[name]() as step:
                began = time.perf_counter()
                step()
                seconds[name] = time.perf_counter() - began
        if place >= WARMUP_ROUNDS:
            for name, values in ratios.items():
                values.append(seconds[name] / seconds[BASE])
    return ratios


class Subject:
    """One model that is trained in every way."""

    def __init__(self, preset_name: str, backend_id: str) -> None:
        self.trainer, self._bare_reader, self._linears = _trainer(preset_name, backend_id)
        self._steps = 0

    def ways(self, *, everything: bool) -> dict[str, Way]:
        """Name -> how the step is done."""
        ways: dict[str, Way] = {"bare": self._bare, BASE: self._harness, "observed": self._observed}
        if everything:
            ways |= {"trace": self._trace, "anomaly": self._anomaly, "debug": self._debug}
        return ways

    def _step(self) -> object:
        self._steps += 1
        return one_step(self.trainer, self._steps)

    @contextlib.contextmanager
    def _bare(self) -> Iterator[Callable[[], object]]:
        yield lambda: bare_step(self.trainer, self._bare_reader)

    @contextlib.contextmanager
    def _harness(self) -> Iterator[Callable[[], object]]:
        yield self._step

    @contextlib.contextmanager
    def _watched(self, *, fine: bool) -> Iterator[Callable[[], object]]:
        trainer = self.trainer
        trainer.watch = Watch(
            trainer.adapters, self._linears, {}, trainer.devices[0], trainer.dtype, fine=fine
        )
        try:
            yield self._step
        finally:
            trainer.watch.ranges.remove()
            trainer.watch = None

    def _observed(self) -> AbstractContextManager[Callable[[], object]]:
        return self._watched(fine=False)

    def _trace(self) -> AbstractContextManager[Callable[[], object]]:
        return self._watched(fine=True)

    @contextlib.contextmanager
    def _anomaly(self) -> Iterator[Callable[[], object]]:
        with torch.autograd.detect_anomaly():
            yield self._step

    @contextlib.contextmanager
    def _debug(self) -> Iterator[Callable[[], object]]:
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


def bare_step(trainer: Trainer, reader: WorkloadReader) -> None:
    """One training step as it would be written by hand."""
    loss = _bare_loss(trainer, reader.next_batch())
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(trainer.parameters, trainer.request.optimizer.max_gradient_norm or 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    loss.item()


def _bare_loss(trainer: Trainer, batch: Batch) -> torch.Tensor:
    # In a function, so that the logits are not held by a name through the backward, which
    # would slow the bare loop down.
    with torch.autocast("cpu", trainer.dtype):
        logits = trainer.adapters.model(input_ids=batch.input_ids).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL
    )


def _trainer(preset_name: str, backend_id: str) -> tuple[Trainer, WorkloadReader, tuple[str, ...]]:
    preset, entry = load_preset(preset_name), get_backend(backend_id)
    experiment = build_experiment(
        {**preset.experiment_values, "preset": preset_name, "architecture": preset.architecture,
         "backends": [backend_id]})  # fmt: skip
    model = resolve_model(experiment, preset_model=preset.model, download=False)
    (request,) = plan(
        experiment, {backend_id: model.request}, device="cpu", cpu_threads=usable_cores(),
        options={backend_id: entry.defaults.model_dump()}, libraries={backend_id: entry.backend.requires},
        calibrations={backend_id: None},
    )  # fmt: skip
    backend = entry.create(request.options, "cpu", request.dtype)
    if isinstance(backend, PackedBackend):
        raise SystemExit("overhead: choose a backend that quantizes on load")
    empty = skeleton(request.model.architecture, implementation(request.attention))
    weights = _weights(model.folder, empty)
    torch.set_num_threads(request.cpu_threads)
    choose_kernel(request.attention)
    device = torch.device("cpu")
    built = build_model(empty, weights, backend, Layout.on(device))
    enable_checkpointing(built.model, request.checkpointing)
    adapters = attach(built.model, request.lora, request.seed)
    encoder = encoder_for(model.folder, int(request.model.architecture["vocab_size"]))
    reader, bare_reader = (WorkloadReader(request.workload, encoder) for _ in range(2))
    return make_trainer(adapters, request, reader, [device], backend.dtype), bare_reader, built.layers


def _weights(folder: Path | None, empty: nn.Module) -> CheckpointWeights | SyntheticWeights:
    if folder is not None:
        return CheckpointWeights(folder)
    return SyntheticWeights({name: parameter.shape for name, parameter in empty.named_parameters()}, 0.02)


if __name__ == "__main__":
    main()
