"""The stages of one run, inside its worker: prepare, load, attach, train.

Each tells its part of the record as soon as it is known, so a run that ends early loses nothing.
``bench.run.worker`` starts them; torch and everything on top of it is imported here, in the first stage.
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.load.contract import PackedBackend
from bench.load.registry import foreign_libraries, get_backend
from bench.run.events import Channel
from bench.run.isolation import WatchedVariables
from bench.run.order import Order

if TYPE_CHECKING:
    import torch

    from bench.load.contract import Backend
    from bench.load.lora import Adapters
    from bench.load.model import BuiltModel
    from bench.probe.memory import MemoryProbe

PROGRESS_INTERVAL_SECONDS = 0.2
CALIBRATION_TEXTS = 32
"""Of about 300 tokens each: minutes for a small model on two cores. Published checkpoints use more."""
CALIBRATION_START = 1_000_000


class Breach(Exception):
    """What the harness proved to be false: the run must not be measured."""


class Run:
    """The stages of one run, in order."""

    def __init__(self, order: Order, channel: Channel, watched: WatchedVariables, scratch: Path) -> None:
        self.order = order
        self.scratch = scratch
        self.request = order.request
        self.channel = channel
        self.watched = watched
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

            backend, model, weights = self._open(self.order.model_folder)
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

        device = _device(self.request.device)
        probe = MemoryProbe([device])
        backend, built, shapes, load_facts = self._load(device, probe, import_seconds)
        self._tell_quantization(backend, built, shapes)
        self.channel.stage("attach")
        adapters = self._attach(built, backend, load_facts, probe)
        self.channel.stage("train")
        self._train(adapters, built, backend, device, probe)

    def _import_libraries(self) -> None:
        import torch
        import transformers

        for name in get_backend(self.request.backend).backend.requires:
            __import__(name)
        import peft  # noqa: F401 - measured as part of the import time

        transformers.utils.logging.disable_progress_bar()
        torch.set_num_threads(self.request.cpu_threads)
        torch.manual_seed(self.request.seed)

    def _open(self, folder: Path | None) -> tuple[Backend, torch.nn.Module, Any]:
        """The backend, the model's skeleton and the source of its weights."""
        from bench.ask.models import read_config
        from bench.load.model import skeleton
        from bench.load.weights import CheckpointWeights, SyntheticWeights

        request = self.request
        backend = get_backend(request.backend).create(request.options, request.device, request.dtype)
        architecture = dict(request.model.architecture)
        if self.order.packed_folder is not None and folder == self.order.packed_folder:
            published = read_config(folder)
            assert isinstance(backend, PackedBackend)
            backend.adopt(published["quantization_config"])
        model = skeleton(architecture, request.attention)
        if folder is not None:
            return backend, model, CheckpointWeights(folder)
        shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
        return backend, model, SyntheticWeights(shapes, float(architecture.get("initializer_range", 0.02)))

    def _load(
        self, device: torch.device, probe: MemoryProbe, import_seconds: float
    ) -> tuple[Backend, BuiltModel, dict[str, Any], dict[str, Any]]:
        from bench.load.model import build_model, linear_shapes, unquantized_digest
        from bench.probe.clock import now
        from bench.probe.memory import release_unused

        began = now([device])
        backend, model, weights = self._open(self.order.packed_folder or self.order.model_folder)
        shapes = linear_shapes(model)
        if not isinstance(backend, PackedBackend):
            backend.fit(list(shapes.values()))
        with self.watched:
            built = build_model(model, weights, backend, device, self._layer_progress)
        seconds = now([device]) - began
        host_peak = probe.process_peak_bytes()
        release_unused([device])
        self.channel.send("readings", readings=probe.read("loaded"))
        facts = {
            "import_seconds": import_seconds,
            "load_seconds": seconds,
            "host_peak_bytes": host_peak,
            "weights_digest": unquantized_digest(built),
        }
        return backend, built, shapes, facts

    def _tell_quantization(self, backend: Backend, built: BuiltModel, shapes: dict[str, Any]) -> None:
        from bench.ask.packing import read_manifest
        from bench.load.proof import layer_bits, quantization_breaches
        from bench.record.schema import Proof, Quantization

        weights = sum(shape.weights for shape in shapes.values())
        layers = dict(built.quantized())
        manifest = read_manifest(self.order.packed_folder) if self.order.packed_folder else None
        calibration = (
            None if self.order.packed_folder is None else manifest.calibration if manifest else "published"
        )
        self.channel.section(
            "quantization",
            Quantization(
                kernel=", ".join(sorted({backend.kernel(layer) for layer in layers.values()})),
                layers=len(layers),
                weights=weights,
                requested_dtype=self.request.dtype,
                effective_dtype=backend.dtype,
                options=backend.options.model_dump(mode="json"),
                storage_bits_per_weight=sum(
                    layer_bits(layer, shapes[name], backend.codes) * shapes[name].weights
                    for name, layer in layers.items()
                )
                / weights,
                expected_bits_per_weight=sum(
                    backend.expected_bits(shape) * shape.weights for shape in shapes.values()
                )
                / weights,
                calibration=calibration,
                notes=(*backend.notes, *([self.order.note] if self.order.note else [])),
            ),
        )
        breaches = quantization_breaches(built, shapes, backend)
        self._proof = Proof(quantized=not breaches, breaches=tuple(breaches))
        self._prove()

    def _attach(
        self, built: BuiltModel, backend: Backend, load_facts: dict[str, Any], probe: MemoryProbe
    ) -> Adapters:
        from bench.load.lora import attach
        from bench.load.proof import frozen_breaches
        from bench.record.schema import Load, LoraFacts
        from bench.run.training import avoid_unsound_attention, enable_checkpointing

        began = time.perf_counter()
        enable_checkpointing(built.model, self.request.checkpointing)
        avoid_unsound_attention()
        with self.watched:
            adapters = attach(built.model, self.request.lora, self.request.seed)
        self.channel.section("load", Load(**load_facts, attach_seconds=time.perf_counter() - began))
        self.channel.section(
            "lora",
            LoraFacts(
                parameters=sum(p.numel() for p in adapters.tensors.values()),
                tensors=len(adapters.tensors),
                dtype="float32",
                initial_digest=adapters.initial_digest,
                shapes_digest=adapters.shapes_digest,
            ),
        )
        breaches = frozen_breaches(adapters.model, adapters.tensors)
        self._proof = self._proof.model_copy(
            update={"base_frozen": not breaches, "breaches": self._proof.breaches + tuple(breaches)}
        )
        self._prove()
        self.channel.send("readings", readings=probe.read("attached"))
        return adapters

    def _train(
        self,
        adapters: Adapters,
        built: BuiltModel,
        backend: Backend,
        device: torch.device,
        probe: MemoryProbe,
    ) -> None:
        from bench.load.proof import gradient_breaches
        from bench.probe.environment import describe_environment
        from bench.probe.gradients import all_finite
        from bench.probe.memory import bytes_by_kind, count_gradients
        from bench.run.training import make_trainer, train
        from bench.run.workload import WorkloadReader, encoder_for

        self.channel.section(
            "environment",
            describe_environment(
                [device],
                self.request.versions,
                sorted(foreign_libraries(type(backend)) | set(backend.requires)),
                self.watched.changed,
            ),
        )
        reader = WorkloadReader(
            self.request.workload,
            encoder_for(self.order.model_folder, int(self.request.model.architecture["vocab_size"])),
        )
        trainer = make_trainer(adapters, self.request, reader, [device], backend.dtype)

        gradient_bytes: dict[str, int] = {}

        def check_gradients() -> None:
            gradient_bytes.update(count_gradients(adapters.tensors.values()))
            breaches = gradient_breaches(adapters.tensors)
            self._proof = self._proof.model_copy(
                update={
                    "gradients_reach_adapters": not breaches,
                    "first_gradients_finite": all_finite(
                        p.grad for p in adapters.tensors.values() if p.grad is not None
                    ),
                    "breaches": self._proof.breaches + tuple(breaches),
                }
            )
            self._prove()

        def on_step(step: Any, readings: list[Any]) -> None:
            self.channel.send("step", step=step)
            if readings:
                self.channel.send("readings", readings=readings, phase_step=step.index)
                self.channel.send(
                    "bytes_by_kind",
                    value=bytes_by_kind(built, backend, adapters.tensors, trainer.optimizer, gradient_bytes),
                )
            self._tell_workload(reader, backend)
            self.channel.send("process_peak", bytes=probe.process_peak_bytes())

        train(trainer, probe, on_step, check_gradients)
        self.channel.section("trainable_weights_finite", all_finite(adapters.tensors.values()))

    def _tell_workload(self, reader: Any, backend: Backend) -> None:
        from bench.record.schema import WorkloadFacts

        self.channel.section(
            "workload",
            WorkloadFacts(
                source=reader.source,
                tokenizer=reader.tokenizer,
                examples=reader.examples,
                digest=reader.digest,
                tokens=reader.tokens,
                loss_tokens=reader.loss_tokens,
                batches_without_targets=reader.batches_without_targets,
                attention=self.request.attention,
                autocast_dtype=None if backend.dtype == "float32" else backend.dtype,
            ),
        )

    def _prove(self) -> None:
        self.channel.section("proof", self._proof)
        if self._proof.breaches:
            more = len(self._proof.breaches) - 1
            raise Breach(self._proof.breaches[0] + (f" (and {more} more)" if more else ""))

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
