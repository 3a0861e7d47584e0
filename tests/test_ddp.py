"""--placement ddp: two processes that train together are one process with twice the accumulation."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bench.ask.plan import RunRequest
from bench.load.registry import find_backends
from bench.record.schema import Record, Step
from bench.run.merging import merged_failure, merged_step
from bench.run.workload import HashEncoder, WorkloadReader
from tests.command import Command
from tests.rig import BACKENDS, ask, quiet, settled
from tests.together import RANKS, SPOILT_STEP, alone, together

__all__ = ["settled"]

DDP: dict[str, Any] = {"placement": "ddp", "device_count": RANKS}
SPOILT: dict[str, RunRequest] = {
    f"{phase} {dtype}": ask(dtype=dtype, **DDP)
    for phase in ("forward", "backward") for dtype in ("bfloat16", "float16")
}  # fmt: skip
CASES: dict[str, RunRequest] = {
    **{name: ask(name, **DDP) for name in BACKENDS},
    **{f"{name} float32": ask(name, dtype="float32", **DDP) for name in ("bf16", "bnb-nf4")},
    "accumulation": ask(work={"gradient_accumulation_steps": 3}, **DDP),
    "two rows, padded": ask(work={"micro_batch_size": 2, "padding": "right"}, **DDP),
    "reentrant": ask("bnb-nf4", checkpointing="reentrant", work={"gradient_accumulation_steps": 2}, **DDP),
    "not checkpointed": ask("bnb-nf4", checkpointing="none", **DDP),
    "float16": ask(dtype="float16", **DDP),
    "adapters in the compute dtype": ask(lora={"precision": "compute"}, **DDP),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank saw of every case, all in one pair of processes."""
    spoil = [None] * len(CASES) + [name.split()[0] for name in SPOILT]
    cases = CASES | SPOILT
    seen = together(list(cases.values()), tmp_path_factory.mktemp("ddp"), spoil)
    return {name: [rank[place] for rank in seen] for place, name in enumerate(cases)}


def merged(ranks: list[Any]) -> list[Step]:
    return [
        Step.model_validate(merged_step(steps)) for steps in zip(*(r["steps"] for r in ranks), strict=True)
    ]


def assert_equal_steps(one: list[Step], two: list[Step], tolerance: float) -> None:
    assert len(one) == len(two) > 0
    for mine, other in zip(one, two, strict=True):
        assert mine.losses == pytest.approx(other.losses, rel=tolerance)
        assert mine.gradient_norm == pytest.approx(other.gradient_norm, rel=tolerance)
        assert (mine.tokens, mine.loss_tokens) == (other.tokens, other.loss_tokens)
        assert (mine.applied, mine.loss_scale) == (other.applied, other.loss_scale)


def test_ddp_is_allowed_for_every_backend() -> None:
    assert all("ddp" not in entry.backend.refused_placements for entry in find_backends().values())


@quiet
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process_with_twice_the_accumulation(
    found: dict[str, list[Any]], name: str
) -> None:
    """Losses in the stream's order and the norm of the averaged gradient, step after step: an update that
    were another would show in all steps after it."""
    request = CASES[name]
    tolerance = 1e-5 if request.dtype == "float32" else 1e-3
    assert_equal_steps(merged(found[name]), list(alone(request)), tolerance)


@pytest.mark.parametrize("name", CASES)
def test_every_rank_has_the_same_gradients_and_adapters(found: dict[str, list[Any]], name: str) -> None:
    one, two = found[name]
    assert one["adapters"] == two["adapters"]
    for mine, other in zip(one["steps"], two["steps"], strict=True):
        assert mine["gradient_norm"] == other["gradient_norm"]
        assert mine["losses"] != other["losses"]


def test_ranks_take_turns_in_one_stream(found: dict[str, list[Any]]) -> None:
    request = CASES["accumulation"]
    whole = WorkloadReader(request.workload, HashEncoder(int(request.model.architecture["vocab_size"])))
    shares = [WorkloadReader(request.workload, HashEncoder(2)) for _ in range(RANKS)]
    for place in range(request.workload.steps * 3 * RANKS):
        whole.next_batch().add_to(shares[place % RANKS]._digest)
    ranks = found["accumulation"]
    assert [rank["share"] for rank in ranks] == [share.digest for share in shares]
    assert {rank["digest"] for rank in ranks} == {whole.digest}


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_the_scaler_skips_a_step_on_all_ranks(found: dict[str, list[Any]], phase: str) -> None:
    one, two = found[f"{phase} float16"]
    for rank in (one, two):
        assert [step["applied"] for step in rank["steps"]] == [True, False, True, True]
        assert rank["steps"][2]["loss_scale"] == rank["steps"][0]["loss_scale"] / 2
    assert one["adapters"] == two["adapters"]


@pytest.mark.parametrize("phase", ["forward", "backward"])
def test_the_rank_that_failed_is_named(found: dict[str, list[Any]], phase: str) -> None:
    """Both see the averaged gradients; one saw the infinity in values of its own."""
    ranks = found[f"{phase} bfloat16"]
    failures = {place: rank["failure"] for place, rank in enumerate(ranks)}
    assert all(failures.values())
    failure = merged_failure(failures, {place: rank["steps"] for place, rank in enumerate(ranks)}, RANKS)
    assert (failure["rank"], failure["step"], failure["micro_batch"]) == (1, SPOILT_STEP, 1)
    assert failure["phase"] == phase
    assert failure["module"].startswith(f"model.layers.{0 if phase == 'forward' else 1}")
    assert failure["evidence"].startswith("on rank 1: ")
    if phase == "forward":
        assert "micro-batch 1" in failure["evidence"]


def test_a_run_records_every_rank(command: Command, tmp_path: Path) -> None:
    flags = (
        "--backend",
        "bnb-nf4",
        "--set",
        "cpu_threads=2",
        "--set",
        "fidelity=on",
        "--out",
        tmp_path / "out",
    )
    (body,) = command.json("run", "--preset", "tiny", *flags, "--placement", "ddp", "--device-count", "2")
    record = Record.model_validate(body)
    assert record.status == "completed", record.message
    placement = record.placement
    assert placement is not None
    assert (placement.kind, placement.launcher, placement.communication) == ("ddp", "torchrun", "gloo")
    assert placement.wrapper == "torch.nn.parallel.DistributedDataParallel"
    assert [(place.rank, place.device, place.decoder_layers) for place in placement.places] == [
        (0, "cpu", 2), (1, "cpu", 2)]  # fmt: skip
    assert len({place.workload_digest for place in placement.places} - {None}) == RANKS
    for index, step in enumerate(record.steps):
        assert step.seconds == max(place.step_seconds[index] for place in placement.places)
        assert len(step.losses) == RANKS
    phases = ["loaded", "attached", "forward", "backward", "optimizer_step"]
    assert [(r.rank, r.phase) for r in record.memory.readings] == [(k, p) for k in (0, 1) for p in phases]
    assert [kinds.rank for kinds in record.memory.bytes_by_kind] == [0, 1]
    one, two = record.memory.bytes_by_kind
    assert one.model_copy(update={"rank": 1}) == two
    assert record.proof.ranks_agree is True
    assert record.environment is not None
    assert record.environment.cpu_threads == 1
    assert record.fidelity is not None
    assert "one process" in (record.fidelity.note or "")
    assert "--set placement=ddp --set device_count=2" in body["command"]
