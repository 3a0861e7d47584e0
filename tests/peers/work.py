"""The work of one case, as a file: what a peer's process needs to know to do exactly what this project does.

Standard library only: it is read in environments in which nothing of this project is installed.
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import signal
import threading
from dataclasses import dataclass
from pathlib import Path
from typing import Any

STAGE_FILE = "stage"
OBSERVED_FILE = "observed.json"
OWN_FILE = "own.json"
BATCHES_FILE = "batches.safetensors"
ADAPTERS_FILE = "adapters.safetensors"


@dataclass(frozen=True)
class Work:
    """One case. Tensors are in files beside it: rows in the order in which they are trained on."""

    model_folder: str
    batches_file: str
    """Safetensors: ``input_ids``, ``labels``, ``attention_mask``, int64, (steps x micro-batch, sequence)."""
    adapters_file: str
    """Safetensors: float32 initial values by plain name, ``model.layers.0.self_attn.q_proj.lora_A``."""
    backend: str
    """``bf16``, or ``bnb-nf4``."""
    padded: bool
    """Rows are padded, so the attention mask is handed over; else there is none."""
    steps: int
    warmup_steps: int
    micro_batch_size: int
    sequence_length: int
    attention: str
    checkpointing: str
    threads: int
    rank: int
    alpha: float
    target_modules: tuple[str, ...]
    learning_rate: float
    beta1: float
    beta2: float
    epsilon: float
    weight_decay: float
    max_gradient_norm: float | None

    @property
    def phase_step(self) -> int:
        """The step within which memory is read, as ``bench.run.training`` has it: the last of the warm-up."""
        return max(self.warmup_steps - 1, 0)

    def save(self, path: Path) -> Path:
        """Write it as JSON."""
        path.write_text(json.dumps(dataclasses.asdict(self), indent=1), encoding="utf-8")
        return path

    @classmethod
    def load(cls, path: Path) -> Work:
        """Read it back."""
        body = json.loads(path.read_text(encoding="utf-8"))
        return cls(**{**body, "target_modules": tuple(body["target_modules"])})


def enter(folder: Path, stage: str) -> None:
    """Say which stage begins: what is left in the file when a process ends is where it ended."""
    (folder / STAGE_FILE).write_text(stage, encoding="utf-8")


def end_with_parent() -> None:
    """End this process and all that it started when its parent's end of stdin closes: no peer outlives a session
    that was killed. To be called by the leader of a process group only."""

    def wait() -> None:
        os.read(0, 1)
        os.killpg(os.getpgrp(), signal.SIGKILL)

    if os.getpgrp() == os.getpid():
        threading.Thread(target=wait, daemon=True).start()


def write_json(path: Path, body: Any) -> None:
    """Write JSON in which numbers that are not finite are strings, whole or not at all."""
    unfinished = path.with_suffix(".part")
    unfinished.write_text(json.dumps(_plain(body), indent=1, allow_nan=False), encoding="utf-8")
    unfinished.replace(path)


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {str(key): _plain(inner) for key, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(inner) for inner in value]
    if isinstance(value, float) and not math.isfinite(value):
        return "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return value
