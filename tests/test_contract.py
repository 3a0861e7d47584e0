"""Every backend, with its real library, through the real command and worker: the conformance checks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench.load.registry import find_backends
from bench.record.schema import Record
from bench.run.conformance import findings
from tests.command import Command

OURS = ("bf16", "bnb-nf4", "bnb-nf4-dq", "bnb-int8", "hqq", "gptq", "awq", "eetq")


@pytest.fixture(scope="module")
def records(command: Command, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Record]:
    """One run of every backend on the toy preset."""
    out = tmp_path_factory.mktemp("contract")
    done = command.run("run", "--preset", "tiny", "--backend", "all", "--out", out, "--json", timeout=580)
    bodies = json.loads(done.stdout)
    return {body["request"]["backend"]: Record.model_validate(body) for body in bodies}


def test_the_eight_backends_of_this_environment_exist_and_the_two_of_an_older() -> None:
    by_environment: dict[str, set[str]] = {}
    for name, entry in find_backends().items():
        by_environment.setdefault(entry.backend.environments[0], set()).add(name)
    assert by_environment == {"current": set(OURS), "legacy": {"auto-gptq", "autoawq"}}


@pytest.mark.parametrize("backend", OURS)
def test_backend_keeps_the_contract(records: dict[str, Record], backend: str) -> None:
    record = records[backend]
    found = findings(record, records["bf16"])
    assert [f"{f.name}: {f.detail}" for f in found if not f.passed] == [], record.stderr_tail
    assert len(found) == 10


def test_all_backends_did_the_same_work(records: dict[str, Record]) -> None:
    completed = [r for r in records.values() if r.workload and r.lora and r.load]
    assert len(completed) == len(OURS)
    assert len({r.workload.digest for r in completed if r.workload}) == 1
    assert len({r.lora.initial_digest for r in completed if r.lora}) == 1
    assert len({r.load.weights_digest for r in completed if r.load}) == 1


def test_runs_import_only_their_own_library(records: dict[str, Record]) -> None:
    imported = {
        name: record.environment.quantization_libraries_imported
        for name, record in records.items()
        if record.environment
    }
    assert imported["bf16"] == ()
    assert imported["eetq"] == ()
    assert imported["bnb-nf4"] == ("bitsandbytes",)
    assert imported["hqq"] == ("hqq",)
    assert "gptqmodel" in imported["gptq"]


def test_the_allocator_is_the_same_for_every_run(records: dict[str, Record]) -> None:
    settings = {r.environment.allocator_settings for r in records.values() if r.environment}
    assert settings == {"backend:native"}


def test_storage_bits_are_what_the_literature_says(records: dict[str, Record]) -> None:
    """On the toy the code tables weigh more than on a real model; the arithmetic says by how much."""
    bits = {n: r.quantization.storage_bits_per_weight for n, r in records.items() if r.quantization}
    assert bits["bf16"] == 16
    assert bits["bnb-nf4"] == pytest.approx(4.5, rel=0.01)
    assert bits["bnb-nf4-dq"] < bits["bnb-nf4"] + 0.1
    assert bits["hqq"] == pytest.approx(4.5, rel=0.001)
    assert bits["awq"] == pytest.approx(4.156, rel=0.001)
    assert 8 < bits["eetq"] < 8.2


def test_memory_has_every_phase_and_exact_bytes(records: dict[str, Record]) -> None:
    for record in records.values():
        phases = [reading.phase for reading in record.memory.readings]
        assert phases == ["loaded", "attached", "forward", "backward", "optimizer_step"]
        assert record.memory.phase_step == 0
        (kinds,) = record.memory.bytes_by_kind
        assert record.lora
        assert kinds.lora == record.lora.parameters * 4
        assert kinds.gradients == kinds.lora
        # AdamW: two float32 moments of each parameter, and a float32 step count of each tensor.
        assert kinds.optimizer_state == 2 * kinds.lora + 4 * record.lora.tensors


def test_check_prints_every_finding(command: Command) -> None:
    done = command.run("check", "eetq")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("ok  ") == 10
    assert "FAIL" not in done.stdout


def test_packed_checkpoint_is_made_once(command: Command, records: dict[str, Record], out: Path) -> None:
    """Its time is kept apart from the load, and the second run finds it in the cache."""
    assert records["gptq"].load
    assert records["gptq"].load.prepare_seconds is not None
    (again,) = command.json("run", "--preset", "tiny", "--backend", "gptq", "--out", out)
    assert again["load"]["prepare_seconds"] is None
    assert again["quantization"]["calibration"] == "rtn"
    assert again["steps"][0]["losses"] == [records["gptq"].steps[0].losses[0]]
