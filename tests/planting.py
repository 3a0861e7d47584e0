"""Documents that are whole: every field of a model filled, every text in it, keys included, the same planted one.

``filled(Record, text)`` walks the model, so that a field which is added later is planted as well.
"""

from __future__ import annotations

import collections.abc
import types
from typing import Annotated, Any, Literal, TypeVar, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic_core import PydanticUndefined

Model = TypeVar("Model", bound=BaseModel)
KEPT = {"target_modules"}
"""Fields of texts that are names out of a list, checked by a validator."""


def filled(kind: type[Model], text: str, choice: int = 0) -> Model:
    """An instance in which nothing is null or empty. ``choice``: which of the valid values stands where a few
    are valid, counted round."""
    return kind.model_validate(_body(kind, text, choice))


def literals(kind: type[BaseModel]) -> int:
    """How many choices there are at most at any one place."""
    return max(len(get_args(part)) for part in _parts(kind) if get_origin(part) is Literal)


def texts_of(kind: type[BaseModel], path: str = "") -> list[str]:
    """Every place that takes a free text, dotted; a key of a mapping is "(key)"."""
    found = []
    for name, field in kind.model_fields.items():
        found += [] if name in KEPT else _texts(field.annotation, f"{path}{name}")
    return found


def _texts(part: Any, path: str) -> list[str]:
    origin, inner = get_origin(part), get_args(part)
    if part in (str, Any):
        return [path]
    if isinstance(part, type) and issubclass(part, BaseModel):
        return texts_of(part, f"{path}.")
    if origin is collections.abc.Mapping:
        return [*([f"{path}.(key)"] if inner[0] is str else []), *_texts(inner[1], f"{path}.(value)")]
    if origin is Literal:
        return []
    return [text for one in inner if one is not type(None) for text in _texts(one, path)]


def _parts(part: Any) -> list[Any]:
    if isinstance(part, type) and issubclass(part, BaseModel):
        return [found for field in part.model_fields.values() for found in _parts(field.annotation)]
    inner = [] if get_origin(part) is Literal else [found for one in get_args(part) for found in _parts(one)]
    return [part, *inner]


def _body(kind: type[BaseModel], text: str, choice: int) -> dict[str, Any]:
    body = {}
    for name, field in kind.model_fields.items():
        number = get_origin(field.annotation) is None and field.annotation in (int, float)
        if name in KEPT or (number and field.default is not PydanticUndefined):
            body[name] = field.get_default(call_default_factory=True)  # within its bounds, as a made-up one may not be
        else:
            body[name] = _value(field.annotation, text, choice)
    return body


def _value(part: Any, text: str, choice: int) -> Any:
    origin, inner = get_origin(part), get_args(part)
    if origin in (Annotated, Union, types.UnionType):
        return _value(next(one for one in inner if one is not type(None)), text, choice)
    if origin is Literal:
        return inner[choice % len(inner)]
    if origin is tuple:
        return [_value(one, text, choice) for one in inner if one is not Ellipsis]
    if origin is collections.abc.Mapping:
        key = text if inner[0] is str else _value(inner[0], text, choice)
        return {key: _value(inner[1], text, choice)}
    if isinstance(part, type) and issubclass(part, BaseModel):
        return _body(part, text, choice)
    plain: dict[Any, Any] = {str: text, Any: text, bool: choice % 2 == 0, int: 1, float: 0.5}
    assert part in plain, f"{part}: say in tests/planting.py what stands there"
    return plain[part]


