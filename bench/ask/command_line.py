"""The command line that plans a run again, as its record has it.

``command_line(request)`` spells what ``run`` has a flag for, and as ``--set`` whatever differs from what the
preset gives by itself. Where a record lies (``--out``) is no part of what its run is.
"""

from __future__ import annotations

import json
import shlex
from typing import TYPE_CHECKING, Any

from bench.ask.experiment import Experiment
from bench.ask.preset import load_preset
from bench.ask.versions import CURRENT
from bench.errors import UserError

if TYPE_CHECKING:
    from bench.ask.plan import RunRequest

PLAIN = ("attention", "checkpointing", "cpu_threads", "timeout_seconds", "cache")
"""Settings that stand in no group and are the same in a request as in an Experiment."""


def command_line(request: RunRequest) -> str:
    """In one line that a shell reads."""
    return "qlora-bench run " + shlex.join(_flags(request, _of_preset(request.preset)))


def _flags(request: RunRequest, preset: Experiment) -> list[str]:
    model, elsewhere = request.model, request.environment != (preset.environment or CURRENT)
    flags = {
        "preset": request.preset,
        "backend": request.backend,
        "environment": request.environment if elsewhere else None,
        "dtype": request.dtype,
        "device": request.device,
        "model": model.name,
        "weights": model.weights,
        "layers": model.layers,
        "calibration": request.calibration if request.calibration != "published" else None,
        "seed": request.seed - request.repeat,
        "repeats": 1 if preset.repeats != 1 else None,
        "first-repeat": request.repeat if request.repeat != preset.first_repeat else None,
    }
    asked, given = _settable(request), _settable(preset)
    settings = {f"{request.backend}.{name}": value for name, value in request.options.items()}
    settings |= {name: value for name, value in asked.items() if value != given[name]}
    settings["fidelity"] = "on" if request.fidelity else "off"
    # On cards "auto" may choose another placement than was asked for.
    if request.device == "cuda" or request.placement != "single" or preset.placement != "auto":
        settings |= {"placement": request.placement, "device_count": request.device_count}
    spelt = [part for name, value in flags.items() if value is not None for part in (f"--{name}", str(value))]
    for pattern, factor in request.stress.items():
        spelt += ["--stress", f"{pattern}={factor:.17g}"]
    if request.trace:
        spelt.append("--trace")
    for name, value in settings.items():
        spelt += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    return spelt


def _settable(source: RunRequest | Experiment) -> dict[str, Any]:
    """Settings by their ``--set`` names."""
    groups = {"workload": source.workload, "lora": source.lora, "optimizer": source.optimizer}
    settings = {
        f"{group}.{name}": value
        for group, values in groups.items()
        for name, value in values.model_dump(mode="json").items()
    }
    return settings | {name: getattr(source, name) for name in PLAIN}


def _of_preset(name: str) -> Experiment:
    """What the preset gives without any flag; the defaults where its file is not here any more."""
    try:
        values = load_preset(name).experiment_values
    except UserError:
        values = {}
    return Experiment.model_validate({**values, "preset": name, "backends": ()})
