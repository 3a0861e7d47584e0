"""What all arms of a session read, made before the first run: the checkpoint, and each case's work."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from bench.ask.plan import RunRequest
from bench.errors import BadValue, UserError
from bench.run.arrange import arrange
from bench.run.asked import Asked
from bench.run.environments import python_path
from tests.command import ROOT
from tests.peers.cases import Case, Environment, data_without_a_target
from tests.peers.outcome import CaseFacts
from tests.peers.work import ADAPTERS_FILE, BATCHES_FILE, Work


@dataclass(frozen=True)
class SessionAsked:
    """What a session is asked to do."""

    preset: str
    layers: int | None
    settings: tuple[str, ...]
    steps: int
    warmup_steps: int
    rounds: int
    cases: tuple[Case, ...]
    out: Path
    pythons: Mapping[Environment, Path]
    timeout_seconds: float


@dataclass(frozen=True)
class Prepared:
    """A case that is ready to run."""

    case: Case
    asked: Asked
    facts: CaseFacts
    work_file: Path



def prepare(asked: SessionAsked, subject: Path) -> list[Prepared]:
    """Make the checkpoint, then for each case the batches, the adapters and the work file."""
    common = (
        *asked.settings,
        f"workload.steps={asked.steps}",
        f"workload.warmup_steps={asked.warmup_steps}",
        "fidelity=off",
    )
    base = Asked(
        preset=asked.preset, backends=("bf16",), device="cpu", layers=asked.layers, settings=common,
        timeout_seconds=asked.timeout_seconds,
    )  # fmt: skip
    sweep = arrange(base).sweep
    (request,) = sweep.requests
    source = sweep.model.folder
    _refuse(request)
    model = subject / Path(asked.preset).stem
    subject.mkdir(parents=True)
    _in_a_process("checkpoint", request, source.resolve() if source else None, model)
    ready = replace(base, model=str(model), weights="real", layers=None)
    return [_prepare_case(case, ready, model, subject / case.name) for case in asked.cases]


def _prepare_case(case: Case, base: Asked, model: Path, folder: Path) -> Prepared:
    folder.mkdir()
    asked = replace(base, backends=(case.backend,), settings=(*base.settings, *case.settings))
    (request,) = arrange(asked).sweep.requests
    if case.with_data:
        work = request.workload
        rows = work.steps * work.micro_batch_size
        place = min(work.warmup_steps + 1, work.steps - 1) * work.micro_batch_size
        data = data_without_a_target(folder / "data.jsonl", rows, place, work.sequence_length)
        asked = replace(asked, data=str(data))
        (request,) = arrange(asked).sweep.requests
    _in_a_process("tensors", request, model, folder)
    work_file = work_of(request, model.resolve(), folder.resolve()).save(folder.resolve() / "work.json")
    return Prepared(case, asked, CaseFacts(name=case.name, says=case.says, request=request), work_file)


def _refuse(request: RunRequest) -> None:
    """What the peers would do in another way."""
    work = request.workload
    if work.warmup_steps < 1:
        raise BadValue("peers: at least one warm-up step is needed", "the first measured step follows its end")
    if work.gradient_accumulation_steps != 1:
        raise BadValue(
            "peers: workload.gradient_accumulation_steps must be 1",
            "a Trainer averages over all tokens of a step, this project over those of each micro-batch",
        )
    if request.dtype != "bfloat16" or request.lora.precision != "autocast":
        raise BadValue("peers: dtype must be bfloat16 and lora.precision autocast")


def work_of(request: RunRequest, model: Path, folder: Path) -> Work:
    """A request in the terms that a peer's process reads."""
    work, optimizer = request.workload, request.optimizer
    return Work(
        model_folder=str(model),
        batches_file=str(folder / BATCHES_FILE),
        adapters_file=str(folder / ADAPTERS_FILE),
        backend=request.backend,
        padded=work.padding != "packed",
        steps=work.steps,
        warmup_steps=work.warmup_steps,
        micro_batch_size=work.micro_batch_size,
        sequence_length=work.sequence_length,
        attention=request.attention,
        checkpointing=request.checkpointing,
        threads=request.cpu_threads,
        rank=request.lora.rank,
        alpha=request.lora.alpha,
        target_modules=request.lora.target_modules,
        learning_rate=optimizer.learning_rate,
        beta1=optimizer.beta1,
        beta2=optimizer.beta2,
        epsilon=optimizer.epsilon,
        weight_decay=optimizer.weight_decay,
        max_gradient_norm=optimizer.max_gradient_norm,
    )


def _in_a_process(work: str, request: RunRequest, model: Path | None, folder: Path) -> None:
    """`tests.peers.subject`, which imports torch."""
    described = folder.parent / f"{folder.name}.request.json"
    described.write_text(request.model_dump_json(), encoding="utf-8")
    command = [sys.executable, "-m", "tests.peers.subject", work, str(described.resolve()),
               str(model.resolve()) if model else "-", str(folder.resolve())]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": python_path()}
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=environment, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no word"])[-1]
        raise UserError(f"peers: the {work} could not be made: {last}")


def older_form(architecture: Mapping[str, Any]) -> dict[str, Any]:
    """The configuration as transformers 4 wrote it, which 4 and 5 both read: 4 passes over 5's
    ``rope_parameters`` and takes its own default base. Raises ValueError where 4 has no name for it."""
    config = {name: value for name, value in architecture.items() if name != "transformers_version"}
    rope = config.pop("rope_parameters", None)
    if rope is not None:
        if rope.get("rope_type", "default") != "default":
            raise ValueError(f"rope type '{rope['rope_type']}' is not among those that were tried here")
        config["rope_theta"] = rope["rope_theta"]
    if "dtype" in config:
        config["torch_dtype"] = config.pop("dtype")
    return config
