"""From what was asked on the command line to a sweep that is ready to run.

Every check that needs no measurement is here, so that bad input ends before anything is written.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import psutil

from bench.ask.conversations import file_digest, read_conversations
from bench.ask.experiment import Experiment, build_experiment, parse_setting
from bench.ask.models import resolve_model
from bench.ask.packing import CALIBRATIONS, decide_calibration
from bench.ask.placement import count_devices
from bench.ask.plan import plan
from bench.ask.preset import AUTOMATIC, Preset, choose_preset, load_preset
from bench.ask.stress import parse_stress, resolve_stress
from bench.errors import BadValue, unknown
from bench.load.contract import PackedBackend
from bench.load.registry import Entry, find_backends
from bench.probe.machine import cuda_devices, usable_cores
from bench.record.store import Store
from bench.run.sweep import Sweep

DEFAULT_OUT = Path("results/local")
FLAGS = (
    "dtype",
    "device",
    "placement",
    "device_count",
    "model",
    "weights",
    "layers",
    "repeats",
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
    layers: int | None = None
    steps: int | None = None
    repeats: int | None = None
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


@dataclass(frozen=True)
class Arranged:
    """A sweep, and the line that says what it is."""

    sweep: Sweep
    headline: str


def arrange(asked: Asked) -> Arranged:
    """Everything of ``run`` that can fail because of what was asked, before anything is written.

    Raises UserError for all that is wrong with it.
    """
    calibration = next((name for name in CALIBRATIONS if name == asked.calibration), None)
    if calibration is None:
        raise unknown("calibration", asked.calibration, CALIBRATIONS)
    entries = find_backends()
    experiment, preset, why = _experiment(asked, entries)
    backend_options = {
        name: entries[name].options(experiment.options.get(name, {})).model_dump(mode="json")
        for name in experiment.backends
    }
    digest = None
    if experiment.workload.data is not None:
        read_conversations(Path(experiment.workload.data))
        digest = file_digest(Path(experiment.workload.data))
    _refuse_placement(experiment, entries)
    model = resolve_model(experiment, preset_model=preset.model, download=asked.download)
    resolve_stress(experiment.stress, model.request.architecture, model.request.layers)
    device = _device(experiment.device, has_cuda=bool(cuda_devices()))
    device_count = count_devices(experiment, device, len(cuda_devices()))
    method, calibration_note = decide_calibration(model.request, calibration, preset.calibration)
    packed = {name for name in experiment.backends if issubclass(entries[name].backend, PackedBackend)}
    requests = plan(
        experiment,
        model.request,
        device=device,
        device_count=device_count,
        cpu_threads=experiment.cpu_threads or usable_cores(),
        options=backend_options,
        data_digest=digest,
        calibrations={name: method if name in packed else None for name in experiment.backends},
        libraries={name: entries[name].backend.requires for name in experiment.backends},
    )
    out = asked.out or DEFAULT_OUT / Path(experiment.preset).stem
    note = f" ({model.request.note})" if model.request.note else ""
    headline = (
        f"preset {experiment.preset}{why}: {model.request.name}, {model.request.weights} weights{note}, "
        f"on {device}; {len(requests)} runs of {experiment.workload.steps} steps"
    )
    sweep = Sweep(
        requests,
        model,
        entries,
        Store(out),
        memory_bytes=_memory_bytes(device),
        calibration_note=calibration_note,
        force=asked.force,
    )
    return Arranged(sweep, headline)


def _refuse_placement(experiment: Experiment, entries: dict[str, Entry]) -> None:
    """Raise BadValue where the placement is possible with no backend that was asked for. Where it is with
    some, the others become rows that say why."""
    placement = experiment.placement
    refused = {name: entries[name].backend.refused_placements.get(placement) for name in experiment.backends}
    if all(refused.values()):
        able = [n for n, entry in entries.items() if placement not in entry.backend.refused_placements]
        raise BadValue(
            f"--placement {placement} is not possible with {', '.join(refused)}: "
            f"{next(iter(refused.values()))}",
            f"possible with: {', '.join(able)}" if able else None,
        )


def _memory_bytes(device: str) -> int | None:
    """Of the largest card, or of the machine."""
    if device == "cuda":
        return max((card.total_memory_bytes or 0 for card in cuda_devices()), default=0) or None
    return int(psutil.virtual_memory().total)


def _experiment(asked: Asked, entries: dict[str, Entry]) -> tuple[Experiment, Preset, str]:
    """The validated experiment, its preset, and why that was chosen."""
    name, why = asked.preset, ""
    if name == AUTOMATIC:
        memory = max((c.total_memory_bytes for c in cuda_devices() if c.total_memory_bytes), default=None)
        name, reason = choose_preset(memory)
        why = f" (chosen: {reason})"
    preset = load_preset(name)
    values: dict[str, Any] = {
        **preset.experiment_values,
        "preset": name,
        "architecture": preset.architecture,
        "backends": _backend_ids(asked.backends, entries),
    }
    for flag in FLAGS:
        if getattr(asked, flag) is not None:
            values[flag] = getattr(asked, flag)
    for flag in ("steps", "data"):
        if getattr(asked, flag) is not None:
            _put(values, ("workload", flag), getattr(asked, flag))
    if asked.cache:
        values["cache"] = True
    values["stress"], values["trace"] = parse_stress(asked.stress), asked.trace
    for text in asked.settings:
        path, value = parse_setting(text, entries)
        _put(values, path, value)
    return build_experiment(values), preset, why


def _backend_ids(given: Sequence[str], entries: dict[str, Entry]) -> list[str]:
    names = [name for text in given for name in text.split(",") if name] or ["all"]
    chosen: list[str] = []
    for name in names:
        if name != "all" and name not in entries:
            raise unknown("backend", name, [*entries, "all"])
        chosen += [n for n in (entries if name == "all" else [name]) if n not in chosen]
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
