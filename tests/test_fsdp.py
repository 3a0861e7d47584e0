"""--placement fsdp: frozen weights cut over two processes, gathered layer by layer, to the bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from bench.ask.plan import RunRequest
from bench.load.registry import find_backends
from bench.probe.memory import bytes_by_kind
from bench.record.schema import Record
from tests.command import Command
from tests.rig import TINY, Rig, ask, quiet, settled
from tests.test_ddp import assert_equal_steps, merged
from tests.together import RANKS, alone, together

__all__ = ["settled"]

FSDP: dict[str, Any] = {"placement": "fsdp", "device_count": RANKS}
ABLE = tuple(
    name for name, entry in find_backends().items() if "fsdp" not in entry.backend.refused_placements
)
UNTIED = {**TINY, "tie_word_embeddings": False}
CASES: dict[str, RunRequest] = {
    **{name: ask(name, **FSDP) for name in ABLE},
    **{f"{name} float32": ask(name, dtype="float32", **FSDP) for name in ABLE if name != "bf16"},
    "untied": ask("bnb-nf4", architecture=UNTIED, **FSDP),
    "accumulation": ask("bnb-nf4", work={"gradient_accumulation_steps": 3}, **FSDP),
    "padded": ask(work={"micro_batch_size": 2, "padding": "right"}, **FSDP),
    "reentrant": ask("bnb-nf4", checkpointing="reentrant", **FSDP),
    **{f"{name} not checkpointed": ask(name, checkpointing="none", **FSDP) for name in ABLE},
    "float16": ask("bnb-nf4-dq", dtype="float16", **FSDP),
}


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, list[Any]]:
    """What each rank saw of every case, all in one pair of processes."""
    seen = together(list(CASES.values()), tmp_path_factory.mktemp("fsdp"))
    return {name: [rank[place] for rank in seen] for place, name in enumerate(CASES)}


@quiet
@pytest.mark.parametrize("name", CASES)
def test_two_ranks_are_one_process_with_twice_the_accumulation(
    found: dict[str, list[Any]], name: str
) -> None:
    request = CASES[name]
    tolerance = 1e-5 if request.dtype == "float32" else 1e-3
    assert_equal_steps(merged(found[name]), list(alone(request)), tolerance)


@pytest.mark.parametrize("name", CASES)
def test_what_is_gathered_is_what_was_cut(found: dict[str, list[Any]], name: str) -> None:
    """After the training too; and every rank has the same adapters."""
    assert [rank["damaged"] for rank in found[name]] == [[], []]
    assert len({rank["adapters"] for rank in found[name]}) == 1


@quiet
@pytest.mark.parametrize("name", [*ABLE, "untied"])
def test_each_rank_holds_half_of_the_frozen_bytes(found: dict[str, list[Any]], name: str) -> None:
    """Exactly: the shapes divide by two. Whole on every rank are what is no parameter (scales, tables, HQQ's
    biases, the rotary buffer), and the adapters with what belongs to them."""
    request = CASES[name]
    rig = Rig(request.model_copy(update={"placement": "single", "device_count": 1}))
    rig.train()
    assert rig.trainer
    (whole,) = bytes_by_kind(rig.built, rig.backend, rig.adapters.tensors, rig.trainer.optimizer, {})
    cut = sum(p.nbytes for p in rig.built.model.parameters() if not p.requires_grad) - whole.quantized_weights
    for rank in found[name]:
        kinds = rank["kinds"]
        assert kinds["quantized_weights"] * RANKS == whole.quantized_weights
        assert kinds["quantization_metadata"] == whole.quantization_metadata
        assert kinds["unquantized_weights"] == whole.unquantized_weights - cut // RANKS
        assert kinds["lora"] == whole.lora
        assert kinds["optimizer_state"] == whole.optimizer_state


@pytest.mark.soak  # the command with two ranks: test_ddp does it in `make test`
def test_a_run_proves_that_its_layers_come_back_whole(command: Command, tmp_path: Path) -> None:
    flags = (
        "--preset",
        "tiny",
        "--backend",
        "bnb-nf4-dq",
        "--set",
        "cpu_threads=1",
        "--out",
        tmp_path / "out",
    )
    (body,) = command.json("run", *flags, "--placement", "fsdp", "--device-count", "2")
    record = Record.model_validate(body)
    assert record.status == "completed", record.message
    assert record.proof.gathered is True
    assert record.proof.quantized is True
    assert record.proof.ranks_agree is True
    assert record.placement is not None
    assert record.placement.wrapper == "torch.distributed.fsdp.fully_shard"
    assert record.quantization is not None
    assert record.quantization.storage_bits_per_weight == record.quantization.expected_bits_per_weight
    one, two = record.memory.bytes_by_kind
    assert (one.rank, two.rank) == (0, 1)
    assert one.quantized_weights == two.quantized_weights
    assert one.quantized_weights + two.quantized_weights == record.quantization.weights // 2


def test_a_damaged_layer_is_a_breach(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compared is bytes: a NaN of another kind, which a cast leaves behind, is noticed."""
    from bench.run.sharding import _digests

    layer = torch.nn.Linear(2, 2, bias=False, dtype=torch.bfloat16)
    layer.weight = torch.nn.Parameter(
        torch.tensor([0x7F81, 0x3F80, 0, 0], dtype=torch.int16).view(torch.bfloat16).view(2, 2),
        requires_grad=False,
    )
    before = _digests(layer)
    layer.weight.data.view(torch.int16)[0, 0] = 0x7FC0
    assert torch.isnan(layer.weight[0, 0])
    assert _digests(layer) != before
