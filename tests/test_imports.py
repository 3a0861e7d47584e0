"""Imports run one way, and the parent side never imports torch."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "errors": set(),
    "ask": {"errors"},
    "record": {"ask", "errors"},
    "load": {"ask", "errors"},
    "probe": {"record", "load", "ask", "errors"},
    "run": {"record", "load", "probe", "ask", "errors"},
    "judge": {"record", "ask", "errors"},
    "show": {"judge", "record", "ask", "errors"},
    "cli": {"show", "judge", "record", "run", "load", "probe", "ask", "errors"},
    "__main__": {"cli"},
    "__init__": set(),
}
"""Room -> the rooms it may import besides itself. `cli` and `show` read the flow from its end."""
QUANTIZATION_LIBRARIES = {"bitsandbytes", "hqq", "gptqmodel", "eetq", "optimum", "torchao", "kernels", "auto_gptq", "awq"}
PARENT_SIDE = ("bench.cli", "bench.run.arrange", "bench.run.launch", "bench.run.sweep", "bench.run.conformance", "bench.show.report",
               "bench.show.progress", "bench.judge.comparison", "bench.record.store", "bench.load.registry",
               "bench.ask.plan", "bench.ask.packing", "bench.ask.stress", "bench.ask.reference", "bench.load.fit", "bench.cli.plan",
               "bench.show.footprint", "bench.cli.diagnose", "bench.cli.forecast", "bench.cli.overhead", "bench.run.overhead", "bench.run.forecast", "bench.run.outlooks",
               "bench.cli.schema", "bench.record.json_schema", "bench.show.terminal", "bench.run.preflight", "bench.run.placing", "bench.run.sources", "bench.probe.cards",
               "bench.run.margin", "bench.run.triage", "bench.judge.logs.diagnosis", "bench.record.logs.training_log", "bench.ask.conversations", "bench.probe.machine",
               "bench.run.environments", "bench.run.environment_build", "bench.run.interpreters",
               "bench.cli.compare", "bench.run.executors", "bench.run.ray_executor", "bench.run.ray_task", "bench.cli.executors", "bench.judge.regression", "bench.show.regression_markdown")  # fmt: skip


def imported(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: imports are absolute"
            yield node.module or ""


@pytest.mark.parametrize(
    "path", sorted((ROOT / "bench").rglob("*.py")), ids=lambda p: str(p.relative_to(ROOT))
)
def test_rooms_import_one_way(path: Path) -> None:
    room = path.relative_to(ROOT / "bench").parts[0].removesuffix(".py")
    for name in imported(path):
        package, _, rest = name.partition(".")
        assert package not in QUANTIZATION_LIBRARIES, f"{path} imports {name}"
        assert package != "backends", f"{path} reaches the adapters without the registry"
        if package == "bench" and rest:
            other = rest.partition(".")[0]
            assert other == room or other in MAY_IMPORT[room], f"{path} in '{room}' imports {name}"


@pytest.mark.parametrize("path", sorted((ROOT / "backends").glob("*.py")), ids=lambda p: p.name)
def test_adapters_import_the_contract_and_nothing_else_of_ours(path: Path) -> None:
    for name in imported(path):
        if name.startswith("bench"):
            assert name in ("bench.load.contract", "bench.ask.experiment"), f"{path} imports {name}"
        if name.startswith("backends") and name != "backends":
            assert name.removeprefix("backends.").startswith("_"), f"{path} imports another adapter"


@pytest.mark.parametrize("module", PARENT_SIDE)
def test_the_parent_side_never_imports_torch(module: str) -> None:
    code = f"import sys, {module}; print('torch' in sys.modules, 'transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["False", "False"]


@pytest.mark.parametrize("arguments", [["--help"], ["backends"], ["run", "--preset", "tiny", "--dry-run"]])
def test_commands_answer_without_torch(arguments: list[str]) -> None:
    code = ("import sys; sys.argv = ['qlora-bench', *sys.argv[1:]]\n"
            "from bench.cli import cli\n"
            "cli.main(standalone_mode=False)\n"
            "print('torch imported:', 'torch' in sys.modules)")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip().endswith("torch imported: False")


def test_everything_is_printed_through_the_terminal_that_takes_no_orders() -> None:
    """rich's own Console hands the control characters of a text on; `bench.show.terminal.Terminal` does not."""
    own = ROOT / "bench" / "show" / "terminal.py"
    for path in (ROOT / "bench").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            called = node.func if isinstance(node, ast.Call) else None
            name = called.id if isinstance(called, ast.Name) else getattr(called, "attr", "")
            assert name != "Console" or path == own, f"{path}:{node.lineno}: use bench.show.terminal.Terminal"


def test_no_room_is_a_drawer() -> None:
    forbidden = {"utils.py", "common.py", "misc.py", "helpers.py"}
    assert not [
        p for folder in ("bench", "backends") for p in (ROOT / folder).rglob("*.py") if p.name in forbidden
    ]


def test_every_file_says_what_it_is_for() -> None:
    for path in [*(ROOT / "bench").rglob("*.py"), *(ROOT / "backends").glob("*.py")]:
        assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))), path
