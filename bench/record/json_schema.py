"""The record as a JSON Schema, for readers in any language: made from the models, published in the package.

``record_schema()`` makes it anew and ``published_schema()`` is the file that comes with the package, which
``qlora-bench schema`` prints; ``make docs`` writes it, and tests/test_schema.py holds the two together. Its
descriptions are the docstrings of the models' fields.

The schema is of what is written. Fields that were added within a version are not required, so that it holds
for older records too; a number that is not finite is the string "NaN", "Infinity" or "-Infinity" and nothing
else.
"""

from __future__ import annotations

import json
from importlib.resources import files
from typing import Any, Final

from pydantic.json_schema import GenerateJsonSchema, JsonSchemaValue
from pydantic_core import core_schema

from bench.record.schema import SCHEMA_VERSION, Record

FILE_NAME: Final = "record.schema.json"
DIALECT = "https://json-schema.org/draft/2020-12/schema"
IDENTIFIER = f"urn:qlora-bench:record:{SCHEMA_VERSION}"
WORDS = {"NaN": None, "Infinity": float("inf"), "-Infinity": float("-inf")}
"""The words for numbers that are not finite, with their place among numbers: NaN has none."""
SMALLEST, LARGEST = -(2**63), 2**63 - 1
"""Whole numbers have 64 bits (``bench.record.store`` refuses others)."""


class _Generator(GenerateJsonSchema):
    """Pydantic's generator, with what the records have of their own."""

    schema_dialect = DIALECT

    def float_schema(self, schema: core_schema.FloatSchema) -> JsonSchemaValue:
        """A number, or the word for one that is not finite where such a one may stand."""
        number = super().float_schema(schema)
        allowed = schema.get("allow_inf_nan", self._config.allow_inf_nan)
        words = [word for word in WORDS if _within(word, schema)] if allowed else []
        return {"anyOf": [number, {"enum": words}]} if words else number

    def int_schema(self, schema: core_schema.IntSchema) -> JsonSchemaValue:
        """A whole number of 64 bits."""
        whole = super().int_schema(schema)
        if "exclusiveMinimum" not in whole:
            whole.setdefault("minimum", SMALLEST)
        whole.setdefault("maximum", LARGEST)
        return whole

    def field_title_should_be_set(self, schema: Any) -> bool:
        """No: a field's title would be its name again. Models have one."""
        return False


def _within(word: str, schema: core_schema.FloatSchema) -> bool:
    """Whether a number that is not finite keeps to the bounds of a field. NaN keeps to none."""
    bounded = {name for name in ("ge", "gt", "le", "lt") if name in schema}
    value = WORDS[word]
    if value is None:
        return not bounded
    return not bounded & ({"le", "lt"} if value > 0 else {"ge", "gt"})


def record_schema() -> dict[str, Any]:
    """The schema of a record of this version."""
    made = Record.model_json_schema(mode="validation", schema_generator=_Generator)
    made["required"] = ["schema_version", *made["required"]]
    found: dict[str, Any] = _unwrapped({"$schema": DIALECT, "$id": IDENTIFIER, **made})
    return found


def _unwrapped(part: Any) -> Any:
    """The same with every description on one line: docstrings are wrapped for the source."""
    if isinstance(part, list):
        return [_unwrapped(one) for one in part]
    if not isinstance(part, dict):
        return part
    return {name: _unwrapped(inner) for name, inner in part.items()} | (
        {"description": " ".join(part["description"].split())} if type(part.get("description")) is str else {}
    )


def schema_text() -> str:
    """The schema as it stands in the file."""
    return json.dumps(record_schema(), indent=1) + "\n"


def published_schema() -> str:
    """The text of the file that comes with the package."""
    return files("bench.record").joinpath(FILE_NAME).read_text(encoding="utf-8")
