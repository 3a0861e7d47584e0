"""The experiment: everything that is asked for, typed, frozen and validated at once.

``bench.cli`` builds an `Experiment` from a preset and flags with `build_experiment`; every problem in
it is reported together, each with the nearest valid name. ``bench.ask.plan`` turns it into runs.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from bench.errors import BadValue, nearest

Dtype = Literal["bfloat16", "float16", "float32"]
Attention = Literal["sdpa", "sdpa_math", "sdpa_flash", "sdpa_efficient", "eager"]
"""``sdpa``: torch chooses the kernel of its scaled dot product; ``sdpa_*``: that one; ``eager``: unfused."""
Placement = Literal["single", "split", "ddp", "fsdp"]
"""``single``: one device. ``split``: decoder layers spread over the devices of one process, which work one
after another. ``ddp``: a process for each device, each with the whole model and rows of its own. ``fsdp``: so
too, with the frozen weights cut over the devices and gathered layer by layer."""
TARGET_PROJECTIONS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Named, never "all-linear": PEFT's "all-linear" finds nothing under HQQ, whose layer is no nn.Linear."""


class Frozen(BaseModel):
    """Base of all asked-for values: immutable, and a key that does not exist is an error."""

    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        ser_json_inf_nan="strings",
        allow_inf_nan=False,
        use_attribute_docstrings=True,
    )


class Workload(Frozen):
    """What is trained on, and how much of it. Token counts are per optimizer step."""

    sequence_length: Annotated[int, Field(ge=8, le=1_048_576)] = 256
    """Of a row."""
    micro_batch_size: Annotated[int, Field(ge=1, le=4096)] = 1
    """Rows that go through the model at once."""
    gradient_accumulation_steps: Annotated[int, Field(ge=1, le=4096)] = 1
    """Micro-batches of an optimizer step."""
    steps: Annotated[int, Field(ge=1, le=100_000)] = 8
    """Optimizer steps."""
    warmup_steps: Annotated[int, Field(ge=0)] = 2
    """Leading steps that are recorded, marked, and left out of the timing statistics."""
    padding: Literal["packed", "right", "left"] = "packed"
    """``packed``: rows filled with whole conversations end to end; else one conversation a row, padded on
    that side."""
    without_targets: Literal["skip", "train"] = "skip"
    """Micro-batches that hold no answer token: passed over and counted, or trained on as they are (their
    mean loss is NaN; common trainers do that)."""
    data: str | None = None
    """A JSONL file of prompt/response or messages; None: the generated instruction set."""

    @model_validator(mode="after")
    def _some_step_is_measured(self) -> Workload:
        if self.warmup_steps >= self.steps:
            raise ValueError(f"warmup_steps ({self.warmup_steps}) must be below steps ({self.steps})")
        return self


class Lora(Frozen):
    """The adapters, the same for every backend."""

    rank: Annotated[int, Field(ge=1, le=4096)] = 8
    """Of the two matrices."""
    alpha: Annotated[float, Field(gt=0)] = 16.0
    """The adapters' output is scaled by alpha over rank."""
    target_modules: tuple[str, ...] = TARGET_PROJECTIONS
    """Projections that get an adapter."""
    precision: Literal["autocast", "float32", "compute"] = "autocast"
    """``autocast``: weights in float32, products in the compute dtype; ``float32``: both in float32;
    ``compute``: both in the compute dtype."""

    @model_validator(mode="after")
    def _known_targets(self) -> Lora:
        if not self.target_modules:
            raise ValueError("target_modules must name at least one projection")
        for name in self.target_modules:
            if name not in TARGET_PROJECTIONS:
                raise ValueError(
                    f"target_modules: unknown projection '{name}'{_suggest(name, TARGET_PROJECTIONS)}"
                )
        return self


class Optimizer(Frozen):
    """torch.optim.AdamW with a constant learning rate, and clipping by global norm."""

    learning_rate: Annotated[float, Field(gt=0)] = 2e-4
    """Constant over all steps."""
    beta1: Annotated[float, Field(ge=0, lt=1)] = 0.9
    """Decay of the mean of gradients."""
    beta2: Annotated[float, Field(ge=0, lt=1)] = 0.999
    """Decay of the mean of their squares."""
    epsilon: Annotated[float, Field(gt=0)] = 1e-8
    """Added to the denominator."""
    weight_decay: Annotated[float, Field(ge=0)] = 0.0
    """Of the adapters."""
    max_gradient_norm: Annotated[float, Field(gt=0)] | None = 1.0
    """Gradients are scaled down to this global norm; None turns clipping off."""


class Experiment(Frozen):
    """One question asked: which of these backends, on this model, with this work."""

    preset: str
    model: str | None = None
    """A Hub id or a local folder."""
    architecture: Mapping[str, Any] | None = None
    """The model's configuration in the Hub's config.json terms: the shape of synthetic weights."""
    weights: Literal["auto", "real", "synthetic"] = "auto"
    layers: Annotated[int, Field(ge=1)] | None = None
    """Keep only the first N decoder layers; None keeps all."""
    backends: tuple[str, ...]
    options: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    """Backend id -> its options, checked by the adapter."""
    dtype: Dtype = "bfloat16"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    placement: Literal["auto", "single", "split", "ddp", "fsdp"] = "auto"
    """``auto``: one card where every backend fits on it by arithmetic, else split over all cards."""
    device_count: Annotated[int, Field(ge=1, le=1024)] | None = None
    """Devices of one run; None: one for ``single``, else every card of the machine (two on a CPU)."""
    cache: bool = False
    """Keep the quantized model on disk, and load it from there the next time."""
    environment: str | None = None
    """The set of packages that every run takes place in; None: each backend's own."""
    attention: Attention = "sdpa"
    checkpointing: Literal["non_reentrant", "reentrant", "none"] = "non_reentrant"
    workload: Workload = Workload()
    lora: Lora = Lora()
    optimizer: Optimizer = Optimizer()
    stress: Mapping[str, Annotated[float, Field(gt=0)]] = Field(default_factory=dict)
    """Module name or glob -> factor: the layer is multiplied by it and its partner divided by it, so that
    the function stays the same and the numbers on the way do not (``bench.ask.stress``)."""
    trace: bool = False
    """Watch every linear, norm and attention of every step, instead of the places of the always-on probe."""
    fidelity: Literal["auto", "on", "off"] = "auto"
    """Compare the gradient with an unquantized reference's after the training; auto: for real weights."""
    seed: Annotated[int, Field(ge=0, lt=2**31)] = 0
    """Of repeat 0; repeat k has this plus k."""
    repeats: Annotated[int, Field(ge=1, le=1000)] = 1
    first_repeat: Annotated[int, Field(ge=0, le=1_000_000)] = 0
    """Which repeat is the first: a later one by itself, or more of what was run before."""
    timeout_seconds: Annotated[float, Field(gt=0)] = 3600.0
    cpu_threads: Annotated[int, Field(ge=1)] | None = None
    """Threads of torch in each worker; None: every core this process may use."""


SETTABLE = {
    **{f"workload.{name}": None for name in Workload.model_fields},
    **{f"lora.{name}": None for name in Lora.model_fields},
    **{f"optimizer.{name}": None for name in Optimizer.model_fields},
    **dict.fromkeys(("attention", "checkpointing", "device", "cpu_threads", "timeout_seconds", "fidelity")),
    **dict.fromkeys(("placement", "device_count", "cache")),
}
"""Keys that ``--set`` takes, besides ``BACKEND.OPTION``."""


def parse_setting(text: str, backend_ids: Iterable[str]) -> tuple[tuple[str, ...], Any]:
    """Split ``key=value`` into a path and a value (JSON where it parses, else text).

    Raises BadValue when there is no ``=`` or the key does not exist.
    """
    key, sign, value = text.partition("=")
    key = key.strip()
    if not sign or not key:
        raise BadValue(f"--set '{text}' is not KEY=VALUE", "for example --set lora.rank=16")
    head, _, tail = key.partition(".")
    ids = set(backend_ids)
    if key not in SETTABLE and not (head in ids and tail):
        near = nearest(key, [*SETTABLE, *(f"{name}." for name in ids)])
        raise BadValue(
            f"unknown key '{key}' in --set",
            f"did you mean '{near}'?" if near else f"valid: {', '.join(SETTABLE)}, BACKEND.OPTION",
        )
    path = ("options", head, tail) if key not in SETTABLE else tuple(key.split("."))
    return path, _json_or_text(value.strip())


def build_experiment(values: Mapping[str, Any]) -> Experiment:
    """Validate ``values`` into an Experiment; all problems are raised together as one BadValue."""
    try:
        return Experiment.model_validate(values)
    except ValidationError as error:
        raise BadValue("; ".join(describe(error, Experiment))) from None


def describe(error: ValidationError, model: type[BaseModel]) -> list[str]:
    """One sentence for each problem that pydantic found, in the user's words."""
    return [_describe_one(dict(problem), model) for problem in error.errors(include_url=False)]


def _describe_one(problem: dict[str, Any], model: type[BaseModel]) -> str:
    path = [str(part) for part in problem["loc"]]
    name = ".".join(path) if path else model.__name__.lower()
    if problem["type"] == "extra_forbidden":
        return f"unknown key '{name}'{_suggest(path[-1], _fields_at(model, path[:-1]))}"
    message = str(problem["msg"]).removeprefix("Value error, ")
    given = problem.get("input")
    shown = "" if isinstance(given, dict | list | BaseModel) or not path else f" (got {_short(given)})"
    if problem["type"] == "literal_error" and isinstance(given, str):
        choices = str(problem["ctx"]["expected"]).replace("'", "").replace(" or ", ", ").split(", ")
        return f"{name}: '{given}' is not valid{_suggest(given, choices)}; valid: {', '.join(choices)}"
    return f"{name}: {message}{shown}"


def _fields_at(model: type[BaseModel], path: list[str]) -> list[str]:
    for part in path:
        field = model.model_fields.get(part)
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            return []
        model = inner
    return list(model.model_fields)


def _suggest(value: str, choices: Iterable[str]) -> str:
    near = nearest(value, choices)
    return f"; did you mean '{near}'?" if near else ""


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _json_or_text(value: str) -> Any:
    try:
        return json.loads(value)
    except (ValueError, RecursionError):
        return value
