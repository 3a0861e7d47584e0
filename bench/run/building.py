"""Building a run's model: skeleton, weights, quantized layers, adapters, optimizer.

One `Builder` a worker. It is used for the run itself, for the unquantized reference, and for the model that
the replay loads again in another dtype.
"""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import nn

from bench.ask.models import read_config
from bench.ask.plan import RunRequest
from bench.ask.stress import resolve_stress
from bench.load.contract import PackedBackend
from bench.load.layout import Layout, Place, spread_layout
from bench.load.lora import attach
from bench.load.model import DTYPES, build_model, linear_shapes, skeleton
from bench.load.registry import get_backend
from bench.load.stored_model import BrokenCache
from bench.load.stress import StressedWeights
from bench.load.weights import CheckpointWeights, RandomCodes, SyntheticWeights
from bench.run.attention import choose_kernel, implementation
from bench.run.distributed import Rank, SharedReader
from bench.run.events import Channel
from bench.run.isolation import WatchedVariables
from bench.run.order import Order
from bench.run.ranks import processes_of
from bench.run.training import enable_checkpointing, make_trainer
from bench.run.workload import WorkloadReader, encoder_for

if TYPE_CHECKING:
    from bench.load.cache import QuantizedCache
    from bench.load.contract import Backend, Shape
    from bench.load.model import BuiltModel
    from bench.load.weights import Weights
    from bench.run.training import Trainer

PROGRESS_INTERVAL_SECONDS = 0.2


class Builder:
    """Builds models for one order. Raises what a backend or a broken checkpoint raises."""

    seconds_apart = 0.0
    """Spent within `build` on what is no part of a load."""

    def __init__(self, order: Order, channel: Channel, watched: WatchedVariables) -> None:
        self.order = order
        self.request = order.request
        self.channel = channel
        self.watched = watched
        architecture = self.request.model.architecture
        self.pairs = resolve_stress(self.request.stress, architecture, self.request.model.layers)
        self._last_progress = 0.0

    def open(
        self, request: RunRequest, folder: Path | None, *, stressed: bool = True
    ) -> tuple[Backend, nn.Module, Weights]:
        """The backend, the model's skeleton and the source of its weights; ``stressed``: as ``--stress``
        rescales them. A packed checkpoint is made of plain ones, and its scales are rescaled when read."""
        backend = get_backend(request.backend).create(request.options, request.device, request.dtype)
        if self.order.packed_folder is not None and folder == self.order.packed_folder:
            published = read_config(folder)
            assert isinstance(backend, PackedBackend)
            backend.adopt(published["quantization_config"])
        backend.placement = request.placement
        model = skeleton(dict(request.model.architecture), implementation(request.attention))
        return backend, model, self.source(folder, model, backend, stressed=stressed)

    def source(
        self, folder: Path | None, model: nn.Module, backend: Backend, *, stressed: bool = True
    ) -> Weights:
        """The weights in ``folder``, or drawn in the shapes of ``model`` where there is none: as codes of
        ``backend``, where its checkpoint would be a packed one and the request says so."""
        weights: Weights
        if folder is not None:
            weights = CheckpointWeights(folder)
        else:
            shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
            deviation = float(self.request.model.architecture.get("initializer_range", 0.02))
            weights = plain = SyntheticWeights(shapes, deviation, self.request.device)
            if self.request.calibration == "random" and isinstance(backend, PackedBackend):
                weights = RandomCodes(plain, backend, linear_shapes(model), deviation)
        return StressedWeights(weights, self.pairs) if self.pairs and stressed else weights

    def build(
        self, request: RunRequest, cache: QuantizedCache | None = None
    ) -> tuple[Backend, BuiltModel, dict[str, Shape]]:
        """The quantized model of a request where its placement says, with the shapes of its linear layers.
        ``cache``: the quantized layers come from there, or are kept there."""
        choose_kernel(request.attention)
        backend, model, weights = self.open(request, self.order.packed_folder or self.order.model_folder)
        shapes = linear_shapes(model)
        if self.order.packed_folder is None or not isinstance(backend, PackedBackend):
            backend.fit(list(shapes.values()))
        layout = layout_of(request, backend)
        with self.watched:
            if cache is not None:
                cache.open(backend, request, shapes, self.pairs)
                try:
                    return backend, build_model(model, weights, backend, layout, self.progress, cache), shapes
                except BrokenCache as error:
                    cache.discard(error)
                model = skeleton(dict(request.model.architecture), implementation(request.attention))
            return backend, build_model(model, weights, backend, layout, self.progress, cache), shapes

    def trainer_of(self, request: RunRequest) -> Trainer:
        """Another model of this run's worker, ready to train, with nothing that looks on or is recorded."""
        backend, built, _ = self.build(request)
        enable_checkpointing(built.model, request.checkpointing)
        adapters = attach(built.model, request.lora, request.seed, DTYPES[backend.dtype], self.pairs)
        return make_trainer(adapters, request, self.reader(), built.layout.devices, backend.dtype)

    def reader(self) -> WorkloadReader:
        """The work from its beginning."""
        vocabulary = int(self.request.model.architecture["vocab_size"])
        encoder = encoder_for(self.order.model_folder, vocabulary)
        if processes_of(self.request) > 1:
            return SharedReader(self.request.workload, encoder, Rank.of_environment())
        return WorkloadReader(self.request.workload, encoder)

    def progress(self, done: int, total: int) -> None:
        """Tell how many layers are done, not too often."""
        if time.monotonic() - self._last_progress > PROGRESS_INTERVAL_SECONDS or done == total:
            self._last_progress = time.monotonic()
            self.channel.send("progress", done=done, total=total)


def is_first(request: RunRequest) -> bool:
    """Whether this process is the only one of its run, or rank 0 of several."""
    return processes_of(request) == 1 or Rank.of_environment().index == 0


def places_of(request: RunRequest) -> list[Place]:
    """The places that the process of a request has for its model. Raises RuntimeError where a device is not
    there."""
    together = processes_of(request) > 1
    wanted = request.device_count if request.placement == "split" else 1
    if request.device == "cpu":
        cpu = torch.device("cpu")
        labels = ["cpu"] if wanted == 1 else [f"cpu:{index}" for index in range(wanted)]
        return [Place(label, cpu) for label in labels]
    found = torch.cuda.device_count()
    if found < request.device_count:
        raise RuntimeError(
            f"{request.device_count} CUDA devices were asked for and torch finds {found or 'none'}"
        )
    first = Rank.of_environment().local if together else 0
    return [Place(f"cuda:{index}", torch.device("cuda", index)) for index in range(first, first + wanted)]


def layout_of(request: RunRequest, backend: Backend) -> Layout:
    """Where the parts of a request's model are. ``backend`` has been fitted to the model's shapes."""
    places = places_of(request)
    return spread_layout(request, backend, places) if len(places) > 1 else Layout(tuple(places))
