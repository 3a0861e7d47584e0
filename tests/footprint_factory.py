"""Requests and plans for the tests of the memory arithmetic."""

from __future__ import annotations

from typing import Any

from bench.ask.experiment import Workload
from bench.ask.plan import ModelRequest, RunRequest
from bench.ask.preset import load_preset
from bench.ask.shapes import decoder_of
from bench.load.fit import work_of
from bench.load.footprint import Plan
from bench.load.registry import find_backends
from bench.load.sized import SizedModel, layer_shapes
from tests.record_factory import request


def asked(
    backend: str = "bnb-nf4", preset: str = "qwen2-72b", layers: int | None = None, **changes: Any
) -> RunRequest:
    """A run of a preset's shape, 512 tokens a row."""
    architecture = dict(load_preset(preset).architecture or {})
    if layers:
        architecture["num_hidden_layers"] = layers
    values: dict[str, Any] = {
        "model": ModelRequest(name=preset, weights="synthetic", fingerprint="f", architecture=architecture),
        "options": {},
        "workload": Workload(sequence_length=512),
    }
    return request(backend, **(values | changes))


def planned(made: RunRequest, device: str = "cuda") -> Plan:
    """The plan of a request's work on one device."""
    entry = find_backends()[made.backend]
    backend = entry.backend(entry.options(made.options), device, made.dtype)
    decoder = decoder_of(made.model.architecture)
    backend.fit(list(layer_shapes(decoder).values()))
    model = SizedModel.of(decoder, backend)
    return Plan(model, work_of(made, backend, model.width, made.workload.sequence_length))
