"""The base of everything that is recorded, and the units that field names stand for."""

from __future__ import annotations

from collections.abc import Hashable
from functools import lru_cache
from typing import Annotated, TypeVar

from pydantic import AfterValidator, BaseModel, ConfigDict, Field

Value = TypeVar("Value", bound=Hashable)


@lru_cache(maxsize=1024)
def _once(value: Hashable) -> Hashable:
    return value


def _kept_once(value: Value) -> Value:
    """The first that was read of equal values."""
    return _once(value)  # type: ignore[return-value]


KeptOnce = Annotated[Value, AfterValidator(_kept_once)]
"""Text, whole numbers and nulls that are the same in most steps or runs, such as the names of all tensors:
held once, thousands of records take a fifth less. Not for fractions: -0.0 would become 0.0."""
Bytes = Annotated[int, Field(ge=0)]
Seconds = Annotated[float, Field(ge=0)]


class Recorded(BaseModel):
    """Base of all recorded values: immutable, complete, non-finite numbers as strings."""

    model_config = ConfigDict(
        frozen=True, extra="forbid", ser_json_inf_nan="strings", use_attribute_docstrings=True
    )
