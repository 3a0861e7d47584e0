"""The load of one run: ready the kernels, build the model, time each, let go of what the loader left behind.

Used by ``bench.run.stages``. What a cache of quantized layers does besides is timed apart.
"""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

from bench.load.cache import QuantizedCache
from bench.load.contract import Backend, Shape
from bench.load.model import BuiltModel
from bench.load.registry import get_backend
from bench.probe.clock import now
from bench.probe.memory import MemoryProbe, release_unused
from bench.run.building import Builder, is_first


@dataclass
class Loaded:
    """A model ready for its adapters."""

    backend: Backend
    built: BuiltModel
    shapes: dict[str, Shape]
    facts: dict[str, Any]
    """Of the load, for the record."""


def load(builder: Builder, probe: MemoryProbe) -> Loaded:
    """Build the model of the builder's request. Raises what a backend or a broken checkpoint raises."""
    request = builder.request
    kernel_seconds = _ready_kernels(builder, probe)
    cache = None
    if request.cache:
        cache = QuantizedCache(lambda: now(probe.devices), fills=is_first(request))
    with cache or nullcontext():
        began = now(probe.devices)
        backend, built, shapes = builder.build(request, cache)
        seconds = now(probe.devices) - began - builder.seconds_apart
        if cache is not None:
            seconds -= cache.seconds_apart
            cache.finish(seconds)
            backend.notes += cache.notes
    host_peak = probe.process_peak_bytes()
    release_unused(probe.devices)
    facts = {"kernel_seconds": kernel_seconds, "load_seconds": seconds, "host_peak_bytes": host_peak}
    return Loaded(backend, built, shapes, facts | (cache.load if cache is not None else {}))


def _ready_kernels(builder: Builder, probe: MemoryProbe) -> float | None:
    """Seconds, or None where the backend makes nothing ready. Some kernels are compiled where they are first
    used: within the load, a minute of that would be a minute of no quantization."""
    request = builder.request
    backend = get_backend(request.backend).create(request.options, request.device, request.dtype)
    began = now(probe.devices)
    with builder.watched:
        anything = backend.ready_kernels()
    return now(probe.devices) - began if anything else None
