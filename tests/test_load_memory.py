"""Loading needs little host memory beside the model it places, however many layers that has.

The bound: at most the largest tensor and 1 GB above the placed model, for every backend that quantizes on
load. Large layers are quantized piece by piece (``backends/_blocks.py``), and what a quantizer freed is given
back after each layer (``bench/load/heap.py``).
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from tests.big_checkpoint import BigCheckpoint, make_big_checkpoint
from tests.command import ROOT, Command

BACKENDS: dict[str, dict[str, Any]] = {
    "bf16": {},
    "bnb-nf4": {},
    "bnb-nf4-dq": {},
    "bnb-int8": {},
    "hqq": {"options": {"optimize": False}},
    "eetq": {},
}
PLANTED = "bf16"
"""What a loader keeps is the same with every backend. This one frees nothing large while it loads, so that the
peak is what the fault alone adds: 2.5 layers with two and 8.5 with eight, in each of 30 loads. The peak of eetq,
which converts to float32, differs by up to 1.8 layers from load to load."""
FEW, MANY = 2, 8
GB = 10**9


def measured(small: Path, folder: Path, *jobs: dict[str, Any]) -> list[int]:
    """Bytes above the placed model, of each job, in a process of their own."""
    command = [sys.executable, "-m", "tests.load_memory", str(small), str(folder), json.dumps(jobs)]
    done = subprocess.run(
        command, cwd=ROOT, env={**os.environ, "HF_HUB_OFFLINE": "1"},
        capture_output=True, text=True, timeout=550, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    found = [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
    assert [line["backend"] for line in found] == [job["backend"] for job in jobs]
    return [line["above_bytes"] for line in found]


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> BigCheckpoint:
    return make_big_checkpoint(
        tmp_path_factory.mktemp("small") / "m",
        hidden=768, intermediate=2048, layers=MANY, vocabulary=1024, shards=4,
    )  # fmt: skip


@pytest.fixture(scope="module")
def growth(small: BigCheckpoint) -> dict[str, float]:
    """What more layers add beside their own weights, in dense layers, by backend."""
    jobs = [
        {"backend": name, **settings, "layers": layers}
        for name, settings in BACKENDS.items()
        for layers in (FEW, MANY)
    ]
    jobs += [{"backend": PLANTED, "layers": layers, "planted": True} for layers in (FEW, MANY)]
    above = measured(small.folder, small.folder, *jobs)
    names = [*BACKENDS, "planted"]
    return {
        name: (many - few) / small.layer_bytes
        for name, few, many in zip(names, above[::2], above[1::2], strict=True)
    }


@pytest.mark.parametrize("backend", BACKENDS)
def test_more_layers_need_no_more_than_their_own_weights(growth, backend):
    assert growth[backend] < 2


def test_a_loader_that_keeps_what_it_has_read_would_be_noticed(growth):
    assert growth["planted"] > 0.8 * (MANY - FEW)


# ---- at a size where the bound means something ---------------------------------------------------


@pytest.fixture(scope="module")
def big(tmp_path_factory: pytest.TempPathFactory) -> BigCheckpoint:
    return make_big_checkpoint(
        tmp_path_factory.mktemp("big") / "m",
        hidden=2048, intermediate=8192, layers=14, vocabulary=32000, shards=6,
    )  # fmt: skip


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_model_of_two_gigabytes_stays_within_the_bound(big, small, tmp_path, command: Command):
    """Through the command, from its records: less what the same backend's process holds with a small model."""

    def load_of(folder: Path, name: str) -> tuple[int, int]:
        """Highest resident memory up to the end of the load, and the placed model's bytes."""
        settings = ["--set", "hqq.optimize=false"] if name == "hqq" else []
        (body,) = command.json(
            "run", "--preset", "tiny", "--model", folder, "--backend", name, "--out", tmp_path / folder.parent.name,
            "--steps", "1", "--set", "workload.warmup_steps=0", "--set", "workload.sequence_length=16",
            "--set", "fidelity=off", "--set", "cpu_threads=1", *settings)  # fmt: skip
        assert body["status"] == "completed", body["message"]
        (kinds,) = body["memory"]["bytes_by_kind"]
        placed = ("quantized_weights", "quantization_metadata", "unquantized_weights")
        return body["load"]["host_peak_bytes"], sum(kinds[kind] for kind in placed)

    allowed = big.largest_tensor_bytes + GB
    assert big.total_bytes > 1.5 * allowed, "a loader that keeps the dense model must be outside"
    for name in BACKENDS:
        idle, there = load_of(small.folder, name)
        peak, placed = load_of(big.folder, name)
        assert peak - (idle - there) - placed < allowed, name


@pytest.mark.slow
def test_a_loader_that_keeps_what_it_has_read_is_outside_the_bound(big, small):
    (above,) = measured(small.folder, big.folder, {"backend": PLANTED, "layers": 14, "planted": True})
    assert above > big.largest_tensor_bytes + GB


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_layer_of_qwen2_72b_stays_within_the_bound(small, tmp_path):
    """Its linear layers in their real size, of which the largest has 484 MB; one backend a process."""
    one = make_big_checkpoint(
        tmp_path / "m", hidden=8192, intermediate=29568, layers=1, vocabulary=1024, shards=4
    )
    assert one.largest_tensor_bytes == 2 * 8192 * 29568
    for name, settings in BACKENDS.items():
        (above,) = measured(small.folder, one.folder, {"backend": name, **settings, "layers": 1})
        assert above < one.largest_tensor_bytes + GB, name
