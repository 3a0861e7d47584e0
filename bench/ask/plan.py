"""The plan: an Experiment becomes an ordered list of runs, each with a key that names its record.

Runs are interleaved round by round (repeat 0 of every backend, then repeat 1 ...), so that drift of
the machine hits all backends alike; repeat k of every backend shares seed ``seed + k``.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import shlex
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from bench.ask.experiment import Dtype, Experiment, Frozen, Lora, Optimizer, Workload

HARNESS_LIBRARIES = ("qlora-bench", "torch", "transformers", "peft", "accelerate")


class ModelRequest(Frozen):
    """The model of a run, without any path of this machine."""

    name: str
    """Hub id, or the folder as it was given."""
    weights: Literal["real", "synthetic"]
    fingerprint: str
    """Real: over config.json and each weight file's size, header and ends. Synthetic: over the shape."""
    architecture: Mapping[str, Any]
    layers: Annotated[int, Field(ge=1)] | None = None
    note: str | None = None
    """Why these weights were taken, where that was the project's choice."""


class RunRequest(Frozen):
    """One run: one backend, one seed, one fresh process. Everything that its result depends on."""

    preset: str
    model: ModelRequest
    backend: str
    options: Mapping[str, Any]
    """The backend's options, complete: defaults included."""
    dtype: Dtype
    device: Literal["cpu", "cuda"]
    attention: Literal["sdpa", "eager"]
    checkpointing: Literal["non_reentrant", "reentrant", "none"]
    workload: Workload
    data_digest: str | None = None
    """SHA-256 of the ``workload.data`` file, None for the generated set."""
    lora: Lora
    optimizer: Optimizer
    seed: int
    repeat: Annotated[int, Field(ge=0)]
    timeout_seconds: float
    cpu_threads: Annotated[int, Field(ge=1)]
    versions: Mapping[str, str | None]
    """Library -> version, so that an upgraded library means a new run and not a stale record."""

    @property
    def key(self) -> str:
        """Name of this run's record: readable, and unique for what the result depends on."""
        body = self.model_dump(mode="json", exclude={"timeout_seconds", "preset"})
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return f"{self.backend}-{self.dtype}-r{self.repeat}-{digest[:10]}"

    @property
    def command(self) -> str:
        """The command line that repeats this run."""
        return "qlora-bench run " + shlex.join(_flags(self))


def plan(
    experiment: Experiment,
    model: ModelRequest,
    *,
    device: Literal["cpu", "cuda"],
    cpu_threads: int,
    options: Mapping[str, Mapping[str, Any]],
    libraries: Mapping[str, Sequence[str]],
    data_digest: str | None = None,
) -> list[RunRequest]:
    """Order the runs of ``experiment``.

    ``options``: backend id -> complete options. ``libraries``: backend id -> its distributions, whose
    versions are recorded (None where one is not installed).
    """
    return [
        RunRequest(
            preset=experiment.preset,
            model=model,
            backend=backend,
            options=options[backend],
            dtype=experiment.dtype,
            device=device,
            attention=experiment.attention,
            checkpointing=experiment.checkpointing,
            workload=experiment.workload,
            data_digest=data_digest,
            lora=experiment.lora,
            optimizer=experiment.optimizer,
            seed=experiment.seed + repeat,
            repeat=repeat,
            timeout_seconds=experiment.timeout_seconds,
            cpu_threads=cpu_threads,
            versions=installed_versions([*HARNESS_LIBRARIES, *libraries[backend]]),
        )
        for repeat in range(experiment.repeats)
        for backend in experiment.backends
    ]


def installed_versions(distributions: Sequence[str]) -> dict[str, str | None]:
    """Version of each distribution, None where it is not installed. Nothing is imported."""
    return {name: _version(name) for name in distributions}


def _version(distribution: str) -> str | None:
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def _flags(request: RunRequest) -> list[str]:
    model = request.model
    flags = [
        "--preset",
        request.preset,
        "--backend",
        request.backend,
        "--dtype",
        request.dtype,
        "--device",
        request.device,
        "--weights",
        model.weights,
        "--seed",
        str(request.seed),
        "--model",
        model.name,
    ]
    if model.layers is not None:
        flags += ["--layers", str(model.layers)]
    settings: dict[str, Any] = {
        f"{group}.{name}": value
        for group, value_set in (
            ("workload", request.workload),
            ("lora", request.lora),
            ("optimizer", request.optimizer),
        )
        for name, value in value_set.model_dump(mode="json").items()
        if value != type(value_set)().model_dump(mode="json")[name]
    }
    settings |= {
        f"{request.backend}.{name}": value for name, value in request.options.items() if value is not None
    }
    for name in ("attention", "checkpointing"):
        if getattr(request, name) != Experiment.model_fields[name].default:
            settings[name] = getattr(request, name)
    # The workload is always spelt out: a preset may have set it, and presets may change.
    settings |= {
        f"workload.{name}": getattr(request.workload, name)
        for name in ("sequence_length", "steps", "warmup_steps")
    }
    for name, value in settings.items():
        flags += ["--set", f"{name}={value if isinstance(value, str) else json.dumps(value)}"]
    return flags
