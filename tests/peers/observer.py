"""Looks on inside a peer's process, in the same terms as this project's own worker.

``Observer(work, folder).install()`` is called before the peer makes its Trainer. It adds a callback to those
that every Trainer has, and stands around ``Trainer.training_step``; when the training ends it leaves
``observed.json``. `arguments`, `attach`, `rows` and `in_order` are what both peers are given, so that their work
is this project's.
"""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from safetensors.torch import load_file
from torch import nn
from torch.utils.data import SequentialSampler
from transformers import Trainer, TrainerCallback
from transformers import trainer as trainer_module

from tests.peers.work import OBSERVED_FILE, Work, enter, write_json

LIBRARIES = ("torch", "transformers", "peft", "accelerate", "bitsandbytes", "optimum-benchmark")
TODAY = int(transformers.__version__.partition(".")[0]) >= 5


class Observer(TrainerCallback):
    """One training's observations."""

    def __init__(self, work: Work, folder: Path) -> None:
        self.work = work
        self.folder = folder
        self.steps: list[dict[str, Any]] = []
        self.adapters_digest: str | None = None
        self._digest = hashlib.sha256()
        self._began = 0.0
        self._process_peak: int | None = None
        self._step_peak: int | None = None

    def install(self) -> None:
        """Look on at every Trainer that this process makes from here on."""
        trainer_module.DEFAULT_CALLBACKS.append(self)
        original = Trainer.training_step

        def training_step(trainer: Trainer, model: nn.Module, inputs: Any, *rest: Any, **named: Any) -> Any:
            self._consume(inputs, rest[0] if rest else named.get("num_items_in_batch"))
            loss = original(trainer, model, inputs, *rest, **named)
            self.steps[-1]["loss"] = loss
            return loss

        Trainer.training_step = training_step

    def on_train_begin(self, *arguments: Any, **named: Any) -> None:
        """Loading and attaching are over."""
        enter(self.folder, "train")

    def on_step_begin(self, arguments: Any, state: Any, control: Any, **named: Any) -> None:
        """Before the forward of a step, whose batch is there already."""
        if state.global_step == self.work.phase_step:
            self._process_peak = _status_bytes("VmHWM")
            self._step_peak = 0 if _reset_peak() else None
        self._began = time.perf_counter()

    def on_step_end(self, arguments: Any, state: Any, control: Any, **named: Any) -> None:
        """After the update of a step and the clearing of its gradients."""
        ended = time.perf_counter()
        self.steps[-1] |= {"seconds": ended - self._began, "ended": ended}
        if state.global_step == self.work.phase_step + 1 and self._step_peak is not None:
            self._step_peak = _status_bytes("VmHWM")

    def on_train_end(self, arguments: Any, state: Any, control: Any, **named: Any) -> None:
        """Leave what was seen."""
        logged = [entry for entry in state.log_history if "loss" in entry]
        peaks = [peak for peak in (self._process_peak, _status_bytes("VmHWM")) if peak is not None]
        write_json(
            self.folder / OBSERVED_FILE,
            {
                "steps": [
                    {
                        **step,
                        "loss": float(step["loss"]),
                        "logged_loss": entry["loss"],
                        "gradient_norm": _number(entry.get("grad_norm")),
                    }
                    for step, entry in zip(self.steps, logged, strict=True)
                ],
                "data_digest": self._digest.hexdigest(),
                "adapters_digest": self.adapters_digest,
                "quantized_layers": count_quantized(named["model"]),
                "step_peak_bytes": self._step_peak,
                "process_peak_bytes": max(peaks, default=None),
                "log": {name: _number(value) for entry in (logged[-1], state.log_history[-1])
                        for name, value in entry.items()},
                "versions": installed(),
            },
        )  # fmt: skip

    def _consume(self, inputs: Mapping[str, torch.Tensor], divisor: Any) -> None:
        """Digest the batch as `bench.run.workload.Batch` does, and count its tokens."""
        ids, labels = inputs["input_ids"], inputs["labels"]
        mask = inputs["attention_mask"] if self.work.padded else torch.ones_like(ids)
        self._digest.update(str(tuple(ids.shape)).encode())
        for tensor in (ids, labels, mask):
            self._digest.update(tensor.numpy().tobytes())
        self.steps.append(
            {
                "tokens": int(mask.sum()),
                "loss_tokens": int((labels[:, 1:] != -100).sum()),
                "divisor": None if divisor is None else float(divisor),
            }
        )


def arguments(work: Work) -> dict[str, Any]:
    """TrainingArguments for the work: this project's settings by transformers' names.

    Every step is logged, input tokens are counted as most people count them (True: all), and what costs time
    and is not asked for (saving, evaluating, progress bars) is off.
    """
    checkpointing = "activation_checkpointing" if TODAY else "gradient_checkpointing"
    settings: dict[str, Any] = {
        "max_steps": work.steps,
        "per_device_train_batch_size": work.micro_batch_size,
        "gradient_accumulation_steps": 1,
        "bf16": True,
        "optim": "adamw_torch",
        "learning_rate": work.learning_rate,
        "lr_scheduler_type": "constant",
        "adam_beta1": work.beta1,
        "adam_beta2": work.beta2,
        "adam_epsilon": work.epsilon,
        "weight_decay": work.weight_decay,
        "max_grad_norm": work.max_gradient_norm or 0.0,
        checkpointing: work.checkpointing != "none",
        "include_num_input_tokens_seen": True,
        "logging_steps": 1,
        "disable_tqdm": True,
        "dataloader_pin_memory": False,
        "save_strategy": "no",
        "report_to": "none",
    }
    if work.checkpointing != "none":
        settings[f"{checkpointing}_kwargs"] = {"use_reentrant": work.checkpointing == "reentrant"}
    return settings


def lora_settings(work: Work) -> dict[str, Any]:
    """PEFT's LoraConfig for the work."""
    return {
        "r": work.rank,
        "lora_alpha": work.alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "task_type": "CAUSAL_LM",
        "target_modules": list(work.target_modules),
    }


def copy_adapters(model: nn.Module, work: Work) -> str:
    """Give the attached adapters the work's initial values. Returns their digest, computed as
    ``bench.load.lora.tensors_digest`` does. Raises ValueError where names or shapes differ."""
    values = load_file(work.adapters_file)
    attached = {
        name.removeprefix("base_model.model.").replace(".default.weight", ""): parameter
        for name, parameter in model.named_parameters()
        if ".lora_" in name
    }
    if attached.keys() != values.keys():
        odd = sorted(attached.keys() ^ values.keys())
        raise ValueError(f"the peer's adapters are others: {', '.join(odd[:3])} ({len(odd)} names differ)")
    digest = hashlib.sha256()
    for name in sorted(attached):
        parameter = attached[name]
        if parameter.shape != values[name].shape:
            raise ValueError(f"{name} has shape {tuple(parameter.shape)}, not {tuple(values[name].shape)}")
        parameter.data.copy_(values[name])
        digest.update(name.encode())
        digest.update(parameter.detach().to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def rows(work: Work) -> dict[str, torch.Tensor]:
    """The columns of the data set, a row for each sequence."""
    columns = load_file(work.batches_file)
    return columns if work.padded else {name: columns[name] for name in ("input_ids", "labels")}


def in_order() -> None:
    """Let every Trainer take its rows in their order."""
    Trainer._get_train_sampler = lambda trainer, dataset=None: SequentialSampler(
        trainer.train_dataset if dataset is None else dataset
    )


def four_bit() -> dict[str, Any]:
    """transformers' BitsAndBytesConfig for what this project calls bnb-nf4."""
    return {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}


def count_quantized(model: nn.Module) -> int:
    """Layers that hold bitsandbytes' 4-bit codes: as their own, since an adapter shows its layer's as well."""
    return sum(type(m._parameters.get("weight")).__name__ == "Params4bit" for m in model.modules())


def installed() -> dict[str, str | None]:
    """The versions of what takes part; None: not installed."""
    found: dict[str, str | None] = {}
    for name in LIBRARIES:
        found[name] = None
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _number(value: Any) -> float | None:
    return None if value is None else float(value)


def _status_bytes(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is none."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    return None


def _reset_peak() -> bool:
    """Let VmHWM start again from the present (man 5 proc). False: the system does not allow it."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True
