"""Trains several requests one after another in processes that work together, and in one alone.

    found = together([request, ...], folder)    # by rank, then by request
    alone(request)                              # with as many times the accumulation

torchrun starts this file as a module, once for all requests: importing the libraries costs more than training
the toy. What builds, ties and trains is the worker's own code.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from bench.ask.plan import RunRequest
from bench.load.contract import PackedBackend
from bench.load.lora import attach, tensors_digest
from bench.load.model import DTYPES
from bench.load.registry import get_backend
from bench.probe.memory import bytes_by_kind
from bench.record.schema import Step
from bench.run.building import Builder
from bench.run.distributed import Rank, SharedReader, tie
from bench.run.isolation import WatchedVariables
from bench.run.order import Order
from bench.run.sharding import ShardingBuilder
from bench.run.torchrun import launcher_command, network
from bench.run.training import enable_checkpointing, make_trainer, one_step
from bench.run.watch import Watch
from tests.rig import CPU, Kept, Rig, packed

RANKS = 2
SPOILT_STEP = 1


def together(
    requests: Sequence[RunRequest], folder: Path, spoil: Sequence[str | None] = ()
) -> list[list[Any]]:
    """What each rank saw: by rank, one dictionary a request. ``spoil``: of the requests in order, the phase in
    which rank 1 makes an infinity in step 1; None: nowhere."""
    cases = [
        {"request": request.model_dump(mode="json"), "spoil": phase}
        for request, phase in zip(requests, [*spoil, *[None] * (len(requests) - len(spoil))], strict=True)
    ]
    (folder / "cases.json").write_text(json.dumps(cases), encoding="utf-8")
    command = launcher_command(sys.executable, folder, RANKS, ["-m", "tests.together", str(folder)])
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=500, check=False,
        env={**network(), **os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    errors = "".join(path.read_text()[-3000:] for path in folder.glob("logs/*/*/*/stderr.log"))
    assert done.returncode == 0, errors + done.stderr[-2000:]
    return [json.loads((folder / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(RANKS)]


def alone(request: RunRequest) -> Sequence[Step]:
    """The steps of one process with the accumulation that makes the same batch."""
    work = request.workload
    wider = work.model_copy(update={"gradient_accumulation_steps": RANKS * work.gradient_accumulation_steps})
    changes = {"placement": "single", "device_count": 1, "workload": wider}
    return Rig(request.model_copy(update=changes)).train().record.steps


def trained(request: RunRequest, rank: Rank, spoil: str | None) -> dict[str, Any]:
    """One request on this rank."""
    order = Order(request=request, model_folder=None)
    if issubclass(get_backend(request.backend).backend, PackedBackend):
        order = order.model_copy(update={"packed_folder": packed(order)})
    kind = ShardingBuilder if request.placement == "fsdp" else Builder
    builder = kind(order, Kept(), WatchedVariables())
    backend, built, _ = builder.build(request)
    enable_checkpointing(built.model, request.checkpointing)
    adapters = attach(built.model, request.lora, request.seed, DTYPES[backend.dtype])
    trainer = make_trainer(adapters, request, builder.reader(), [CPU], backend.dtype)
    trainer.tie = tie(adapters, request)
    trainer.watch = watch = Watch(adapters, built.layers, {}, CPU, trainer.dtype)
    steps = []
    for index in range(request.workload.steps):
        hook = _spoil(adapters.model, spoil) if rank.index == 1 and index == SPOILT_STEP else None
        steps.append(one_step(trainer, index)[0])
        if hook:
            hook.remove()
    assert isinstance(trainer.reader, SharedReader)
    found = watch.finder.found
    (kinds,) = bytes_by_kind(built, backend, adapters.tensors, trainer.optimizer, {})
    return {
        "steps": [step.model_dump(mode="json") for step in steps],
        "failure": found.model_dump(mode="json") if found else None,
        "adapters": tensors_digest(adapters.tensors),
        "digest": trainer.reader.digest,
        "share": trainer.reader.share_digest,
        "kinds": kinds.model_dump(mode="json"),
        "damaged": builder.cut.damaged() if isinstance(builder, ShardingBuilder) else [],
    }


def _spoil(model: torch.nn.Module, phase: str | None) -> Any:
    """An infinity in the output of the first MLP, or in the gradient that comes to the last one."""
    if phase is None:
        return None
    place = {"forward": "layers.0.mlp", "backward": "layers.1.mlp"}[phase]
    module = next(part for name, part in model.named_modules() if name.endswith(place))

    def forward(module: object, inputs: object, output: torch.Tensor) -> torch.Tensor | None:
        if phase == "forward":
            return output + float("inf")
        output.register_hook(lambda gradient: gradient + float("inf"))  # type: ignore[no-untyped-call]
        return None

    return module.register_forward_hook(forward)


def main(folder: Path) -> None:
    """One rank's part."""
    torch.set_num_threads(1)
    rank = Rank.of_environment()
    cases = json.loads((folder / "cases.json").read_text(encoding="utf-8"))
    requests = [RunRequest.model_validate(case["request"]) for case in cases]
    rank.join(requests[0])
    found = [trained(request, rank, case["spoil"]) for request, case in zip(requests, cases, strict=True)]
    (folder / f"{rank.index}.json").write_text(json.dumps(found), encoding="utf-8")
    rank.leave()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
