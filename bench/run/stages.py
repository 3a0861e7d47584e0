"""The stages of one run, inside its worker: prepare, load, attach, train, and what is looked into afterwards.

Each tells its part of the record as soon as it is known (``bench.run.telling``), so a run that ends early
loses nothing. ``bench.run.worker`` starts them; torch and everything on top of it is imported here, in the
first stage.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.ask.stress import Pair
from bench.load.contract import PackedBackend
from bench.load.registry import foreign_libraries, get_backend
from bench.probe.collector import no_full_collections
from bench.run.events import Channel
from bench.run.isolation import WatchedVariables
from bench.run.order import Order
from bench.run.telling import Telling

if TYPE_CHECKING:
    from bench.load.lora import Adapters
    from bench.probe.memory import MemoryProbe
    from bench.run.building import Builder
    from bench.run.distributed import Tie
    from bench.run.loading import Loaded
    from bench.run.training import Trainer
    from bench.run.workload import WorkloadReader


class Run:
    """The stages of one run, in order."""

    def __init__(self, order: Order, channel: Channel, watched: WatchedVariables, scratch: Path) -> None:
        self.order = order
        self.scratch = scratch
        self.request = order.request
        self.channel = channel
        self.watched = watched
        self.telling = Telling(channel, order)

    def prepare(self) -> None:
        """Make the packed checkpoint that a later run reads."""
        self.channel.stage("prepare")
        # gptqmodel writes a folder of logs where it stands; here it goes with the order's scratch folder.
        os.chdir(self.scratch)
        with self.watched:
            self._import_libraries()
            from bench.load.model import linear_shapes
            from bench.load.packed import calibrate_checkpoint, pack_checkpoint
            from bench.run.instructions import calibration_texts

            builder = self._builder()
            backend, model, weights = builder.open(self.request, self.order.model_folder, stressed=False)
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
                    builder.progress,
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
        from bench.run.building import places_of

        devices = list(dict.fromkeys(place.device for place in places_of(self.request)))
        builder, probe = self._builder(), MemoryProbe(devices)
        self._prove_stress(builder)
        loaded = self._load(builder, probe, import_seconds)
        self.telling.placement(loaded.built)
        self.telling.quantization(loaded.backend, loaded.built, loaded.shapes)
        self.channel.stage("attach")
        adapters = self._attach(loaded, builder.pairs, probe)
        self.channel.stage("train")
        trainer = self._train(adapters, loaded, builder.reader(), probe)
        if self.take_leave(trainer):
            return
        # Whatever becomes of what follows, this run is complete.
        self.channel.send("outcome", status="completed", message=None)
        # Handed over whole: what holds the failing model must be able to let it go.
        aftermath = Aftermath(builder, self.telling, loaded, trainer)
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
        trainer = self._builder().trainer_of(self.request)
        make_reference(trainer, trainer.reader.next_batch(), self.order.reference_file)

    def take_leave(self, trainer: Trainer) -> bool:
        """Once the steps are done. Returns whether that was all: ranks do not look back."""
        return False

    def tie(self, adapters: Adapters) -> Tie | None:
        """What makes one training of several processes' (``bench.run.rank_run``); None: there is one."""
        return None

    def _builder(self) -> Builder:
        from bench.run.building import Builder

        return Builder(self.order, self.channel, self.watched)

    def _import_libraries(self) -> None:
        with no_full_collections():
            import torch
            import transformers

            for name in get_backend(self.request.backend).backend.requires:
                __import__(name)
            import peft  # noqa: F401 - measured as part of the import time

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(self.request.cpu_threads)
        torch.manual_seed(self.request.seed)

    def _load(self, builder: Builder, probe: MemoryProbe, import_seconds: float) -> Loaded:
        from bench.load.model import unquantized_digest
        from bench.run.loading import load

        loaded = load(builder, probe)
        # Read before the digest, which copies.
        self.channel.send("readings", readings=probe.read("loaded"))
        digest = unquantized_digest(loaded.built)
        loaded.facts |= {"import_seconds": import_seconds, "weights_digest": digest}
        return loaded

    def _prove_stress(self, builder: Builder) -> None:
        """Before anything is measured: the rescaled model is the same function."""
        if not builder.pairs:
            return
        from bench.load.stress import prove

        # A checkpoint that is published quantized has no dense weights to compute with.
        differences = None
        if self.request.calibration not in ("published", "random"):
            _, model, dense = builder.open(self.request, self.order.model_folder, stressed=False)
            differences = prove(model, dense, builder.pairs)
        self.telling.stress(builder.pairs, differences)

    def _attach(self, loaded: Loaded, pairs: Sequence[Pair], probe: MemoryProbe) -> Adapters:
        from bench.load.lora import attach
        from bench.load.model import DTYPES
        from bench.load.proof import frozen_breaches
        from bench.record.schema import Load
        from bench.run.training import enable_checkpointing

        began = time.perf_counter()
        enable_checkpointing(loaded.built.model, self.request.checkpointing)
        dtype = DTYPES[loaded.backend.dtype]
        with self.watched:
            adapters = attach(loaded.built.model, self.request.lora, self.request.seed, dtype, pairs)
        self.channel.section("load", Load(**loaded.facts, attach_seconds=time.perf_counter() - began))
        self.telling.lora(adapters)
        self.telling.prove(base_frozen=frozen_breaches(adapters.model, adapters.tensors))
        self.channel.send("readings", readings=probe.read("attached"))
        return adapters

    def _train(
        self, adapters: Adapters, loaded: Loaded, reader: WorkloadReader, probe: MemoryProbe
    ) -> Trainer:
        from bench.load.proof import gradient_breaches
        from bench.probe.allocator import AllocatorTrouble
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
            describe_environment(probe.devices, self.request.versions, libraries, self.watched.changed),
        )
        broken = non_finite_weights(loaded.built)
        self.telling.weights(broken)
        trainer = make_trainer(adapters, self.request, reader, probe.devices, backend.dtype)
        trainer.tie = self.tie(adapters)
        trainer.watch = watch = Watch(
            adapters, loaded.built.layers, broken, probe.devices[0], trainer.dtype, fine=self.request.trace
        )
        gradient_bytes: dict[str, int] = {}
        trouble = AllocatorTrouble(probe.devices)

        def check_gradients() -> None:
            gradient_bytes.update(count_gradients(adapters.tensors, loaded.built.layout))
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
            self.telling.consumed(trainer.reader.share_digest, watch.consumed.digest)
            self.telling.failure(watch.finder.found)
            self.channel.send("process_peak", bytes=probe.process_peak_bytes())
            counts = trouble.after_step(warmup=step.warmup)
            if counts is not None:
                self.channel.send("allocator", counts=counts)

        try:
            train(trainer, probe, on_step, check_gradients)
        except BadBatch as error:
            self.telling.failure(error.failure)
            raise
        self.channel.section("trainable_weights_finite", watch.end(self.request.workload.steps - 1))
        self.telling.failure(watch.finder.found)
        return trainer
