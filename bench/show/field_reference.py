"""Every field of a record in one document, ``docs/record.md``, made from the record's JSON Schema.

    python -m bench.show.field_reference      writes it and the schema; what ``make docs`` runs

Types, bounds and descriptions stand once, in the models of ``bench.record`` and ``bench.ask``; a unit is what
the name ends with.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bench.record.json_schema import FILE_NAME, LARGEST, SMALLEST, WORDS, record_schema, schema_text
from bench.record.writing import write_atomically

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "record.md"
SCHEMA = ROOT / "bench" / "record" / FILE_NAME

UNITS = {
    r"bytes": "bytes",
    r"gigabytes_per_second": "GB/s (10^9)",
    r"seconds": "s",
    r"bits_per_weight": "bits",
    r"celsius": "degrees Celsius",
    r"watts": "W",
    r"mhz": "MHz",
    r"tokens|tokens_per_step|sequence_length": "tokens",
    r"steps|gradient_accumulation_steps": "steps",
    r"digest|fingerprint": "SHA-256, hexadecimal",
    r"started_at|ended_at": "UTC, ISO 8601",
    r"loss|losses|reference_loss": "nats per token",
}
"""End of a field's name (a whole word) -> its unit."""
NOT_OBSERVED = "not observed"
NULL = re.compile(r"\b(?:[Nn]ull|None):?\s+(?:means\s+)?([^.;)]*)")
"""Where a description says what null stands for."""

HEAD = """\
# The record of a run

One JSON file a run, `KEY.record.json`, written by `qlora-bench run` as soon as the run ends. This page and
the [JSON Schema](../bench/record/record.schema.json) (draft 2020-12, printed by `qlora-bench schema`) are
made from the models in `bench/record/` and `bench/ask/` by `make docs`.

- A value that was not observed is null. It is never 0, -1 or an empty string.
- A number that is not finite is the string `"NaN"`, `"Infinity"` or `"-Infinity"`. It is data, and is kept.
  "number or non-finite" below means that these three may stand there.
- Field names carry their units. Raw values of each step are kept; statistics are derived, never stored.
- `schema_version` is {version}. A reader refuses a version that it does not know. Fields that were added
  within a version are not required: in older records they are absent, and read as their default.
"""


def field_reference() -> str:
    """The document: a table for the record, and one for each part of it in the order in which they appear."""
    schema = record_schema()
    parts = [HEAD.format(version=schema["properties"]["schema_version"]["const"])]
    for name in ("Record", *_models(schema)):
        model = schema if name == "Record" else schema["$defs"][name]
        summaries = {one: part.get("description", "") for one, part in schema["$defs"].items()}
        lines = [
            f"## {name}\n",
            f"{_prose(model.get('description', ''))}\n",
            "| field | type | unit | null means | what it is |",
            "| --- | --- | --- | --- | --- |",
            *(_line(field, about, summaries) for field, about in model["properties"].items()),
        ]
        parts.append("\n".join(lines) + "\n")
    return "\n".join(parts)


def _models(schema: Mapping[str, Any]) -> list[str]:
    """Names of all models, each behind the first that refers to it."""
    found: list[str] = []

    def look(part: Any) -> None:
        if isinstance(part, list):
            for one in part:
                look(one)
        if not isinstance(part, dict):
            return
        name = part.get("$ref", "").rpartition("/")[2]
        if name and name not in found:
            found.append(name)
            look(schema["$defs"][name]["properties"])
        for inner in part.values():
            look(inner)

    look(schema["properties"])
    return found


def _line(field: str, about: Mapping[str, Any], summaries: Mapping[str, str]) -> str:
    """One row. A part of the record that has no words of its own has the first sentence of its model."""
    named = re.search(r"\[(\w+)\]", type_in_words(about))
    summary = summaries[named[1]].partition(". ")[0].rstrip(".") + "." if named else ""
    description = _prose(about.get("description", summary))
    kind = type_in_words(about)
    cells = [f"`{field}`", kind, _unit(field, kind), _null(about), description]
    default = about.get("default")
    if default not in (None, [], {}) and not isinstance(default, dict):
        cells[4] = f"{description} Default: `{json.dumps(default)}`.".strip()
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"


def _prose(text: str) -> str:
    """A docstring as Markdown: its double backquotes become single ones, and < stays a sign."""
    return text.replace("``", "`").replace("<", "&lt;")


def _unit(field: str, kind: str) -> str:
    """By the field's name, where it holds numbers or text; parts of a record have none."""
    if not re.search(r"\b(?:number|integer|string)\b", kind):
        return ""
    return next((unit for end, unit in UNITS.items() if re.search(rf"(?:^|_)(?:{end})$", field)), "")


def _null(about: Mapping[str, Any]) -> str:
    if not any(kind.get("type") == "null" for kind in about.get("anyOf", ())):
        return ""
    said = NULL.search(about.get("description", ""))
    return _prose(said.group(1).strip()) if said and said.group(1).strip() else NOT_OBSERVED


def type_in_words(about: Mapping[str, Any]) -> str:
    """A type in words; null has a column of its own."""
    match about:
        case {"$ref": str(reference)}:
            name = reference.rpartition("/")[2]
            found = f"[{name}](#{name.lower()})"
        case {"anyOf": kinds}:
            named = (type_in_words(kind) for kind in kinds if kind.get("type") != "null")
            found = " or ".join(dict.fromkeys(named))
        case {"const": value}:
            found = f"`{json.dumps(value)}`"
        case {"enum": values}:
            spelt = ", ".join(f"`{json.dumps(value)}`" for value in values)
            found = "non-finite" if values == list(WORDS) else spelt
        case {"type": "array", "items": items}:
            found = f"list of {type_in_words(items)}"
        case {"type": "object"}:
            inner = about.get("additionalProperties")
            of = f": name to {_type_or_null(inner)}" if isinstance(inner, dict) and inner else ""
            found = f"object{of}"
        case {"type": str(kind)}:
            found = f"{kind}{_bounds(about)}"
        case _:
            found = "anything"
    return found


def _type_or_null(about: Mapping[str, Any]) -> str:
    nullable = any(kind.get("type") == "null" for kind in about.get("anyOf", ()))
    return type_in_words(about) + (" or null" if nullable else "")


def _bounds(about: Mapping[str, Any]) -> str:
    """The bounds of a number, those of 64 bits left out."""
    signs = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}
    bounds = [f"{sign} {about[name]}" for name, sign in signs.items()
              if name in about and about[name] not in (SMALLEST, LARGEST)]  # fmt: skip
    return f" ({', '.join(bounds)})".replace("<", "&lt;") if bounds else ""


def write() -> tuple[Path, Path]:
    """Write the document and the schema into the checkout."""
    return write_atomically(DOCUMENT, field_reference()), write_atomically(SCHEMA, schema_text())


if __name__ == "__main__":
    for path in write():
        print(path.relative_to(ROOT))
