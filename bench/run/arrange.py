"""From what was asked on the command line to a sweep that is ready to run.

Every check that needs no measurement is here, so that bad input ends before anything is written.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bench.ask.conversations import file_digest, read_conversations
from bench.ask.documents import endless_numbers
from bench.ask.experiment import Experiment
from bench.ask.packing import CALIBRATIONS
from bench.ask.placement import place
from bench.ask.plan import ModelRequest, RunRequest, plan
from bench.ask.preset import Preset
from bench.ask.slices import Slice
from bench.ask.stress import resolve_stress
from bench.errors import BadValue, unknown
from bench.load.registry import find_backends
from bench.probe.machine import cuda_devices, device_memory_bytes, usable_cores
from bench.record.store import Store
from bench.run.asked import Asked, experiment_of
from bench.run.environments import environment_of, versions_of
from bench.run.placing import cards_on_cluster, refuse_placement, settle
from bench.run.sources import find_sources
from bench.run.sweep import Sweep

DEFAULT_OUT = Path("results/local")
@dataclass(frozen=True)
class Arranged:
    """A sweep, and the line that says what it is."""

    sweep: Sweep
    headline: str
    plan: Sequence[RunRequest]
    """Of which the sweep may be a slice."""
    own: Slice | None
    """Which; None: it is the whole."""


def arrange(asked: Asked) -> Arranged:
    """Everything of ``run`` that can fail because of what was asked, before anything is written.

    Raises UserError for all that is wrong with it.
    """
    calibration = next((name for name in CALIBRATIONS if name == asked.calibration), None)
    if calibration is None:
        raise unknown("calibration", asked.calibration, CALIBRATIONS)
    own = None if asked.shard is None else Slice.parse(asked.shard)
    entries = find_backends()
    experiment, preset, why = experiment_of(asked, entries)
    digest = None
    if experiment.workload.data is not None:
        if not experiment.workload.data:  # as a path, '' is the folder one stands in
            raise BadValue("workload.data is empty: expected the path of a JSONL file")
        read_conversations(Path(experiment.workload.data))
        digest = file_digest(Path(experiment.workload.data))
    refuse_placement(experiment, entries)
    sources = find_sources(experiment, preset, entries, calibration, download=asked.download)
    models = {name: source.model.request for name, source in sources.items()}
    for model in models.values():
        resolve_stress(experiment.stress, model.architecture, model.layers)
    elsewhere, cards = asked.executor != "local", len(cuda_devices())
    if elsewhere:
        cards = cards_on_cluster(experiment, asked.gpus_per_run, cards)
    device = _device(experiment.device, has_cuda=cards > 0)
    environments = {name: environment_of(entries[name], experiment.environment) for name in sources}
    placement, device_count = place(experiment, device, cards)
    requests = plan(
        experiment,
        models,
        device=device,
        placement=placement,
        device_count=device_count,
        cpu_threads=experiment.cpu_threads or usable_cores(),
        options={
            name: entries[name].options(_options(name, experiment, preset, models)).model_dump(mode="json")
            for name in experiment.backends
        },
        data_digest=digest,
        calibrations={name: source.calibration for name, source in sources.items()},
        environments=environments,
        versions=versions_of(entries, environments),
    )
    for request in {request.backend: request for request in requests}.values():
        _refuse_what_no_record_holds(request)
    placed = ""
    if experiment.placement == "auto" and experiment.device_count is None and not elsewhere:
        requests, placed = settle(requests, cuda_devices())
    out = asked.out or DEFAULT_OUT / Path(experiment.preset).stem
    if own is not None:
        out /= own.folder_name
    sweep = Sweep(
        own.of(requests) if own else requests,
        sources,
        entries,
        Store(out),
        memory_bytes=None if elsewhere else device_memory_bytes(device),
        force=asked.force,
    )
    headline = (
        f"preset {experiment.preset}{why}: {_models_in_words(sweep)}, on {device}{placed}; "
        f"{_counted(sweep, requests, own)} of {experiment.workload.steps} steps"
    )
    return Arranged(sweep, headline, requests, own)


def _refuse_what_no_record_holds(request: RunRequest) -> None:
    """Raise BadValue for a whole number that could be run, and whose record could not be read again."""
    for path in endless_numbers(request.model_dump()):
        name = path.replace("options.", f"{request.backend}.", 1) if path.startswith("options.") else path
        raise BadValue(f"{name}: a whole number of more than 64 bits cannot be recorded")


def _options(
    backend: str, experiment: Experiment, preset: Preset, models: Mapping[str, ModelRequest]
) -> dict[str, Any]:
    """The options of a backend: what was asked for, over what the preset has for synthetic weights."""
    synthetic = models[backend].weights == "synthetic"
    return {
        **(preset.synthetic_options.get(backend, {}) if synthetic else {}),
        **experiment.options.get(backend, {}),
    }


def _counted(sweep: Sweep, requests: Sequence[RunRequest], own: Slice | None) -> str:
    part = f"{own}: {len(sweep.requests)} of " if own else ""
    return f"{part}{len(requests)} runs"


def _models_in_words(sweep: Sweep) -> str:
    """The model that is meant, and which backends read another."""
    meant = sweep.model.request
    note = f" ({meant.note})" if meant.note else ""
    others = [
        f"; {name} reads {source.model.request.name}"
        for name, source in sweep.sources.items()
        if source.model.request.name != meant.name
    ]
    return f"{meant.name}, {meant.weights} weights{note}{''.join(others)}"


def _device(wanted: str, *, has_cuda: bool) -> Literal["cpu", "cuda"]:
    if wanted == "cuda" and not has_cuda:
        raise BadValue("--device cuda: no CUDA device was found", "use --device cpu")
    return "cuda" if has_cuda and wanted != "cpu" else "cpu"
