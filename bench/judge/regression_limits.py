"""How much worse a run may get before it is a regression: regression.toml, and a file of the user's own.

``load_limits(path)`` gives the packaged values, with those of the file in their place. Every key is in
regression.toml with the reason for its value, and nowhere else.
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationError

from bench.ask.experiment import Frozen, describe
from bench.errors import BadValue, BrokenFile

OFF = "off"


def _off_is_none(value: object) -> object:
    """Neither a boolean nor a number in quotation marks passes for a number."""
    if value == OFF:
        return None
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f'a number is expected, or "{OFF}"')
    return value


Factor = Annotated[Annotated[float, Field(ge=1)] | None, BeforeValidator(_off_is_none)]
"""Times worse, 1 or more; None: not judged."""
Drop = Annotated[Annotated[float, Field(ge=0)] | None, BeforeValidator(_off_is_none)]
"""So much less, 0 or more; None: not judged."""
Gate = Literal["fail", "report"]


class MeasuredLimits(Frozen):
    """Of figures that scatter from run to run."""

    step_seconds: Factor
    tokens_per_second: Factor
    load_seconds: Factor
    peak_reserved_memory: Factor
    peak_resident_memory: Factor
    load_host_memory: Factor


class Gates(Frozen):
    """Whether what is no figure fails the comparison."""

    missing: Gate
    unlike: Gate
    failures: Gate
    stability: Gate


class Limits(MeasuredLimits):
    """Everything that regression.toml holds."""

    storage_bits: Factor
    tensor_bytes: Factor
    weight_error: Factor
    first_loss: Factor
    gradient_cosine_drop: Drop
    headroom_drop_bits: Drop
    one_run: MeasuredLimits
    """Where a side has a single run and there is no interval."""
    gate: Gates


def packaged_limits() -> str:
    """The text of regression.toml, in which every limit stands with its reason."""
    return files("bench.judge").joinpath("regression.toml").read_text(encoding="utf-8")


def load_limits(path: Path | None = None) -> Limits:
    """The packaged limits, overridden by those of the TOML file ``path``.

    Raises BrokenFile for a file that cannot be read as TOML, and BadValue for a key or a value that is not
    valid, each with the nearest valid one.
    """
    packaged = tomllib.loads(packaged_limits())
    if path is None:
        return Limits.model_validate(packaged)
    own = _read(path)
    for name in ("one_run", "gate"):
        if not isinstance(own.get(name, {}), dict):
            problem = f"thresholds '{path}': {name}: a table is expected"
            raise BadValue(problem, f"write [{name}] above its keys")
    merged = {
        name: {**packaged[name], **own.get(name, {})} if isinstance(packaged.get(name), dict) else value
        for name, value in {**packaged, **own}.items()
    }
    try:
        return Limits.model_validate(merged)
    except ValidationError as error:
        raise BadValue(f"thresholds '{path}': " + "; ".join(describe(error, Limits))) from None


def _read(path: Path) -> Mapping[str, Any]:
    try:
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise BrokenFile(f"thresholds '{path}' are not readable: {error.strerror}") from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BrokenFile(f"thresholds '{path}' are not TOML: {error}") from None
