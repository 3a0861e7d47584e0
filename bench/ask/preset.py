"""Presets: the TOML files of ``bench/ask/presets``, or one of the user's own.

A preset names a model, knows its shape (so that memory and speed can be measured without its weights)
and sets the workload where the defaults do not fit. Flags and ``--set`` override it.
"""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping, Sequence
from importlib import resources
from pathlib import Path
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from bench.ask.experiment import Experiment, Frozen, describe
from bench.ask.shapes import size_problem
from bench.errors import BadValue, BrokenFile, unknown

AUTOMATIC = "auto"
FALLBACK = "proxy"


class Preset(Frozen):
    """One preset file. Whatever an Experiment has besides these keys can be set in it too."""

    model_config = ConfigDict(frozen=True, extra="allow")

    description: str
    model: str | None = None
    architecture: Mapping[str, Any] | None = None
    calibration: Literal["auto", "random"] = "auto"
    """How packed formats of synthetic weights come to be where --calibration does not say."""
    published: Mapping[str, str] = Field(default_factory=dict)
    """Quantization method -> checkpoint of this model that is published packed so: a Hub id or a folder."""
    synthetic_options: Mapping[str, Mapping[str, Any]] = Field(default_factory=dict)
    """Backend id -> options where its weights are synthetic, unless others are asked for."""
    needs_cuda_gib: float | None = Field(default=None, gt=0)
    """Memory of the cards that hold it in 4 bit, together; None: runs on a CPU."""

    @field_validator("architecture")
    @classmethod
    def _sizes(cls, architecture: Mapping[str, Any] | None) -> Mapping[str, Any] | None:
        if architecture is not None and (problem := size_problem(architecture)):
            raise ValueError(problem)
        try:
            json.dumps(architecture)
        except (TypeError, RecursionError) as error:  # TOML has dates, and dotted keys of any depth
            raise ValueError(f"it holds what a config.json cannot: {error}") from None
        return architecture

    @property
    def experiment_values(self) -> dict[str, Any]:
        """Keys of an Experiment that the preset sets."""
        return dict(self.model_extra or {})


def preset_names() -> list[str]:
    """Every preset that comes with the project."""
    folder = resources.files("bench.ask.presets")
    return sorted(
        entry.name.removesuffix(".toml") for entry in folder.iterdir() if entry.name.endswith(".toml")
    )


def load_preset(name: str) -> Preset:
    """A preset by name, or by the path of a TOML file. Raises BadValue or BrokenFile."""
    try:
        if name.endswith(".toml") and Path(name).is_file():
            return _parse(name, Path(name).read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise BrokenFile(f"preset '{name}' is not readable: {error}") from None
    if name not in preset_names():
        raise unknown("preset", name, [*preset_names(), AUTOMATIC])
    return _parse(name, resources.files("bench.ask.presets").joinpath(f"{name}.toml").read_text("utf-8"))


def choose_preset(cuda_memory_bytes: Sequence[int]) -> tuple[str, str]:
    """The largest preset that the cards hold together, and why. ``cuda_memory_bytes``: of each card."""
    if not cuda_memory_bytes:
        return FALLBACK, "no CUDA device was found"
    gib = sum(cuda_memory_bytes) / 2**30
    cards = "the card has" if len(cuda_memory_bytes) == 1 else f"the {len(cuda_memory_bytes)} cards have"
    fitting = [
        (preset.needs_cuda_gib, name)
        for name in preset_names()
        if (preset := load_preset(name)).needs_cuda_gib is not None and preset.needs_cuda_gib <= gib
    ]
    if not fitting:
        return FALLBACK, f"{cards} {gib:.0f} GiB, less than any larger preset needs"
    need, name = max(fitting)
    return name, f"it needs {need:g} GiB and {cards} {gib:.0f} GiB"


def _parse(name: str, text: str) -> Preset:
    try:
        values = tomllib.loads(text)
    except RecursionError:
        raise BrokenFile(f"preset '{name}' is nested too deeply") from None
    except ValueError as error:  # also a number with more digits than Python reads
        raise BrokenFile(f"preset '{name}' is not TOML: {error}") from None
    model: type[BaseModel] = Preset
    try:
        preset = Preset.model_validate(values)
        # By itself: flags come on top of what the preset alone must be able to say.
        model = Experiment
        Experiment.model_validate({"backends": (), **preset.experiment_values, "preset": name})
    except ValidationError as error:
        raise BadValue(f"preset '{name}': " + "; ".join(describe(error, model))) from None
    return preset
