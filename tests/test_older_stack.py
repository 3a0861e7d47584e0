"""The older stack itself: AutoGPTQ in the environment ``legacy`` beside gptqmodel, on one checkpoint.

Run by ``make soak`` once ``make env ENV=legacy`` has built it.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bench.load.smollm2 import folder as smollm2
from bench.run.environments import find_environment
from tests.command import Command

PROBLEM = find_environment("legacy").problem(("auto_gptq", "optimum"))
LOSS_TOLERANCE = 0.02
"""Between the two stacks, as the issue asks: the same codes, other kernels and other model code."""

pytestmark = [pytest.mark.soak, pytest.mark.skipif(PROBLEM is not None, reason=str(PROBLEM))]

REAL = pytest.mark.skipif(not (smollm2() / "config.json").is_file(), reason="SmolLM2 is not here: make smollm2")


@pytest.fixture(scope="module", params=["tiny", pytest.param("smollm2-135m", marks=REAL)])
def pair(request: pytest.FixtureRequest, command: Command, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Both records of one command, and where they are."""
    out = tmp_path_factory.mktemp("older")
    place = command if request.param == "tiny" else Command(smollm2().parents[1])
    done = place.run("run", "--preset", request.param, "--backend", "gptq,auto-gptq", "--calibration", "rtn",
                     "--set", "fidelity=off", "--out", out, "--allow", "versions", "--json", timeout=580)  # fmt: skip
    bodies = {body["request"]["backend"]: body for body in json.loads(done.stdout)}
    assert [body["status"] for body in bodies.values()] == ["completed"] * 2, [b["message"] for b in bodies.values()]
    return bodies["gptq"], bodies["auto-gptq"], out


def test_they_did_the_same_work_on_the_same_codes(pair: Any) -> None:
    new, old, _ = pair
    assert old["workload"]["digest"] == new["workload"]["digest"]
    assert old["lora"]["initial_digest"] == new["lora"]["initial_digest"]
    assert old["lora"]["shapes_digest"] == new["lora"]["shapes_digest"]
    assert old["load"]["weights_digest"] == new["load"]["weights_digest"]
    assert old["quantization"]["calibration"] == new["quantization"]["calibration"] == "rtn"


def test_their_losses_are_equal_within_two_percent(pair: Any) -> None:
    new, old, _ = pair
    for mine, theirs in zip(old["steps"], new["steps"], strict=True):
        print(mine["index"], mine["losses"], theirs["losses"], mine["gradient_norm"], theirs["gradient_norm"])
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=LOSS_TOLERANCE)
        assert mine["gradient_norm"] == pytest.approx(theirs["gradient_norm"], rel=5 * LOSS_TOLERANCE)


def test_the_older_run_is_proven_and_names_its_stack(pair: Any) -> None:
    _, old, _ = pair
    assert old["proof"]["quantized"] and old["proof"]["base_frozen"] and old["proof"]["gradients_reach_adapters"]
    assert old["proof"]["data_consumed"] and not old["proof"]["breaches"]
    assert old["request"]["environment"] == "legacy"
    assert old["environment"]["lock_digest"] == find_environment("legacy").digest
    versions = old["environment"]["versions"]
    assert (versions["transformers"], versions["peft"], versions["auto-gptq"]) == ("4.51.3", "0.15.2", "0.7.1")
    assert "auto_gptq" in old["environment"]["quantization_libraries_imported"]
    assert not {"awq", "gptqmodel"} & set(old["environment"]["quantization_libraries_imported"])


def test_the_report_says_that_the_stacks_differ(pair: Any, command: Command) -> None:
    *_, out = pair
    assert command.run("report", out, "--allow", "versions").returncode == 0
    together = (out / "report.md").read_text(encoding="utf-8")
    assert "4.51.3" in together
    assert "legacy" in together
    command.run("report", out)
    apart = (out / "report.md").read_text(encoding="utf-8")
    assert "--allow versions puts it beside group 1" in apart


def test_the_backend_keeps_the_contract(command: Command) -> None:
    done = command.run("check", "auto-gptq", timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_reference_runs_in_the_older_stack_too(command: Command, tmp_path: Path) -> None:
    done = command.run("run", "--preset", "tiny", "--environment", "legacy", "--backend", "bf16,auto-gptq",
                       "--out", tmp_path, "--json", timeout=300)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert {body["request"]["environment"] for body in json.loads(done.stdout)} == {"legacy"}


@pytest.mark.parametrize(
    "flags",
    [
        ("--dtype", "float32"), ("--placement", "ddp"), ("--calibration", "random"), ("--placement", "split"),
        ("--trace", "--set", "fidelity=on", "--set", "attention=eager"), ("--set", "workload.padding=left"),
    ],
    ids=" ".join,
)  # fmt: skip
def test_the_stacks_agree_however_they_are_asked(command: Command, tmp_path: Path, flags: tuple[str, ...]) -> None:
    done = command.run("run", "--preset", "tiny", "--backend", "gptq,auto-gptq", *flags, "--out", tmp_path, "--json",
                       timeout=300)  # fmt: skip
    new, old = json.loads(done.stdout)
    assert [new["status"], old["status"]] == ["completed"] * 2, (new["message"], old["message"], old["stderr_tail"])
    for mine, theirs in zip(old["steps"], new["steps"], strict=True):
        assert mine["losses"] == pytest.approx(theirs["losses"], rel=LOSS_TOLERANCE)
    if "fidelity=on" in flags:
        # Both against one reference, which the current stack made.
        cosines = [body["fidelity"]["overall"]["cosine"] for body in (new, old)]
        assert cosines[0] == pytest.approx(cosines[1], abs=LOSS_TOLERANCE), (new["fidelity"], old["fidelity"])


def test_a_failure_in_the_older_stack_is_found_and_replayed(command: Command, tmp_path: Path) -> None:
    """The probes, the stress and the replay (which switches the attention kernel) work on its model code."""
    done = command.run("run", "--preset", "tiny", "--backend", "auto-gptq", "--dtype", "float16", "--stress",
                       "model.layers.1.mlp.up_proj=1048576", "--out", tmp_path, "--json", timeout=300)  # fmt: skip
    (body,) = json.loads(done.stdout)
    assert body["status"] == "completed", body["message"]
    assert body["first_failure"]["module"].startswith("model.layers.1.mlp")
    assert body["replay"] is not None
    assert body["replay"].get("error") is None
