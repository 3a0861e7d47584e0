"""How much the harness's loop costs over a bare one: both on one model, interleaved in one process.

    python -m bench.run.overhead [--preset NAME] [--backend ID] [--pairs N]        (``make overhead``)

The bare loop is what a person would write: forward, loss, backward, clip, step. Each pair runs both once,
in alternating order, so that drift of the machine hits both alike; the ratio of each pair is one value.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from bench.ask.experiment import build_experiment
from bench.ask.models import resolve_model
from bench.ask.plan import plan
from bench.ask.preset import load_preset
from bench.load.contract import PackedBackend
from bench.load.lora import attach
from bench.load.model import build_model, skeleton
from bench.load.registry import foreign_libraries, get_backend
from bench.load.weights import CheckpointWeights, SyntheticWeights
from bench.probe.machine import usable_cores
from bench.run.attention import choose_kernel, implementation
from bench.run.isolation import apply_settings, hide_packages
from bench.run.training import Trainer, enable_checkpointing, make_trainer, one_step
from bench.run.workload import IGNORED_LABEL, Batch, WorkloadReader, encoder_for

WARMUP_PAIRS = 2


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description="harness loop against a bare loop")
    parser.add_argument("--preset", default="proxy")
    parser.add_argument("--backend", default="bnb-nf4")
    parser.add_argument("--pairs", type=int, default=20)
    asked = parser.parse_args()
    apply_settings()
    hide_packages(foreign_libraries(get_backend(asked.backend).backend))
    trainer, bare_reader = _trainer(asked.preset, asked.backend)
    ratios = measure(trainer, lambda: bare_step(trainer, bare_reader), asked.pairs)
    low, high = statistics.quantiles(ratios, n=20)[0], statistics.quantiles(ratios, n=20)[-1]
    print(f"{asked.preset}, {asked.backend}: harness/bare over {len(ratios)} pairs of steps: "
          f"median {statistics.median(ratios):.4f}, 5 % to 95 % {low:.4f} to {high:.4f}")  # fmt: skip


def measure(trainer: Trainer, bare: Callable[[], None], pairs: int) -> list[float]:
    """Ratio of the harness's step to the bare one in each pair, after two pairs of warm-up."""
    ratios = []
    for pair in range(pairs + WARMUP_PAIRS):
        seconds: dict[str, float] = {}
        both: list[tuple[str, Callable[[], object]]] = [
            ("harness", lambda index=pair: one_step(trainer, index)),  # type: ignore[misc]
            ("bare", bare),
        ]
        for name, step in both if pair % 2 else reversed(both):
            began = time.perf_counter()
            step()
            seconds[name] = time.perf_counter() - began
        if pair >= WARMUP_PAIRS:
            ratios.append(seconds["harness"] / seconds["bare"])
    return ratios


def bare_step(trainer: Trainer, reader: WorkloadReader) -> None:
    """One training step as it would be written by hand."""
    loss = _bare_loss(trainer, reader.next_batch())
    loss.backward()  # type: ignore[no-untyped-call]
    nn.utils.clip_grad_norm_(trainer.parameters, trainer.request.optimizer.max_gradient_norm or 1.0)
    trainer.optimizer.step()
    trainer.optimizer.zero_grad(set_to_none=True)
    loss.item()


def _bare_loss(trainer: Trainer, batch: Batch) -> torch.Tensor:
    # In a function, so that the logits are not held by a name through the backward, which
    # would slow the bare loop down.
    with torch.autocast("cpu", trainer.dtype):
        logits = trainer.adapters.model(input_ids=batch.input_ids).logits
    return nn.functional.cross_entropy(
        logits[:, :-1].float().flatten(0, 1), batch.labels[:, 1:].flatten(), ignore_index=IGNORED_LABEL
    )


def _trainer(preset_name: str, backend_id: str) -> tuple[Trainer, WorkloadReader]:
    preset, entry = load_preset(preset_name), get_backend(backend_id)
    experiment = build_experiment(
        {**preset.experiment_values, "preset": preset_name, "architecture": preset.architecture,
         "backends": [backend_id]})  # fmt: skip
    model = resolve_model(experiment, preset_model=preset.model, download=False)
    (request,) = plan(
        experiment, model.request, device="cpu", cpu_threads=usable_cores(),
        options={backend_id: entry.defaults.model_dump()}, libraries={backend_id: entry.backend.requires},
        calibrations={backend_id: None},
    )  # fmt: skip
    backend = entry.create(request.options, "cpu", request.dtype)
    if isinstance(backend, PackedBackend):
        raise SystemExit("overhead: choose a backend that quantizes on load")
    empty = skeleton(request.model.architecture, implementation(request.attention))
    weights = _weights(model.folder, empty)
    torch.set_num_threads(request.cpu_threads)
    choose_kernel(request.attention)
    device = torch.device("cpu")
    built = build_model(empty, weights, backend, device)
    enable_checkpointing(built.model, request.checkpointing)
    adapters = attach(built.model, request.lora, request.seed)
    encoder = encoder_for(model.folder, int(request.model.architecture["vocab_size"]))
    reader, bare_reader = (WorkloadReader(request.workload, encoder) for _ in range(2))
    return make_trainer(adapters, request, reader, [device], backend.dtype), bare_reader


def _weights(folder: Path | None, empty: nn.Module) -> CheckpointWeights | SyntheticWeights:
    if folder is not None:
        return CheckpointWeights(folder)
    return SyntheticWeights({name: parameter.shape for name, parameter in empty.named_parameters()}, 0.02)


if __name__ == "__main__":
    main()
