"""``qlora-bench compare`` as a person and a pipeline use it: exit codes, tables, Markdown, JSON, refusals."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner, Result

from bench.cli import cli
from bench.errors import UserError
from bench.judge.regression import Regression
from bench.judge.regression_findings import Finding
from bench.record.schema import Record
from bench.record.store import Store
from bench.show.regression_markdown import regression_markdown
from tests.command import ROOT, Command
from tests.record_factory import failed, record, triage
from tests.regression_factory import each, later, rounds

DOCUMENT = ROOT / "docs" / "regression.md"


def saved(folder: Path, records: list[Record]) -> Path:
    for one in records:
        Store(folder).save(one)
    return folder


@pytest.fixture
def sides(tmp_path: Path) -> tuple[Path, Path]:
    """BASE, and a NEW in which hqq is slower by a third."""
    base = [*rounds("hqq", seed=1), *rounds("bf16", seed=1)]
    new = later([*rounds("hqq", seed=2, times=1.33), *rounds("bf16", seed=2)], versions={"torch": "2.15.0"})
    return saved(tmp_path / "base", base), saved(tmp_path / "new", new)


def compare(*arguments: str | Path) -> Result:
    """In this process; errors for people come out as exceptions."""
    return CliRunner(env={"COLUMNS": "160"}).invoke(cli, ["compare", *map(str, arguments)], standalone_mode=False)


def refusal(*arguments: str | Path) -> str:
    done = compare(*arguments)
    assert isinstance(done.exception, UserError), done
    assert done.output == ""
    return str(done.exception)


# ---- exit codes --------------------------------------------------------------------------------------


def test_a_regression_is_exit_code_1_through_the_front_door(command: Command, sides):
    done = command.run("compare", *sides)
    assert done.returncode == 1, done.stderr
    assert "torch: 2.14.1 -> 2.15.0" in done.stdout
    assert re.search(r"hqq +step time, median +0\.\d+ s +0\.\d+ s +\+3\d\.\d % \(\+\d+\.\d to \+\d+\.\d\)", done.stdout)
    assert done.stdout.splitlines()[-1].startswith("2 regressions, ")
    assert done.stderr == ""


def test_nothing_worse_is_exit_code_0(sides):
    done = compare(sides[0], sides[0])
    assert done.exception is None
    assert done.output.splitlines()[-1].startswith("no regressions, ")


def test_nothing_comparable_is_exit_code_2_in_one_line(command: Command, tmp_path):
    base, new = saved(tmp_path / "base", [record("hqq")]), saved(tmp_path / "new", [record("awq")])
    line = command.refused("compare", base, new)
    assert "no run of NEW was asked the same as one of BASE (BASE: hqq; NEW: awq)" in line
    assert "cannot be read: File name too long" in command.refused("compare", "x" * 300, new)


def test_the_help_says_what_the_exit_codes_mean():
    text = " ".join(compare("--help").output.split())
    assert "exit code is 0 where nothing got worse, 1 where something did" in text
    assert "2 for bad input, which includes that nothing can be compared" in text


# ---- input -------------------------------------------------------------------------------------------


def test_single_records_are_compared(tmp_path):
    paths = [Store(tmp_path / side).save(record("hqq")) for side in ("base", "new")]
    assert compare(*paths).exception is None


def test_the_rungs_of_a_ladder_are_left_out(tmp_path):
    base = saved(tmp_path / "base", rounds(count=2))
    rung = record("awq")
    made = triage().model_copy(update={"rungs": (triage().rungs[0].model_copy(update={
        "evidence": triage().rungs[0].evidence.model_copy(update={"key": rung.key})}),)})  # fmt: skip
    assert rung.key in made.rung_keys
    (base / "triage.json").write_text(made.model_dump_json())
    Store(base).save(rung)
    assert compare(base, saved(tmp_path / "new", rounds(count=2))).exception is None


@pytest.mark.parametrize(
    ("make", "named"),
    [
        (lambda path: None, "is not a folder of records"),
        (lambda path: path.mkdir(), "holds no records"),
        (lambda path: path.write_text("{"), "is not a record"),
        (lambda path: saved(path, [record("hqq")]) and (path / "x.record.json").write_text("[]"), "x.record.json"),
    ],
)
@pytest.mark.parametrize("place", ["base", "new"])
def test_what_is_no_record_is_named(tmp_path, make, named, place):
    good, bad = saved(tmp_path / "good", [record("hqq")]), tmp_path / "bad"
    make(bad)
    line = refusal(*((bad, good) if place == "base" else (good, bad)))
    assert named in line and "bad" in line


def test_a_bad_file_of_limits_is_one_line_through_the_front_door(command: Command, tmp_path):
    limits = tmp_path / "limits.toml"
    limits.write_text("step_secnds = 1.1")
    line = command.refused("compare", tmp_path, tmp_path, "--thresholds", limits)
    assert "unknown key 'step_secnds'; did you mean 'step_seconds'?" in line


def test_own_limits_are_used(sides, tmp_path):
    limits = tmp_path / "limits.toml"
    limits.write_text("step_seconds = 2\ntokens_per_second = 2")
    assert compare(*sides, "--thresholds", limits).exception is None


def test_an_unknown_difference_is_refused_with_the_nearest(sides):
    assert "did you mean 'device'?" in refusal(*sides, "--allow", "devise")


def test_the_packaged_limits_are_printed_without_any_folder():
    done = compare("--show-thresholds")
    assert done.exception is None
    assert "step_seconds = 1.05" in done.output


# ---- output ------------------------------------------------------------------------------------------


def test_unchanged_figures_are_counted_and_shown_on_demand(sides):
    short, long = compare(*sides).output, compare(*sides, "--all").output
    assert "figures without a telling change are not shown" in short
    assert "storage bits per weight" not in short
    assert "storage bits per weight" in long


def test_json_has_everything_and_no_bare_nan(sides, tmp_path):
    def refuse(constant):
        raise AssertionError(constant)

    done = compare(*sides, "--json")
    body = json.loads(done.output, parse_constant=refuse)
    assert body["failed"] is True
    worse = [one for one in body["findings"] if one["result"] == "worse"]
    assert {(one["label"], one["figure"]) for one in worse} == {("hqq", "step_seconds"), ("hqq", "tokens_per_second")}
    assert all(set(one["interval"]) == {"low", "high"} for one in worse)
    assert [one for one in body["changes"] if one["name"] == "torch"] == [{"name": "torch", "base": "2.14.1", "new": "2.15.0"}]


def test_a_loss_that_became_nan_is_a_word_in_json(tmp_path):
    base = rounds(count=1)
    first = base[0].steps[0].model_copy(update={"losses": (float("nan"),)})
    new = each(base, lambda one: {"steps": (first, *one.steps[1:])})
    done = compare(saved(tmp_path / "base", base), saved(tmp_path / "new", new), "--json")
    (loss,) = [one for one in json.loads(done.output)["findings"] if one["figure"] == "first_loss"]
    assert loss["new"] == ["NaN"]


def test_markdown_goes_to_standard_output_or_a_file(sides, tmp_path):
    printed = compare(*sides, "--markdown", "-")
    written = compare(*sides, "--markdown", tmp_path / "comment.md")
    assert printed.output == (tmp_path / "comment.md").read_text()
    assert "regressions" in written.output
    assert printed.exit_code == written.exit_code == 1


def test_markdown_begins_with_one_line_and_folds_the_rest(sides):
    lines = compare(*sides, "--markdown", "-").output.splitlines()
    assert lines[0].startswith("**Worse**: 2 regressions, ")
    assert "- torch: 2.14.1 -&gt; 2.15.0" in lines
    assert sum(line.startswith("| hqq | step time, median |") for line in lines) == 1
    folds = [line for line in lines if line.startswith("<details><summary>")]
    assert [re.sub(r"\d+", "N", line) for line in folds] == [
        "<details><summary>Everything else (N)</summary>", "<details><summary>How to read this</summary>"
    ]  # fmt: skip


def test_a_file_that_cannot_be_written_is_one_line(sides, tmp_path):
    (tmp_path / "file").write_text("")
    assert "cannot write" in refusal(*sides, "--markdown", tmp_path / "file" / "comment.md")


def test_two_documents_on_one_output_are_refused(sides):
    assert "both print to standard output" in refusal(*sides, "--markdown", "-", "--json")


def test_no_record_can_put_markup_into_a_comment_or_call_anybody(tmp_path):
    evil = "<script>alert(1)</script> @everyone | [x](http://y) `z` **b**"
    base = [record("hqq"), record("bf16")]
    new = [failed("hqq", "crashed", "train", evil), record("bf16")]
    text = compare(saved(tmp_path / "base", base), saved(tmp_path / "new", new), "--markdown", "-").output
    (line,) = [line for line in text.splitlines() if "alert" in line]
    assert "<script>" not in line and "@everyone" not in line
    assert "\\[x\\]" in line and "\\`z\\`" in line and "\\*\\*b" in line
    assert len(re.findall(r"(?<!\\)\|", line)) == 9


def test_a_comment_stays_below_what_github_takes():
    found = tuple(
        Finding(f"label {n}", "step_seconds", "step time, median", "worse" if n % 2 else "same", "s", (1.0,), (2.0,), factor=2.0, limit=1.05, note="x" * 50)
        for n in range(4000)
    )  # fmt: skip
    text = regression_markdown(Regression(8000, 8000, (), found, ()))
    assert len(text) < 65_536
    assert "more do not fit into a comment" in text
    assert text.count("<details>") == text.count("</details>")
    assert text.startswith("**Worse**: 2000 regressions")


# ---- the documented workflow -------------------------------------------------------------------------


def workflow() -> dict:
    (block,) = re.findall(r"```yaml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)
    return yaml.safe_load(block)


def scripts(job: str) -> dict[str, str]:
    return {step["name"]: step["run"] for step in workflow()["jobs"][job]["steps"] if "run" in step}


def test_the_documented_workflow_has_least_permissions_and_known_actions_only():
    asked = workflow()
    assert asked["permissions"] == {"contents": "read"}
    assert "permissions" not in asked["jobs"]["compare"]
    assert asked["jobs"]["comment"]["permissions"] == {"actions": "read", "pull-requests": "write"}
    used = {step["uses"] for job in asked["jobs"].values() for step in job["steps"] if "uses" in step}
    assert used == {"actions/checkout@v4", "actions/setup-python@v5", "actions/upload-artifact@v4"}
    # What may write runs nothing of the pull request.
    assert not [step for step in asked["jobs"]["comment"]["steps"] if "uses" in step]
    assert all("timeout-minutes" in job for job in asked["jobs"].values())
    checkouts = [step["with"] for step in asked["jobs"]["compare"]["steps"] if step.get("uses", "").startswith("actions/checkout")]
    assert {one["path"] for one in checkouts} == {"base", "new"}
    assert all(one["persist-credentials"] is False for one in checkouts)


def test_the_documented_workflow_sets_up_what_the_makefile_makes():
    assert "make -C base .venv/.ready" in scripts("compare")["Set up both"]
    assert "READY := $(VENV)/.ready" in (ROOT / "Makefile").read_text()


STUB = """#!{python}
# Stands where the environment of a checkout has the command: flags are parsed by the real one, and a run is made up.
import sys
sys.path.insert(0, {root!r})
from pathlib import Path
side = Path(sys.argv[0]).parts[0]
if sys.argv[1] == "run":
    from bench.cli import cli
    asked = cli.commands["run"].make_context("run", sys.argv[2:]).params
    from bench.record.store import Store
    from tests.record_factory import failed
    from tests.regression_factory import NOW, OLD, rounds
    seed, slow = asked["seed"], {slow} if side == "new" else 1.0
    for backend in ",".join(asked["backends"]).split(","):
        made = rounds(backend, seed + 1, seed=side, times=slow, environment_changes=NOW if side == "new" else OLD)[seed]
        Store(asked["out"]).save(made)
    with open("order", "a") as order:
        print(side, file=order)
    sys.exit({code})
from bench.cli import main
sys.argv[0] = "qlora-bench"
main()
"""


def run_documented(folder: Path, *, slow: float, code: int = 0) -> tuple[int, str]:
    """The documented steps, as a runner runs them; rounds are fewer."""
    for side in ("base", "new"):
        path = folder / side / ".venv" / "bin" / "qlora-bench"
        path.parent.mkdir(parents=True)
        path.write_text(STUB.format(python=sys.executable, root=str(ROOT), slow=slow, code=code))
        path.chmod(0o755)
    steps = scripts("compare")
    turns = steps["Five rounds, taking turns"].replace("0 1 2 3 4", "0 1 2")
    assert turns != steps["Five rounds, taking turns"]
    environment = {"PATH": "/usr/bin:/bin", "GITHUB_STEP_SUMMARY": str(folder / "summary"), "NO_COLOR": "1"}
    done = None
    for text in (turns, steps["Compare"]):
        done = subprocess.run(["bash", "-e", "-c", text], cwd=folder, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            break
    return done.returncode, done.stdout + done.stderr


def test_the_documented_workflow_fails_on_a_regression_and_leaves_the_comment(tmp_path):
    code, output = run_documented(tmp_path, slow=1.5)
    assert code == 1, output
    comment = (tmp_path / "comparison.md").read_text()
    assert comment.startswith("**Worse**: ")
    assert (tmp_path / "summary").read_text() == comment
    assert (tmp_path / "order").read_text().split() == ["base", "new", "new", "base", "base", "new"]


@pytest.mark.soak
def test_the_documented_workflow_goes_on_after_a_failed_run_and_passes(tmp_path):
    code, output = run_documented(tmp_path, slow=1.0, code=1)
    assert code == 0, output
    assert (tmp_path / "comparison.md").read_text().startswith("**Not worse**: no regressions")


@pytest.mark.soak
def test_the_documented_workflow_stops_at_a_bad_request(tmp_path):
    code, output = run_documented(tmp_path, slow=1.0, code=2)
    assert code != 0, output
    assert not (tmp_path / "comparison.md").exists()


def test_the_documented_limits_are_valid(tmp_path):
    from bench.judge.regression_limits import load_limits

    (block,) = re.findall(r"```toml\n(.*?)```", DOCUMENT.read_text(encoding="utf-8"), re.S)
    (tmp_path / "limits.toml").write_text(block)
    limits = load_limits(tmp_path / "limits.toml")
    assert (limits.step_seconds, limits.load_seconds, limits.gate.missing) == (1.03, None, "report")
