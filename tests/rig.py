"""A rig that trains the toy, or a real model cut short, in this process: the real code, end to end.

    rig = Rig(ask("bnb-nf4", dtype="float16", stress={"model.layers.1.mlp.up_proj": 2.0**18}))
    outcome = rig.train()
    outcome.verdict, outcome.failure, rig.replay()

What stands between a request and a verdict is `bench`'s own: the builder, the backends, the loop, the probes,
the finder, the replay, the judge. Only the process is this one, and what a worker tells its parent is kept in
a dictionary. A `Plant` (``tests/plants.py``) spoils one thing of it.
"""

from __future__ import annotations

import atexit
import gc
import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from bench.ask.experiment import Lora, Optimizer, Workload
from bench.ask.plan import ModelRequest, RunRequest
from bench.ask.preset import load_preset
from bench.judge.stability import Verdict, judge_stability
from bench.load.contract import PackedBackend
from bench.load.lora import attach, initial_values, tensors_digest
from bench.load.model import DTYPES, BuiltModel, linear_shapes
from bench.load.packed import pack_checkpoint
from bench.load.proof import frozen_breaches, gradient_breaches
from bench.load.registry import get_backend
from bench.probe.gradients import all_finite
from bench.probe.memory import MemoryProbe
from bench.probe.ranges import WRAPPER
from bench.probe.weights import non_finite_weights
from bench.record.schema import Record, Step
from bench.record.stability import FirstFailure, Replay
from bench.run.aftermath import Aftermath
from bench.run.attention import choose_kernel
from bench.run.building import Builder
from bench.run.events import Channel
from bench.run.isolation import WatchedVariables
from bench.run.loading import Loaded
from bench.run.order import Order
from bench.run.replay import Replayer, refined
from bench.run.telling import Breach, Telling
from bench.run.training import Trainer, enable_checkpointing, make_trainer, train
from bench.run.watch import BadBatch, Watch
from bench.run.workload import Batch, WorkloadReader
from tests.record_factory import environment, record, request

CPU = torch.device("cpu")
TINY: Mapping[str, Any] = load_preset("tiny").architecture or {}
BACKENDS = ("bf16", "bnb-nf4", "bnb-nf4-dq", "bnb-int8", "hqq", "gptq", "awq", "eetq")
DTYPES_ASKED = ("bfloat16", "float16", "float32")
quiet = pytest.mark.filterwarnings(r"ignore:`\w*gradient_checkpointing\w*` is deprecated:FutureWarning")
"""Renamed in transformers 5, where the old names still work; PEFT and the training loop use them."""


@pytest.fixture(scope="module", autouse=True)
def settled() -> Iterator[None]:
    """For the modules that import it: one thread, which is the fastest for so small a model on a machine that
    is shared, and the process afterwards as it was.

    What the test process holds is no matter of the garbage collector's meanwhile: each training has it look
    through everything, which was 29 % of the time of the planted faults."""
    threads, variables = torch.get_num_threads(), dict(os.environ)
    torch.set_num_threads(1)
    gc.collect()
    gc.freeze()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gc, "unfreeze", lambda: None)
        yield
    gc.unfreeze()
    torch.set_num_threads(threads)
    choose_kernel("sdpa")
    os.environ.clear()
    os.environ.update(variables)


def ask(
    backend: str = "bf16",
    *,
    layers: int = 2,
    architecture: Mapping[str, Any] = TINY,
    work: Mapping[str, Any] | None = None,
    lora: Mapping[str, Any] | None = None,
    optimizer: Mapping[str, Any] | None = None,
    **changes: Any,
) -> RunRequest:
    """A request for four steps of 64 tokens on a CPU, the first of them as warm-up.

    Its weights are called real, so that the run is judged like one.
    """
    entry = get_backend(backend)
    settings = {"sequence_length": 64, "steps": 4, "warmup_steps": 1, **(work or {})}
    return request(
        backend,
        device="cpu",
        model=ModelRequest(
            name="local/rig",
            weights="real",
            fingerprint="rig",
            architecture={**architecture, "num_hidden_layers": layers},
        ),
        options=entry.defaults.model_dump(mode="json"),
        calibration="rtn" if issubclass(entry.backend, PackedBackend) else None,
        workload=Workload(**settings),
        lora=Lora(**(lora or {})),
        optimizer=Optimizer(**(optimizer or {})),
        **changes,
    )


@dataclass(frozen=True)
class Plant:
    """A fault: what is spoilt, and when."""

    weights: Callable[[BuiltModel], None] | None = None
    """Called with the model as it was built, before anything looks at it."""
    model: Callable[[Rig], None] | None = None
    """Called once the adapters are attached, before the probes are: hooks that are put on modules here change
    what the probes see of them."""
    batch: Callable[[int, int, Batch], Batch] | None = None
    """Given step, micro-batch and batch, returns the batch that is trained on."""


@dataclass(frozen=True)
class Outcome:
    """What a run came to."""

    record: Record
    verdict: Verdict

    @property
    def failure(self) -> FirstFailure | None:
        return self.record.first_failure


class Kept(Channel):
    """Takes the place of the pipe to the parent: keeps the sections of the record."""

    def __init__(self) -> None:
        self.sections: dict[str, Any] = {}

    def send(self, event: str, **content: Any) -> None:
        if event == "section":
            self.sections[content["name"]] = content["value"]


class AlteredReader:
    """A reader whose batches go through a plant, and which knows them again by their ids."""

    def __init__(self, reader: WorkloadReader, accumulation: int, plant: Plant) -> None:
        self._reader = reader
        self._accumulation = accumulation
        self._alter = plant.batch
        self._drawn: list[Batch] = []

    def __getattr__(self, name: str) -> Any:
        return getattr(self._reader, name)

    def next_batch(self) -> Batch:
        batch = self._reader.next_batch()
        if self._alter:
            batch = self._alter(*divmod(len(self._drawn), self._accumulation), batch)
        self._drawn.append(batch)
        return batch

    def place_of(self, ids: torch.Tensor) -> tuple[int, int]:
        """Step and micro-batch of the batch with these ids."""
        drawn = next(n for n, batch in enumerate(self._drawn) if torch.equal(batch.input_ids, ids))
        return divmod(drawn, self._accumulation)


class Rig:
    """One model with its adapters, which can be trained several times, each time from other adapters."""

    def __init__(self, asked: RunRequest, plant: Plant | None = None, folder: Path | None = None) -> None:
        """``folder``: of real weights; None: the toy's are drawn."""
        self.request = asked
        self.plant = plant or Plant()
        self.step = self.micro_batch = 0
        """Where the forward that runs is, in the replay as well."""
        self.trainer: Trainer | None = None
        self.watch: Watch | None = None
        order = Order(request=asked, model_folder=folder)
        if asked.calibration is not None:
            order = order.model_copy(update={"packed_folder": packed(order)})
        self.channel = Kept()
        self.telling = Telling(self.channel, order)
        self.builder = Builder(order, self.channel, WatchedVariables())
        self.backend, self.built, self.shapes = self.builder.build(asked)
        if self.plant.weights:
            self.plant.weights(self.built)
        self.telling.quantization(self.backend, self.built, self.shapes)
        enable_checkpointing(self.built.model, asked.checkpointing)
        dtype = DTYPES[self.backend.dtype]
        self.adapters = attach(self.built.model, asked.lora, asked.seed, dtype, self.builder.pairs)
        self.adapters.model.register_forward_pre_hook(self._locate, with_kwargs=True)
        if self.plant.model:
            self.plant.model(self)

    def module(self, name: str) -> nn.Module:
        """A module by its plain name; of a linear layer, PEFT's with the adapter's part."""
        return self.adapters.model.get_submodule(WRAPPER + name)

    def train(self, seed: int | None = None) -> Outcome:
        """Train as asked and judge; ``seed``: from the adapters that another seed draws."""
        asked = self.request
        if seed is not None:
            asked = asked.model_copy(update={"seed": seed})
            self._draw_adapters(seed)
        known = {"quantization": self.channel.sections["quantization"]}
        self.channel.sections = known
        self.telling = telling = Telling(self.channel, self.builder.order)
        telling.lora(self.adapters)
        steps: list[Step] = []
        accumulation = asked.workload.gradient_accumulation_steps
        self._reader: Any = AlteredReader(self.builder.reader(), accumulation, self.plant)
        broken = non_finite_weights(self.built)
        telling.weights(broken)
        trainer = make_trainer(self.adapters, asked, self._reader, [CPU], self.backend.dtype)
        watch = Watch(self.adapters, self.built.layers, broken, CPU, trainer.dtype, fine=asked.trace)
        trainer.watch, self.trainer, self.watch = watch, trainer, watch

        def on_first_backward() -> None:
            finite = all_finite(p.grad for p in self.adapters.tensors.values() if p.grad is not None)
            telling.prove(
                gradients_reach_adapters=gradient_breaches(self.adapters.tensors),
                first_gradients_finite=finite,
            )

        def on_step(step: Step, readings: object) -> None:
            steps.append(step)
            telling.workload(self._reader, self.backend)
            telling.failure(watch.finder.found)

        error: Exception | None = None
        try:
            telling.prove(base_frozen=frozen_breaches(self.adapters.model, self.adapters.tensors))
            train(trainer, MemoryProbe([CPU]), on_step, on_first_backward)
        except BadBatch as bad:
            error = bad
            telling.failure(bad.failure)
        except Breach as breach:
            error = breach
        else:
            known["trainable_weights_finite"] = watch.end(asked.workload.steps - 1)
            telling.failure(watch.finder.found)
        finally:
            watch.ranges.remove()
        return self._outcome(asked, steps, error)

    def replay(self) -> tuple[Replay, FirstFailure]:
        """The failing micro-batch with every operation watched, and the failure as it stands afterwards."""
        assert self.trainer and self.watch and self.watch.finder.found and self.watch.snapshot
        failure = self.watch.finder.found
        self.trainer.watch = None
        replay = Replayer(self.trainer, list(self.built.layers), failure, self.watch.snapshot).watched()
        return replay, refined(failure, replay)

    def investigate(self, outcome: Outcome) -> Outcome:
        """The outcome with the whole aftermath in its record, remedies included. Nothing can come after it:
        the last remedy lets the model go."""
        assert self.trainer
        self.trainer.watch = self.watch
        loaded = Loaded(self.backend, self.built, self.shapes, {})
        Aftermath(self.builder, self.telling, loaded, self.trainer).investigate()
        return judged(outcome.record.model_copy(update=self.channel.sections))

    def _outcome(self, asked: RunRequest, steps: list[Step], error: Exception | None) -> Outcome:
        changes = {
            "key": asked.key,
            "command": asked.command,
            "request": asked,
            "environment": environment(cpu=True),
            "steps": tuple(steps),
            "trainable_weights_finite": None,
            **self.channel.sections,
        }
        if error is not None:
            changes |= {"status": "error", "stage": "train", "message": str(error)}
        return judged(record(asked.backend, cpu=True).model_copy(update=changes))

    def _draw_adapters(self, seed: int) -> None:
        with torch.no_grad():
            for name, parameter in self.adapters.tensors.items():
                parameter.copy_(initial_values(name, parameter.shape, seed))
                parameter.grad = None
        self.adapters = replace(self.adapters, initial_digest=tensors_digest(self.adapters.tensors))

    def _locate(self, module: nn.Module, arguments: Any, keywords: dict[str, Any]) -> None:
        self.step, self.micro_batch = self._reader.place_of(keywords["input_ids"])


def judged(made: Record) -> Outcome:
    """The verdict on a record as it comes back from its file, where a number that is not finite is a word."""
    stored = Record.model_validate_json(made.model_dump_json())
    return Outcome(stored, judge_stability(stored))


def packed(order: Order) -> Path:
    """A packed checkpoint of the order's model, made as the stage before a run makes it, once a process."""
    asked = order.request
    body = [asked.backend, dict(asked.model.architecture), dict(asked.options), str(order.model_folder)]
    folder = packed_root() / hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()[:16]
    if not folder.exists():
        builder = Builder(order, Kept(), WatchedVariables())
        backend, model, weights = builder.open(asked, order.model_folder, stressed=False)
        assert isinstance(backend, PackedBackend)
        backend.fit(list(linear_shapes(model).values()))
        pack_checkpoint(
            model, weights, backend, asked.model.architecture, folder, order.model_folder, builder.progress
        )
    return folder


@cache
def packed_root() -> Path:
    """A folder for packed checkpoints, as long as this process lives."""
    folder = tempfile.mkdtemp(prefix="qlora-bench-rig-")
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    return Path(folder)
