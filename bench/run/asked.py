"""What was asked on the command line as an experiment: a preset, and what flags and ``--set`` change."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.ask.experiment import Experiment, build_experiment, parse_setting
from bench.ask.preset import AUTOMATIC, Preset, choose_preset, load_preset
from bench.ask.stress import parse_stress
from bench.ask.versions import CURRENT
from bench.errors import BadValue, unknown
from bench.load.registry import Entry
from bench.probe.machine import cuda_devices
from bench.run.environments import runs_in

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


def experiment_of(asked: Asked, entries: dict[str, Entry]) -> tuple[Experiment, Preset, str]:
    """The validated experiment, its preset, and why that was chosen.

    Raises UserError for all that is wrong with it.
    """
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
