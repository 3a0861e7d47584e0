"""The record's JSON Schema and field reference: published, up to date, and true of every record."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from jsonschema import Draft202012Validator
from pydantic import BaseModel, ValidationError

from bench.record.json_schema import IDENTIFIER, published_schema, record_schema, schema_text
from bench.record.recorded import Recorded
from bench.record.schema import SCHEMA_VERSION, Record
from bench.show.field_reference import DOCUMENT, field_reference
from tests.command import Command
from tests.committed import committed
from tests.fit_factory import on_cards
from tests.record_factory import (
    eight_backends,
    failed,
    fidelity,
    margin_runs,
    overflowing,
    planted,
    probed,
    record,
)

ROOT = Path(__file__).resolve().parents[1]
COMMITTED = committed()
OLD = [
    path
    for path in sorted((ROOT / "tests" / "data" / "records").glob("*.record.json"))
    if not path.name.startswith(("5-", "6-"))  # have a field that was taken out (bench.record.migration)
]
STALE = "the models have changed: run `make docs` and commit what it writes"


@pytest.fixture(scope="module")
def validator() -> Draft202012Validator:
    schema = json.loads(published_schema())
    Draft202012Validator.check_schema(schema)
    return Draft202012Validator(schema)


# ---- published ------------------------------------------------------------------------------------


def test_the_published_schema_is_that_of_the_models() -> None:
    assert published_schema() == schema_text(), STALE


def test_the_field_reference_is_that_of_the_models() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == field_reference(), STALE


def test_the_command_prints_the_schema(command: Command) -> None:
    done = command.run("schema")
    assert (done.returncode, done.stderr) == (0, "")
    assert json.loads(done.stdout) == record_schema()


def test_it_says_what_it_is() -> None:
    schema = record_schema()
    assert schema["$schema"] == "https://json-schema.org/draft/2020-12/schema"
    assert schema["$id"] == IDENTIFIER
    assert schema["title"] == "Record"
    assert schema["properties"]["schema_version"]["const"] == SCHEMA_VERSION
    assert "schema_version" in schema["required"]
    for name, model in schema["$defs"].items():
        assert model["title"] == name
        assert model["description"], name
        assert model["additionalProperties"] is False


def models(kind: type[BaseModel] = Recorded) -> Iterator[type[BaseModel]]:
    for inner in kind.__subclasses__():
        yield inner
        yield from models(inner)


def test_descriptions_are_the_docstrings_of_the_fields() -> None:
    schema = record_schema()
    for name, model in schema["$defs"].items():
        kind = next((kind for kind in models() if kind.__name__ == name), None)
        for field, about in (kind.model_fields if kind else {}).items():
            said = " ".join((about.description or "").split())
            assert model["properties"][field].get("description", "") == said
    assert schema["$defs"]["Step"]["properties"]["applied"]["description"] == (
        "False where the float16 scaler skipped the update."
    )


def test_every_field_is_in_the_reference_with_its_unit_and_what_null_means() -> None:
    text, schema = field_reference(), record_schema()
    for name, model in {"Record": schema, **schema["$defs"]}.items():
        section = text.partition(f"\n## {name}\n")[2].partition("\n## ")[0]
        for field, about in model["properties"].items():
            (line,) = re.findall(rf"^\| `{field}` \|.*$", section, flags=re.MULTILINE)
            cells = [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            assert len(cells) == 5
            assert cells[1]
            assert bool(cells[3]) == any(kind.get("type") == "null" for kind in about.get("anyOf", ())), line
            if re.search(r"_(bytes|seconds)$", field):
                assert cells[2] in ("bytes", "s"), line


def test_every_link_of_the_reference_leads_somewhere() -> None:
    text = field_reference()
    headings = {heading.lower() for heading in re.findall(r"^## (\w+)$", text, flags=re.MULTILINE)}
    assert set(re.findall(r"\]\(#(\w+)\)", text)) <= headings


# ---- true of records -------------------------------------------------------------------------------


@pytest.mark.parametrize("path", [*COMMITTED, *OLD], ids=lambda path: path.name)
def test_records_in_the_repository_keep_to_it(validator: Draft202012Validator, path: Path) -> None:
    assert [error.message for error in validator.iter_errors(json.loads(path.read_text(encoding="utf-8")))] == []


def made() -> list[Record]:
    return [
        *eight_backends(), record("bf16", cpu=True, weights="synthetic"), overflowing(), on_cards("bnb-nf4"),
        failed("awq", "crashed", "train", "why"), probed(record("hqq", fidelity=fidelity())), *margin_runs("hqq", 11), planted("x"),
    ]  # fmt: skip


def test_what_is_written_keeps_to_it(validator: Draft202012Validator) -> None:
    for one in made():
        assert [error.message for error in validator.iter_errors(json.loads(one.model_dump_json()))] == []


def broken(**changes: Any) -> dict[str, Any]:
    body = json.loads(overflowing().model_dump_json())
    step = changes.pop("step", None)
    if step:
        body["steps"][0] |= step
    return body | changes


@pytest.mark.parametrize(
    "body",
    [
        broken(mood="good"), broken(schema_version=2), broken(status="fine"), broken(wall_seconds=-1), broken(wall_seconds="NaN"),
        broken(wall_seconds=None), broken(exit_code=2**63), broken(exit_code=1.5), broken(step={"gradient_norm": "nan"}),
        broken(step={"gradient_norm": "inf"}), broken(step={"gradient_norm": "1.5"}), broken(step={"gradient_norm": None}),
        broken(step={"seconds": "-Infinity"}), broken(step={"index": "0"}), broken(steps={}), broken(request=None),
        {name: value for name, value in broken().items() if name != "schema_version"},
    ],
)  # fmt: skip
def test_what_is_no_record_does_not(validator: Draft202012Validator, body: dict[str, Any]) -> None:
    assert not validator.is_valid(body)


@pytest.mark.parametrize("word", ["NaN", "Infinity", "-Infinity"])
@pytest.mark.parametrize("field", ["gradient_norm", "learning_rate", "loss_scale"])
def test_words_for_numbers_that_are_not_finite_are_allowed_where_the_reader_takes_them(
    validator: Draft202012Validator, field: str, word: str
) -> None:
    body = broken(step={field: word})
    assert validator.is_valid(body)
    Record.model_validate(body)


@pytest.mark.parametrize("value", ["NaN", "-Infinity", "Infinity", 0, -1, 1.5])
def test_bounded_numbers_are_bounded_as_the_reader_bounds_them(validator: Draft202012Validator, value: Any) -> None:
    body = broken(wall_seconds=value)
    try:
        Record.model_validate_json(json.dumps(body))
    except ValidationError:
        assert not validator.is_valid(body)
    else:
        assert validator.is_valid(body)
