"""The stages of one run, inside its worker: prepare, load, attach, train, and what is looked into afterwards.

Each tells its part of the record as soon as it is known (``bench.run.telling``), so a run that ends early
loses nothing. ``bench.run.worker`` starts them; torch and everything on top of it is imported here, in the
first stage.
"""

from __future__ import annotations

import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.ask.plan import RunRequest
from bench.ask.stress import resolve_stress
from bench.load.contract import PackedBackend
from bench.load.registry import foreign_libraries, get_backend
from bench.run.events import Channel
from bench.run.isolation import WatchedVariables
from bench.run.order import Order
from bench.run.telling import Telling

if TYPE_CHECKING:
    import torch

    from bench.load.contract import Backend, Shape
    from bench.load.lora import Adapters
    from bench.load.model import BuiltModel
    from bench.load.weights import Weights
    from bench.probe.memory import MemoryProbe
    from bench.run.training import Trainer
    from bench.run.workload import WorkloadReader

PROGRESS_INTERVAL_SECONDS = 0.2
CALIBRATION_TEXTS = 32
"""Of about 300 tokens each: minutes for a small model on two cores. Published checkpoints use more."""
CALIBRATION_START = 1_000_000


@dataclass
class Loaded:
    """A model ready for its adapters."""

    backend: Backend
    built: BuiltModel
    shapes: dict[str, Shape]
    facts: dict[str, Any]
    """Of the load, for the record."""


class Run:
    """The stages of one run, in order."""

    def __init__(self, order: Order, channel: Channel, watched: WatchedVariables, scratch: Path) -> None:
        self.order = order
        self.scratch = scratch
        self.request = order.request
        self.channel = channel
        self.watched = watched
        self.telling = Telling(channel, order)
        self.pairs = resolve_stress(
            self.request.stress, self.request.model.architecture, self.request.model.layers
        )
        self._last_progress = 0.0

    def prepare(self) -> None:
        """Make the packed checkpoint that a later run reads."""
        self.channel.stage("prepare")
        # gptqmodel writes a folder of logs where it stands; here it goes with the order's scratch folder.
        os.chdir(self.scratch)
        with self.watched:
            self._import_libraries()
            from bench.load.model import linear_shapes
            from bench.load.packed import calibrate_checkpoint, pack_checkpoint

            backend, model, weights = self._open(self.request, self.order.model_folder)
            assert isinstance(backend, PackedBackend)
            assert self.order.packed_folder is not None
            backend.fit(list(linear_shapes(model).values()))
            if self.request.calibration == "calibrated":
                assert self.order.model_folder is not None
                calibrate_checkpoint(
                    backend, self.order.model_folder, self.order.packed_folder, calibration_texts()
                )
            else:
                pack_checkpoint(
                    model,
                    weights,
                    backend,
                    self.request.model.architecture,
                    self.order.packed_folder,
                    self.order.model_folder,
                    self._layer_progress,
                )

    def measure(self) -> None:
        """Load, prove, attach, train, telling each part as it is known."""
        self.channel.stage("load")
        began = time.perf_counter()
        with self.watched:
            self._import_libraries()
        import_seconds = time.perf_counter() - began
        from bench.probe.memory import MemoryProbe
        from bench.run.aftermath import Aftermath

        device = _device(self.request.device)
        probe = MemoryProbe([device])
        loaded = self._load(device, probe, import_seconds)
        self.telling.quantization(loaded.backend, loaded.built, loaded.shapes)
        self.channel.stage("attach")
        adapters = self._attach(loaded, probe)
        self.channel.stage("train")
        trainer = self._train(adapters, loaded, device, probe)
        # Handed over whole: what holds the failing model must be able to let it go.
        aftermath = Aftermath(self, loaded, trainer)
        del loaded, adapters, trainer
        aftermath.compare_with_reference()
        aftermath.investigate()

    def make_reference(self) -> None:
        """Write the gradients of the unquantized model that a later run is compared with."""
        self.channel.stage("prepare")
        with self.watched:
            self._import_libraries()
        from bench.run.fidelity import make_reference

        assert self.order.reference_file is not None
        trainer = self.trainer_of(self.request)
        make_reference(trainer, trainer.reader.next_batch(), self.order.reference_file)

    def trainer_of(self, request: RunRequest) -> Trainer:
        """Another model of this run's worker, ready to train, with nothing that looks on or is recorded."""
        from bench.load.lora import attach
        from bench.load.model import DTYPES
        from bench.run.training import enable_checkpointing, make_trainer

        device = _device(request.device)
        backend, built, _ = self._build(request, device)
        enable_checkpointing(built.model, request.checkpointing)
        adapters = attach(built.model, request.lora, request.seed, DTYPES[backend.dtype], self.pairs)
        return make_trainer(adapters, request, self.reader(), [device], backend.dtype)

    def _import_libraries(self) -> None:
        import torch
        import transformers

        for name in get_backend(self.request.backend).backend.requires:
            __import__(name)
        import peft  # noqa: F401 - measured as part of the import time

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(self.request.cpu_threads)
        torch.manual_seed(self.request.seed)

    def _open(self, request: RunRequest, folder: Path | None) -> tuple[Backend, torch.nn.Module, Weights]:
        """The backend, the model's skeleton and the source of its weights."""
        from bench.ask.models import read_config
        from bench.load.model import skeleton
        from bench.run.attention import implementation

        backend = get_backend(request.backend).create(request.options, request.device, request.dtype)
        if self.order.packed_folder is not None and folder == self.order.packed_folder:
            published = read_config(folder)
            assert isinstance(backend, PackedBackend)
            backend.adopt(published["quantization_config"])
        model = skeleton(dict(request.model.architecture), implementation(request.attention))
        return backend, model, self.source(folder, model)

    def source(self, folder: Path | None, model: torch.nn.Module) -> Weights:
        """The weights in ``folder``, or drawn where there is none; rescaled as ``--stress`` has it."""
        from bench.load.stress import StressedWeights
        from bench.load.weights import CheckpointWeights, SyntheticWeights

        weights: Weights
        if folder is not None:
            weights = CheckpointWeights(folder)
        else:
            shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
            deviation = float(self.request.model.architecture.get("initializer_range", 0.02))
            weights = SyntheticWeights(shapes, deviation)
        return StressedWeights(weights, self.pairs) if self.pairs else weights

    def _build(
        self, request: RunRequest, device: torch.device
    ) -> tuple[Backend, BuiltModel, dict[str, Shape]]:
        from bench.load.model import build_model, linear_shapes
        from bench.run.attention import choose_kernel

        choose_kernel(request.attention)
        backend, model, weights = self._open(request, self.order.packed_folder or self.order.model_folder)
        shapes = linear_shapes(model)
        if not isinstance(backend, PackedBackend):
            backend.fit(list(shapes.values()))
        with self.watched:
            return backend, build_model(model, weights, backend, device, self._layer_progress), shapes

    def _load(self, device: torch.device, probe: MemoryProbe, import_seconds: float) -> Loaded:
        from bench.load.model import unquantized_digest
        from bench.probe.clock import now
        from bench.probe.memory import release_unused

        self._prove_stress()
        began = now([device])
        backend, built, shapes = self._build(self.request, device)
        seconds = now([device]) - began
        host_peak = probe.process_peak_bytes()
        release_unused([device])
        self.channel.send("readings", readings=probe.read("loaded"))
        return Loaded(backend, built, shapes, {
            "import_seconds": import_seconds,
            "load_seconds": seconds,
            "host_peak_bytes": host_peak,
            "weights_digest": unquantized_digest(built),
        })  # fmt: skip

    def _prove_stress(self) -> None:
        """Before anything is measured: the rescaled model is the same function."""
        if not self.pairs:
            return
        from bench.load.model import skeleton
        from bench.load.stress import StressedWeights, prove
        from bench.run.attention import implementation

        model = skeleton(dict(self.request.model.architecture), implementation(self.request.attention))
        dense = self.source(self.order.model_folder, model)
        assert isinstance(dense, StressedWeights)
        # A checkpoint that is published quantized has no dense weights to compute with.
        published = self.request.calibration == "published"
        differences = None if published else prove(model, dense.plain, self.pairs)
        self.telling.stress(self.pairs, differences)

    def _attach(self, loaded: Loaded, probe: MemoryProbe) -> Adapters:
        from bench.load.lora import attach
        from bench.load.model import DTYPES
        from bench.load.proof import frozen_breaches
        from bench.record.schema import Load
        from bench.run.training import enable_checkpointing

        began = time.perf_counter()
        enable_checkpointing(loaded.built.model, self.request.checkpointing)
        dtype = DTYPES[loaded.backend.dtype]
        with self.watched:
            adapters = attach(loaded.built.model, self.request.lora, self.request.seed, dtype, self.pairs)
        self.channel.section("load", Load(**loaded.facts, attach_seconds=time.perf_counter() - began))
        self.telling.lora(adapters)
        self.telling.prove(base_frozen=frozen_breaches(adapters.model, adapters.tensors))
        self.channel.send("readings", readings=probe.read("attached"))
        return adapters

    def reader(self) -> WorkloadReader:
        """The work from its beginning."""
        from bench.run.workload import WorkloadReader, encoder_for

        vocabulary = int(self.request.model.architecture["vocab_size"])
        return WorkloadReader(self.request.workload, encoder_for(self.order.model_folder, vocabulary))

    def _train(self, adapters: Adapters, loaded: Loaded, device: torch.device, probe: MemoryProbe) -> Trainer:
        from bench.load.proof import gradient_breaches
        from bench.probe.environment import describe_environment
        from bench.probe.gradients import all_finite
        from bench.probe.memory import bytes_by_kind, count_gradients
        from bench.probe.weights import non_finite_weights
        from bench.run.training import make_trainer, train
        from bench.run.watch import BadBatch, Watch

        backend = loaded.backend
        libraries = sorted(foreign_libraries(type(backend)) | set(backend.requires))
        self.channel.section(
            "environment",
            describe_environment([device], self.request.versions, libraries, self.watched.changed),
        )
        broken = non_finite_weights(loaded.built)
        self.telling.weights(broken)
        trainer = make_trainer(adapters, self.request, self.reader(), [device], backend.dtype)
        trainer.watch = watch = Watch(
            adapters, loaded.built.layers, broken, device, trainer.dtype, fine=self.request.trace
        )
        gradient_bytes: dict[str, int] = {}

        def check_gradients() -> None:
            gradient_bytes.update(count_gradients(adapters.tensors.values()))
            finite = all_finite(p.grad for p in adapters.tensors.values() if p.grad is not None)
            self.telling.prove(
                gradients_reach_adapters=gradient_breaches(adapters.tensors), first_gradients_finite=finite
            )

        def on_step(step: Any, readings: list[Any]) -> None:
            self.channel.send("step", step=step)
            if readings:
                self.channel.send("readings", readings=readings, phase_step=step.index)
                kinds = bytes_by_kind(
                    loaded.built, backend, adapters.tensors, trainer.optimizer, gradient_bytes
                )
                self.channel.send("bytes_by_kind", value=kinds)
            self.telling.workload(trainer.reader, backend)
            self.telling.failure(watch.finder.found)
            self.channel.send("process_peak", bytes=probe.process_peak_bytes())

        try:
            train(trainer, probe, on_step, check_gradients)
        except BadBatch as error:
            self.telling.failure(error.failure)
            raise
        self.channel.section("trainable_weights_finite", watch.end(self.request.workload.steps - 1))
        self.telling.failure(watch.finder.found)
        return trainer

    def _layer_progress(self, done: int, total: int) -> None:
        if time.monotonic() - self._last_progress > PROGRESS_INTERVAL_SECONDS or done == total:
            self._last_progress = time.monotonic()
            self.channel.send("progress", done=done, total=total)


def calibration_texts() -> list[str]:
    """The texts that packed checkpoints are calibrated on: generated conversations as plain text, from an
    index range that the training does not reach."""
    from bench.run.instructions import conversation

    groups = range(CALIBRATION_START, CALIBRATION_START + 3 * CALIBRATION_TEXTS, 3)
    return [
        "\n".join(message["content"] for index in range(first, first + 3) for message in conversation(index))
        for first in groups
    ]


def _device(kind: str) -> torch.device:
    import torch

    if kind == "cuda" and not torch.cuda.is_available():
        raise RuntimeError("a CUDA device was asked for and torch finds none")
    return torch.device("cuda", 0) if kind == "cuda" else torch.device("cpu")
