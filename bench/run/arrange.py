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
from bench.ask.experiment import Experiment, build_experiment, parse_setting
from bench.ask.packing import CALIBRATIONS
from bench.ask.placement import place
from bench.ask.plan import ModelRequest, RunRequest, plan
from bench.ask.preset import AUTOMATIC, Preset, choose_preset, load_preset
from bench.ask.slices import Slice
from bench.ask.stress import parse_stress, resolve_stress
from bench.ask.versions import CURRENT
from bench.errors import BadValue, unknown
from bench.load.registry import Entry, find_backends
from bench.probe.machine import cuda_devices, device_memory_bytes, usable_cores
from bench.record.store import Store
from bench.run.environments import environment_of, runs_in, versions_of
from bench.run.placing import cards_on_cluster, refuse_placement, settle
from bench.run.sources import find_sources
from bench.run.sweep import Sweep

DEFAULT_OUT = Path("results/local")
FLAGS = (
    "dtype",
    "device",
    "placement",
    "device_count",
    "environment",
    "model",
    "weights",
    "layers",
    "repeats",
    "first_repeat",
    "seed",
    "timeout_seconds",
)
"""Flags that are named as the values of an Experiment they set."""


@dataclass(frozen=True)
class Asked:
    """The flags of ``run``; None: not given, so the preset or the default decides."""

    preset: str = AUTOMATIC
    backends: tuple[str, ...] = ()
    dtype: str | None = None
    device: str | None = None
    model: str | None = None
    weights: str | None = None
    placement: str | None = None
    device_count: int | None = None
    environment: str | None = None
    layers: int | None = None
    steps: int | None = None
    repeats: int | None = None
    first_repeat: int | None = None
    seed: int | None = None
    data: str | None = None
    calibration: str = "auto"
    timeout_seconds: float | None = None
    stress: tuple[str, ...] = ()
    trace: bool = False
    settings: tuple[str, ...] = ()
    out: Path | None = None
    cache: bool = False
    download: bool = False
    force: bool = False
    shard: str | None = None
    """``I/N``: only the I-th of N slices of the plan."""
    executor: str = "local"
    """``ray``: the runs are on other machines, whose cards and memory are not this one's."""
    gpus_per_run: int | None = None


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
    experiment, preset, why = _experiment(asked, entries)
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


def _experiment(asked: Asked, entries: dict[str, Entry]) -> tuple[Experiment, Preset, str]:
    """The validated experiment, its preset, and why that was chosen."""
    name, why = asked.preset, ""
    if name == AUTOMATIC:
        name, reason = choose_preset([c.total_memory_bytes for c in cuda_devices() if c.total_memory_bytes])
        why = f" (chosen: {reason})"
    preset = load_preset(name)
    environment = asked.environment or preset.experiment_values.get("environment") or CURRENT
    values: dict[str, Any] = {
        **preset.experiment_values,
        "preset": name,
        "architecture": preset.architecture,
        "backends": _backend_ids(
            asked.backends or preset.experiment_values.get("backends", ()), entries, environment
        ),
    }
    if asked.model == "":
        raise BadValue("--model is empty: expected a Hub id or a folder")
    for flag in FLAGS:
        if getattr(asked, flag) is not None:
            values[flag] = getattr(asked, flag)
    for flag in ("steps", "data"):
        if getattr(asked, flag) is not None:
            _put(values, ("workload", flag), getattr(asked, flag))
    if asked.cache:
        values["cache"] = True
    if asked.stress:
        values["stress"] = parse_stress(asked.stress)
    if asked.trace:
        values["trace"] = True
    for text in asked.settings:
        path, value = parse_setting(text, entries)
        _put(values, path, value)
    experiment = build_experiment(values)
    for known in (*experiment.options, *preset.synthetic_options):
        if known not in entries:
            raise unknown(f"backend in the options of preset '{name}'", known, entries)
    return experiment, preset, why


def _backend_ids(given: Sequence[str], entries: dict[str, Entry], environment: str) -> list[str]:
    """The ids that were given; none: all. ``all``: those that run in the environment, so that what it means
    does not depend on what else was built on a machine."""
    names = [name for text in given for name in text.split(",") if name]
    if given and not names:
        raise BadValue("--backend is empty: expected the id of a backend", "or 'all'")
    names = names or ["all"]
    chosen: list[str] = []
    for name in names:
        if name != "all" and name not in entries:
            raise unknown("backend", name, [*entries, "all"])
        every = (n for n in entries if runs_in(entries[n], environment)) if name == "all" else [name]
        chosen += [n for n in every if n not in chosen]
    if not chosen:
        raise BadValue(
            f"no backend says that it runs in environment '{environment}'",
            "name the backends with --backend, or in its environment.toml",
        )
    return chosen


def _put(values: dict[str, Any], path: tuple[str, ...], value: Any) -> None:
    """Set a nested value without changing dictionaries that belong to somebody else."""
    *groups, last = path
    for group in groups:
        inner = values.get(group) or {}
        if not isinstance(inner, dict):
            raise BadValue(f"'{group}' is not a table")
        values[group] = dict(inner)
        values = values[group]
    values[last] = value


def _device(wanted: str, *, has_cuda: bool) -> Literal["cpu", "cuda"]:
    if wanted == "cuda" and not has_cuda:
        raise BadValue("--device cuda: no CUDA device was found", "use --device cpu")
    return "cuda" if has_cuda and wanted != "cpu" else "cpu"
