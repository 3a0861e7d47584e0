"""Other environments: found as folders, asked in processes of their own, and never imported here.

The toy environments here are this interpreter behind a shell script that writes down how it was started. What
the real older stack does is in tests/test_older_stack.py.
"""

from __future__ import annotations

import ast
import json
import sys
import zipfile
from pathlib import Path
from typing import Any

import pytest

from bench.ask.versions import CURRENT
from bench.errors import BadValue, BrokenFile, UserError
from bench.load.older import in_terms_of, tokenizer_kind
from bench.load.registry import find_backends
from bench.run import environment_build, environments, interpreters
from bench.run.arrange import arrange
from bench.run.asked import Asked
from bench.run.environment_build import build, name_of
from bench.run.environments import environment_of, find_environment
from bench.run.interpreters import WORKER_NEEDS, ask
from tests.command import ROOT, Command

WRAPPED = """#!/bin/sh
echo "$PYTHONPATH $*" >> "{log}"
exec "{python}" "$@"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of environments that somebody named."""
    made = tmp_path / "stacks"
    made.mkdir()
    monkeypatch.setenv(environments.VARIABLE, str(made))
    ask.cache_clear()
    return made


def describe(folder: Path, name: str, **values: Any) -> Path:
    own = folder / name
    own.mkdir()
    values = {"description": "a toy", **values}
    lines = (f"{key} = {json.dumps(value)}" for key, value in values.items())
    (own / "environment.toml").write_text("\n".join(lines), encoding="utf-8")
    return own


def script(own: Path, text: str) -> None:
    (own / "python").write_text(text, encoding="utf-8")
    (own / "python").chmod(0o755)


def toy(folder: Path, name: str = "toy", text: str | None = None) -> Path:
    """An environment with an interpreter of its own, in which bf16 and eetq may run."""
    own = describe(folder, name, interpreter="python", backends=["bf16", "eetq"])
    script(own, text or WRAPPED.format(log=own / "log", python=sys.executable))
    return own


# ---- through the front door


def test_a_run_takes_place_under_the_environments_interpreter(
    folder: Path, command: Command, out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = toy(folder)
    monkeypatch.setenv("PYTHONPATH", "/leads/elsewhere")
    done = command.run("run", "--preset", "tiny", "--backend", "bf16", "--environment", "toy", "--steps", "2",
                       "--out", out, "--json")  # fmt: skip
    (body,) = json.loads(done.stdout)
    assert body["status"] == "completed", body
    assert body["request"]["environment"] == "toy"
    assert "--environment toy" in body["command"]
    assert body["request"]["versions"]["torch"] == body["environment"]["versions"]["torch"] is not None
    started = [line for line in (own / "log").read_text().splitlines() if "bench.run.worker" in line]
    (line,) = started
    assert line.split()[0].endswith("/code")  # the two packages alone, and nothing of the command's own path


def test_a_missing_or_broken_environment_is_one_unavailable_row(
    folder: Path, command: Command, out: Path
) -> None:
    describe(folder, "unbuilt", backends=["bf16"])
    toy(folder, "broken", "#!/bin/sh\necho 'libpython is gone' >&2\nexit 127\n")
    found = {}
    for name in ("unbuilt", "broken"):
        done = command.run("run", "--preset", "tiny", "--environment", name, "--out", out / name, "--json")
        assert done.returncode == 1, done.stderr
        (body,) = (one for one in json.loads(done.stdout) if one["request"]["backend"] == "bf16")
        assert (body["status"], body["stage"]) == ("unavailable", "launch")
        found[name] = body["message"]
    assert found["unbuilt"].endswith("environment 'unbuilt' is not built here; build it with: make env ENV=unbuilt")
    assert "environment 'broken' is broken: its interpreter ended with 127 and said: libpython is gone" in found["broken"]


def test_all_means_the_backends_of_the_environment(folder: Path, tmp_path: Path) -> None:
    toy(folder)

    def chosen(**flags: Any) -> list[str]:
        planned = arrange(Asked(preset="tiny", device="cpu", out=tmp_path, **flags)).sweep.requests
        return [request.backend for request in planned]

    entries = find_backends()
    assert chosen(backends=("all",)) == [n for n, e in entries.items() if CURRENT in e.backend.environments]
    assert chosen(environment="toy") == ["bf16", "eetq"]
    assert chosen(environment="legacy") == ["bf16", "auto-gptq", "autoawq"]
    assert chosen(backends=("gptq", "auto-gptq")) == ["gptq", "auto-gptq"]


def test_what_does_not_run_there_is_refused_in_one_line(folder: Path, command: Command, out: Path) -> None:
    toy(folder)
    flags = ("run", "--preset", "tiny", "--out", out)
    assert "did you mean 'toy'" in command.refused(*flags, "--environment", "tooy")
    line = command.refused(*flags, "--environment", "toy", "--backend", "hqq")
    assert line.endswith("backend 'hqq' does not run in environment 'toy'; it runs in: current")
    describe(folder, "nothing", interpreter=sys.executable)
    for more in ((), ("--placement", "split")):
        line = command.refused(*flags, "--environment", "nothing", *more)
        assert "no backend says that it runs in environment 'nothing'" in line
    describe(folder, "odd", surprise="value")
    assert "unknown key 'surprise'" in command.refused(*flags, "--environment", "odd")
    assert not out.exists()


def test_the_list_of_backends_says_where_each_runs(command: Command) -> None:
    listed = {entry["id"]: entry for entry in command.json("backends")}
    assert listed["gptq"]["environments"] == ["current"]
    assert listed["auto-gptq"]["environments"] == ["legacy"]
    assert listed["auto-gptq"]["missing"] == []


# ---- asking an interpreter


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("#!/bin/sh\nexit 0\n", "ended with 0 and said: nothing"),
        ('#!/bin/sh\necho \'{"python": [3, 9], "versions": {}, "missing": []}\'\n', "it has Python 3.9"),
        ('#!/bin/sh\necho \'{"python": [3, 12], "versions": {}, "missing": ["torch"]}\'\n', "it has no torch"),
        ("#!/no/such/shell\n", "does not start"),
    ],
)
def test_what_is_wrong_with_an_interpreter_is_a_reason(folder: Path, text: str, reason: str) -> None:
    toy(folder, text=text)
    problem = find_environment("toy").problem()
    assert problem is not None
    assert reason in problem


def test_an_interpreter_that_hangs_is_not_waited_for(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(interpreters, "PATIENCE_SECONDS", 0.3)
    toy(folder, text="#!/bin/sh\nexec sleep 60\n")
    assert "does not start" in (find_environment("toy").problem() or "")


def test_versions_are_those_of_the_environment(folder: Path) -> None:
    said = {"python": [3, 12], "versions": {"torch": "1.0", "transformers": None}, "missing": []}
    toy(folder, text=f"#!/bin/sh\necho '{json.dumps(said)}'\n")
    found = environments.versions_in("toy", ("torch", "transformers"))
    assert (found["torch"], found["transformers"]) == ("1.0", None)
    describe(folder, "unbuilt")
    assert environments.versions_in("unbuilt", ("torch",))["torch"] is None


def test_the_worker_imports_nothing_that_an_environment_is_not_asked_for() -> None:
    needed: set[str] = set()
    seen: set[str] = set()
    waiting = ["bench.run.worker"]
    while waiting:
        name = waiting.pop()
        base = ROOT.joinpath(*name.split("."))
        path = next((p for p in (base / "__init__.py", base.with_suffix(".py")) if p.is_file()), None)
        if name in seen or path is None:
            continue
        seen.add(name)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.module:
                names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
            waiting += [one for one in names if one.startswith("bench.")]
            needed |= {one.partition(".")[0] for one in names}
    foreign = needed - set(sys.stdlib_module_names) - {"bench", "backends"}
    assert "torch" in foreign
    assert foreign <= set(WORKER_NEEDS)


# ---- building


def wheel(folder: Path, version: str) -> Path:
    path = folder / f"toy-{version}-py3-none-any.whl"
    info = f"toy-{version}.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("toy.py", f"VERSION = {version!r}\n")
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: toy\nVersion: {version}\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def test_an_environment_is_built_from_its_lock_once(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = describe(folder, "mine")
    lock = own / "requirements.lock"
    lock.write_text(f"# a comment\ntoy @ {wheel(folder, '1.0').as_uri()}\n")
    made = find_environment("mine")
    with pytest.raises(UserError, match="is broken: it has no accelerate"):
        build(made)  # installed, and useless for a worker: so it does not count as built
    assert "is not built here" in (made.problem() or "")
    monkeypatch.setattr(environments, "WORKER_NEEDS", ("toy",))
    assert build(made)
    assert made.problem() is None
    assert environments.versions_in("mine", ("toy",))["toy"] == "1.0"
    assert not build(made)
    lock.write_text(f"toy @ {wheel(folder, '2.0').as_uri()}\n")
    assert "was built from another lock" in (made.problem() or "")


def test_a_build_that_fails_says_so_and_leaves_nothing_that_counts(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    own = describe(folder, "mine")
    monkeypatch.setattr(environment_build.venv.EnvBuilder, "create", lambda self, target: Path(target).mkdir())
    (own / "requirements.lock").write_text("toy==1.0\n")
    assert environment_build.main(["mine"]) == 2
    assert "qlora-bench: " in capfd.readouterr().err
    assert "is not built here" in (find_environment("mine").problem() or "")
    assert environment_build.main([]) == 2
    assert environment_build.main(["mien"]) == 2
    with pytest.raises(BrokenFile, match="has no lock"):
        _ = find_environment_without_lock(folder).digest


def find_environment_without_lock(folder: Path) -> environments.Environment:
    describe(folder, "bare")
    return find_environment("bare")


@pytest.mark.parametrize("line", ["auto-gptq==0.7.1", "auto-gptq @ https://example.org/x.tar.gz", "auto-gptq"])
def test_a_line_of_a_lock_names_its_distribution(line: str) -> None:
    assert name_of(line) == "auto-gptq"


@pytest.mark.parametrize("name", ["legacy", "eetq"])
def test_our_environments_are_described_and_locked(name: str) -> None:
    made = find_environment(name)
    assert made.digest
    lines = [line for line in (made.folder / "requirements.lock").read_text().splitlines() if line[:1] not in ("", "#")]
    assert all("==" in line or " @ " in line for line in lines)
    locked = {name_of(line).lower().replace("_", "-") for line in lines}
    assert set(made.description.build.from_source) <= locked
    needed = {*WORKER_NEEDS, *made.description.build.from_source} - {"pynvml"}
    assert {one.replace("_", "-") for one in needed} | {"nvidia-ml-py"} <= locked


# ---- the same checkpoint, and the same configuration


@pytest.mark.parametrize(("older", "maker"), [("auto-gptq", "gptq"), ("autoawq", "awq")])
def test_the_older_library_reads_the_checkpoint_of_the_present_one(
    older: str, maker: str, tmp_path: Path
) -> None:
    sweep = arrange(Asked(preset="tiny", backends=(maker, older), device="cpu", out=tmp_path,
                          settings=(f"{maker}.group_size=64", f"{older}.group_size=64"))).sweep  # fmt: skip
    theirs, own = (sweep.order(request) for request in sweep.requests)
    assert own.packed_folder == theirs.packed_folder
    assert theirs.packing_request is None
    assert own.packing_request is not None
    assert (own.packing_request.backend, own.packing_request.environment) == (maker, CURRENT)
    assert own.packing_request.options == theirs.request.options


def test_a_backend_runs_where_its_adapter_says_unless_asked() -> None:
    entries = find_backends()
    assert environment_of(entries["auto-gptq"], None) == "legacy"
    assert environment_of(entries["bf16"], "legacy") == "legacy"
    with pytest.raises(BadValue, match="does not run in environment 'current'"):
        environment_of(entries["auto-gptq"], CURRENT)


def test_transformers_4_is_told_the_base_of_the_rotation_in_its_own_terms() -> None:
    five = {"model_type": "llama", "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}
    assert in_terms_of(5, five) == five
    assert in_terms_of(4, five) == {"model_type": "llama", "rope_theta": 1e5}
    scaled = {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    assert in_terms_of(4, scaled) == {"rope_theta": 1e4, "rope_scaling": {"rope_type": "linear", "factor": 2.0}}
    with pytest.raises(ValueError, match="by layer type"):
        in_terms_of(4, {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}})


def test_transformers_4_reads_a_tokenizer_that_5_wrote(tmp_path: Path) -> None:
    assert tokenizer_kind(4, tmp_path) == "AutoTokenizer"
    for written, kind in (("TokenizersBackend", "PreTrainedTokenizerFast"), ("Qwen2Tokenizer", "AutoTokenizer")):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": written}))
        assert tokenizer_kind(4, tmp_path) == kind
        assert tokenizer_kind(5, tmp_path) == "AutoTokenizer"
