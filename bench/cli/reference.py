"""Every command, option and setting in one document, ``docs/commands.md``, made from the commands themselves.

    python -m bench.cli.reference      writes it; what ``make docs`` runs

What an option does stands once, in its help; what ``--set`` takes, in ``bench.ask.experiment`` and in the
options of the backends.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import click
from pydantic import BaseModel

from bench.ask.experiment import SETTABLE, Experiment
from bench.cli import cli
from bench.load.registry import find_backends
from bench.record.writing import write_atomically
from bench.show.field_reference import type_in_words

ROOT = Path(__file__).resolve().parents[2]
DOCUMENT = ROOT / "docs" / "commands.md"

HEAD = """\
# Commands

Made from the commands themselves by `make docs`; `qlora-bench COMMAND --help` prints the same.

Exit codes: 0, all is well; 1, a run did not complete, or `compare` found something worse; 2, a bad request,
with one line that says what was expected; 130, interrupted.
"""
SETTINGS = """\
## Settings

What `--set KEY=VALUE` takes, beyond the flags. A value is JSON where it parses, else text:
`--set optimizer.max_gradient_norm=null`, `--set 'lora.target_modules=["q_proj", "v_proj"]'`.
"""


def command_reference() -> str:
    """The document."""
    parts = [HEAD, *(_section(name, command) for name, command in cli.commands.items())]
    parts += [SETTINGS, *_settings(), *_backend_options()]
    return "\n".join(parts)


def _section(name: str, command: click.Command) -> str:
    context = click.Context(command, info_name=f"qlora-bench {name}")
    options = [param for param in command.params if isinstance(param, click.Option) and not param.hidden]
    lines = [
        f"## {name}\n",
        "```text",
        command.get_usage(context).removeprefix("Usage: "),
        "```\n",
        _paragraphs(command.help or ""),
    ]
    if options:
        lines += ["", "| option | default | what it does |", "| --- | --- | --- |"]
        lines += [_option(param, context) for param in options]
    return "\n".join(lines) + "\n"


def _paragraphs(text: str) -> str:
    paragraphs = (" ".join(part.split()) for part in text.replace("\b", "").split("\n\n"))
    return "\n\n".join(paragraphs).replace("<", "&lt;")


def _option(param: click.Option, context: click.Context) -> str:
    names = ", ".join(f"`{name}`" for name in (*param.opts, *param.secondary_opts))
    value = "" if param.is_flag else f" `{param.make_metavar(context)}`"
    default = param.get_default(context)
    shown = f"`{default}`" if isinstance(default, str | int | float) and not param.is_flag else ""
    text, _, told = (param.help or "").partition("  [default: ")
    return _line(names + value, shown or told.rstrip("]"), text)


def _settings() -> Iterator[str]:
    schema = Experiment.model_json_schema()
    rows = []
    for key in SETTABLE:
        group, _, field = key.rpartition(".")
        holder = schema["$defs"][group.capitalize()] if group else schema
        rows.append(_setting(key, holder["properties"][field]))
    yield _table(rows)


def _backend_options() -> Iterator[str]:
    """A table for each family of backends: those whose options are of one kind share it."""
    families: dict[type[BaseModel], list[str]] = {}
    entries = find_backends()
    for name, entry in entries.items():
        families.setdefault(type(entry.backend.variants[name]), []).append(name)
    for model, names in families.items():
        fields = model.model_json_schema().get("properties", {})
        if not fields:
            continue
        first = names[0]
        rows = [_setting(f"{first}.{key}", about, _defaults(names, key)) for key, about in fields.items()]
        yield f"### {', '.join(names)}\n\n{_table(rows)}"


def _defaults(names: list[str], field: str) -> str:
    """The default of each backend of a family; said once where it is the same."""
    entries = find_backends()
    values = {name: json.dumps(entries[name].options({}).model_dump(mode="json")[field]) for name in names}
    if len(set(values.values())) == 1:
        return f"`{values[names[0]]}`"
    return ", ".join(f"`{value}` ({name})" for name, value in values.items())


def _setting(key: str, about: Mapping[str, Any], default: str | None = None) -> str:
    if default is None:
        default = f"`{json.dumps(about['default'])}`" if "default" in about else ""
    words = type_in_words(about)
    return _line(f"`{key}`", default, f"{words}. {about.get('description', '')}".replace("``", "`").strip())


def _table(rows: list[str]) -> str:
    return "\n".join(["| key | default | what it is |", "| --- | --- | --- |", *rows]) + "\n"


def _line(*cells: str) -> str:
    return "| " + " | ".join(" ".join(cell.split()).replace("|", "\\|") for cell in cells) + " |"


def write() -> Path:
    """Write the document into the checkout."""
    return write_atomically(DOCUMENT, command_reference())


if __name__ == "__main__":
    print(write().relative_to(ROOT))
