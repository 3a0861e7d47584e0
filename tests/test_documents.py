"""What the documents say is true: commands exist, presets and backends are all named, versions agree."""

from __future__ import annotations

import importlib.util
import re
import shlex
import tomllib
from pathlib import Path

import pytest

from bench.ask.experiment import SETTABLE
from bench.ask.preset import preset_names
from bench.cli import cli
from bench.cli.reference import DOCUMENT, command_reference
from bench.load.contract import Shape
from bench.load.registry import find_backends
from tests.command import Command

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
CONTRIBUTING = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
MAKEFILE = (ROOT / "Makefile").read_text(encoding="utf-8")


def shell_lines(text: str) -> list[str]:
    """Commands of the unmarked code blocks, comments removed."""
    blocks = re.findall(r"^```\n(.*?)^```", text, re.DOTALL | re.MULTILINE)
    return [
        line.partition("  #")[0].partition(" # ")[0].strip()
        for block in blocks
        for line in block.splitlines()
    ]


@pytest.mark.parametrize("line", [c for c in shell_lines(README) if c.startswith("qlora-bench run ")])
def test_every_run_command_of_the_readme_is_accepted(command: Command, line: str, tmp_path: Path) -> None:
    (tmp_path / "my-text.jsonl").write_text('{"prompt": "a", "response": "b"}\n')
    arguments = [("proxy" if a == "./my-model" else a) for a in shlex.split(line)[1:]]
    if "--model" in arguments:  # a stranger's model folder: the shape of a preset stands in for it
        where = arguments.index("--model")
        del arguments[where : where + 2]
    done = command.run(*arguments, "--dry-run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr


def test_every_make_target_that_is_named_exists() -> None:
    targets = set(re.findall(r"^([a-z0-9-]+):", MAKEFILE, re.MULTILINE))
    named = {
        line.split()[1]
        for text in (README, CONTRIBUTING)
        for line in shell_lines(text)
        if line.startswith("make ")
    }
    assert named <= targets
    assert {"bench", "report", "test", "check", "help"} <= targets


def test_the_readme_names_every_backend_and_preset() -> None:
    for name in [*find_backends(), *preset_names()]:
        assert f"`{name}`" in README


def test_the_readme_shows_a_picture_that_exists() -> None:
    for picture in re.findall(r"!\[[^]]*\]\(([^)]+)\)", README):
        assert (ROOT / picture).stat().st_size > 10_000


def test_the_example_backend_of_the_guide_is_valid(tmp_path: Path) -> None:
    """The code block is a complete adapter: it imports, lists and computes."""
    (code,) = re.findall(r"```python\n(.*?)```", CONTRIBUTING, re.DOTALL)
    file = tmp_path / "mine.py"
    file.write_text(code, encoding="utf-8")
    spec = importlib.util.spec_from_file_location("guide_example", file)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    backend = module.Mine(module.Mine.variants["mine"], "cpu", "bfloat16")
    assert backend.expected_bits(Shape(8, 64)) == 4.25


def test_the_changelog_knows_the_version() -> None:
    version = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert f"## {version}" in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


def test_the_command_reference_is_that_of_the_commands() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    assert text == command_reference(), "docs/commands.md is stale: make docs"
    for name, command in cli.commands.items():
        assert f"\n## {name}\n" in text
        for option in (flag for param in command.params for flag in param.opts if flag.startswith("--")):
            assert f"`{option}`" in text
    for key in SETTABLE:
        assert f"| `{key}` |" in text
    assert "Sentinel" not in text


def test_every_dependency_is_locked() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    wanted = [
        *project["dependencies"],
        *(d for group in project["optional-dependencies"].values() for d in group),
    ]
    locked = {re.split("==", line)[0].lower().replace("_", "-")
              for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line}  # fmt: skip
    for requirement in wanted:
        name = re.split(r"[\[<>=!~ ]", requirement)[0].lower()
        assert name in locked | {"qlora-bench"}, name
