"""The plan: an Experiment becomes an ordered list of runs, each with a key that names its record.

Runs are interleaved round by round (repeat 0 of every backend, then repeat 1 ...), so that drift of
the machine hits all backends alike; repeat k of every backend shares seed ``seed + k``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import Field

from bench.ask.command_line import command_line
from bench.ask.experiment import (
    Attention,
    Dtype,
    Experiment,
    Frozen,
    Lora,
    Optimizer,
    Placement,
    Workload,
)
from bench.ask.versions import CURRENT

LATER_FIELDS = (
    "stress",
    "trace",
    "fidelity",
    "lora.precision",
    "workload.without_targets",
    "placement",
    "device_count",
    "cache",
    "environment",
)
"""Fields that requests did not have at first. At their default they are left out of the key, so that a
record made before stays the record of its run."""


class ModelRequest(Frozen):
    """The model of a run, without any path of this machine."""

    name: str
    """Hub id, or the folder as it was given."""
    weights: Literal["real", "synthetic"]
    """Read from files, or drawn at random in the model's exact shape."""
    fingerprint: str
    """Real: over config.json and each weight file's size, header and ends. Synthetic: over the shape."""
    architecture: Mapping[str, Any]
    """Its configuration in the Hub's config.json terms, cut to the layers that are kept."""
    layers: Annotated[int, Field(ge=1)] | None = None
    """Only the first so many decoder layers are kept; null: all."""
    note: str | None = None
    """Why these weights were taken, where that was the project's choice."""


class RunRequest(Frozen):
    """One run: one backend, one seed, one fresh process. Everything that its result depends on."""

    preset: str
    """What the run was planned from."""
    model: ModelRequest
    backend: str
    """Id of the backend."""
    environment: str = CURRENT
    """The named set of packages that it runs in; "current": that of the command."""
    options: Mapping[str, Any]
    """The backend's options, complete: defaults included."""
    calibration: Literal["rtn", "calibrated", "published", "random"] | None = None
    """How the packed checkpoint is made, that it is read as published, or that there is none and codes are
    drawn at random; None: quantized on load."""
    dtype: Dtype
    """Compute dtype that was asked for."""
    device: Literal["cpu", "cuda"]
    """On which it runs."""
    placement: Placement = "single"
    """How it uses devices: one, layers spread over several, or a process for each."""
    device_count: Annotated[int, Field(ge=1)] = 1
    """Devices of this run: of its one process, or one for each of its processes."""
    cache: bool = False
    """Whether the quantized model is kept on disk and loaded from there."""
    attention: Attention
    """The attention that was asked for."""
    checkpointing: Literal["non_reentrant", "reentrant", "none"]
    """How activations are recomputed in the backward."""
    workload: Workload
    data_digest: str | None = None
    """SHA-256 of the ``workload.data`` file, None for the generated set."""
    lora: Lora
    optimizer: Optimizer
    stress: Mapping[str, float] = Field(default_factory=dict)
    """Module name or glob -> factor by which the layer is rescaled against its partner."""
    trace: bool = False
    """Whether every linear, norm and attention is watched."""
    fidelity: bool = False
    """Whether the gradient is compared with an unquantized reference's."""
    seed: int
    """Of the adapters' initial values, and of torch's generator."""
    repeat: Annotated[int, Field(ge=0)]
    """Which round of the experiment, from 0."""
    timeout_seconds: float
    """Limit of the run."""
    cpu_threads: Annotated[int, Field(ge=1)]
    """Threads of torch in each process."""
    versions: Mapping[str, str | None]
    """Library -> version, so that an upgraded library means a new run and not a stale record."""

    @property
    def key(self) -> str:
        """Name of this run's record: readable, and unique for what the result depends on."""
        # Left out: what says how the run was asked for and changes nothing of what it does.
        body = self.model_dump(
            mode="json", exclude={"timeout_seconds": True, "preset": True, "model": {"note"}}
        )
        for path in LATER_FIELDS:
            _drop_default(body, path.split("."), self)
        digest = hashlib.sha256(json.dumps(body, sort_keys=True).encode()).hexdigest()
        return f"{self.backend}-{self.dtype}-r{self.repeat}-{digest[:10]}"

    @property
    def command(self) -> str:
        """The command line that repeats this run."""
        return command_line(self)


def plan(  # noqa: PLR0913 - everything a run depends on, from many hands
    experiment: Experiment,
    models: Mapping[str, ModelRequest],
    *,
    device: Literal["cpu", "cuda"],
    placement: Placement = "single",
    device_count: int = 1,
    cpu_threads: int,
    options: Mapping[str, Mapping[str, Any]],
    environments: Mapping[str, str],
    versions: Mapping[str, Mapping[str, str | None]],
    calibrations: Mapping[str, Literal["rtn", "calibrated", "published", "random"] | None],
    data_digest: str | None = None,
) -> list[RunRequest]:
    """Order the runs of ``experiment``.

    ``models``: backend id -> its model. ``options``: backend id -> complete options. ``environments``:
    backend id -> where it runs. ``versions``: backend id -> version of each library in play (None where one
    is not installed). ``calibrations``: backend id -> how its packed checkpoint comes to be.
    """
    return [
        RunRequest(
            preset=experiment.preset,
            model=models[backend],
            backend=backend,
            environment=environments[backend],
            options=options[backend],
            calibration=calibrations[backend],
            dtype=experiment.dtype,
            device=device,
            placement=placement,
            device_count=device_count,
            cache=experiment.cache,
            attention=experiment.attention,
            checkpointing=experiment.checkpointing,
            workload=experiment.workload,
            data_digest=data_digest,
            lora=experiment.lora,
            optimizer=experiment.optimizer,
            stress=experiment.stress,
            trace=experiment.trace,
            fidelity=experiment.fidelity == "on"
            or (experiment.fidelity == "auto" and models[backend].weights == "real"),
            seed=experiment.seed + repeat,
            repeat=repeat,
            timeout_seconds=experiment.timeout_seconds,
            cpu_threads=cpu_threads,
            versions=versions[backend],
        )
        for repeat in range(experiment.first_repeat, experiment.first_repeat + experiment.repeats)
        for backend in experiment.backends
    ]


def _drop_default(body: dict[str, Any], path: Sequence[str], request: RunRequest) -> None:
    *groups, last = path
    kind: Any = type(request)
    for group in groups:
        body, kind = body[group], kind.model_fields[group].annotation
    if body[last] == kind.model_fields[last].get_default(call_default_factory=True):
        del body[last]
