"""Measures what loading a checkpoint costs in host memory; run as a program, in a process of its own.

    python -m tests.load_memory SMALL FOLDER '[{"backend": "hqq", "options": {}, "layers": 2}, ...]'

Prints one JSON line for each job: ``above_bytes`` is the highest resident memory during the load, less what
was resident before it and less the placed model. Every job loads one layer of the folder ``SMALL`` first, so
that its library is there. ``"planted": true`` keeps every dense tensor that is read, which the tests must
notice.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from bench.load.layout import Layout
from bench.load.model import build_model, linear_shapes, skeleton
from bench.load.registry import get_backend
from bench.load.weights import CheckpointWeights
from bench.probe.memory import MemoryProbe, bytes_by_kind, release_unused, resident_bytes

CPU = torch.device("cpu")


class Hoarding(CheckpointWeights):
    """Keeps what it has read: the fault that the measurement is there to find."""

    def __init__(self, folder: Path) -> None:
        super().__init__(folder)
        self.kept: list[torch.Tensor] = []

    def tensor(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        self.kept.append(super().tensor(name, device))
        return self.kept[-1].clone()


def load(folder: Path, job: dict[str, Any], layers: int) -> tuple[int, int]:
    """Bytes above the placed model, and of the placed model."""
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": layers}
    backend = get_backend(job["backend"]).create(job.get("options", {}), "cpu", job.get("dtype", "bfloat16"))
    model = skeleton(config, "sdpa")
    backend.fit(list(linear_shapes(model).values()))
    release_unused([CPU])
    before, probe = resident_bytes(), MemoryProbe([CPU])
    probe.start_phase()
    weights = (Hoarding if job.get("planted") else CheckpointWeights)(folder)
    built = build_model(model, weights, backend, Layout.on(CPU))
    (reading,) = probe.read("loaded")
    assert reading.peak_resident_bytes is not None
    nothing: Any = SimpleNamespace(state={})
    placed = 0
    for kinds in bytes_by_kind(built, backend, {}, nothing, {}):
        placed += kinds.quantized_weights + kinds.quantization_metadata + kinds.unquantized_weights
    return reading.peak_resident_bytes - before - placed, placed


def main() -> None:
    """Every job of the command line, one after another."""
    torch.set_num_threads(1)
    small, folder, jobs = Path(sys.argv[1]), Path(sys.argv[2]), json.loads(sys.argv[3])
    for job in jobs:
        load(small, job, 1)
        above, placed = load(folder, job, job["layers"])
        print(json.dumps({**job, "above_bytes": above, "placed_bytes": placed}), flush=True)


if __name__ == "__main__":
    main()
