"""The adapters: PEFT's own LoRA layers, with initial values that do not depend on the backend.

PEFT draws its initial values from torch's global generator and rounds them by the layer's dtype, so one
seed gives different adapters on different backends. Here each tensor's values come from its own name and
are copied in as float32: they are equal to the bit for every backend, on every device.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.ask.experiment import Lora
from bench.ask.stress import Pair
from bench.load.stress import scale_adapters
from bench.load.weights import seed_of

ADAPTER = "default"


@dataclass(frozen=True)
class Adapters:
    """The model with LoRA attached, and its trainable tensors by plain name."""

    model: nn.Module
    tensors: Mapping[str, nn.Parameter]
    """``model.layers.0.self_attn.q_proj.lora_A`` -> float32 parameter."""
    initial_digest: str
    shapes_digest: str


def attach(
    model: nn.Module, lora: Lora, seed: int, dtype: torch.dtype = torch.float32, pairs: Sequence[Pair] = ()
) -> Adapters:
    """Put LoRA on the named projections: A uniform as PEFT draws it (Kaiming, a = sqrt(5)), B zero.

    ``dtype``: the compute dtype, which ``lora.precision`` refers to. ``pairs``: layers that ``--stress``
    rescaled. Raises ValueError where a projection was not found or a layer type takes no adapter.
    """
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha,
        lora_dropout=0.0,
        bias="none",
        task_type="CAUSAL_LM",
        target_modules=list(lora.target_modules),
        init_lora_weights=False,
    )
    wrapped = get_peft_model(model, config, adapter_name=ADAPTER, autocast_adapter_dtype=True)
    tensors = dict(_lora_tensors(wrapped))
    for projection in lora.target_modules:
        if not any(f".{projection}.lora_" in name for name in tensors):
            raise ValueError(f"no layer named '{projection}' took an adapter")
    with torch.no_grad():
        for name, parameter in tensors.items():
            parameter.data = initial_values(name, parameter.shape, seed).to(parameter.device)
            parameter.requires_grad_(True)
    attached = Adapters(
        wrapped, tensors, initial_digest=tensors_digest(tensors), shapes_digest=_shapes_digest(tensors)
    )
    scale_adapters(wrapped, pairs, ADAPTER)
    if lora.precision == "compute":
        for parameter in tensors.values():
            parameter.data = parameter.data.to(dtype)
    elif lora.precision == "float32":
        compute_in_float32(wrapped, dtype)
    return attached


class Float32Linear(nn.Linear):
    """A and B of an adapter, multiplied in float32 whatever autocast says."""

    output_dtype: torch.dtype | None = None
    """B hands its product back in the compute dtype, so that nothing else of the model changes."""

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """``(..., in)`` -> ``(..., out)``."""
        with torch.autocast(input.device.type, enabled=False):
            product = nn.functional.linear(input.float(), self.weight.float())
        return product if self.output_dtype is None else product.to(self.output_dtype)


def compute_in_float32(model: nn.Module, dtype: torch.dtype) -> None:
    """Make every adapter's products float32; parameters stay the same objects, in float32."""
    for name, module in model.named_modules():
        if name.endswith((f".lora_A.{ADAPTER}", f".lora_B.{ADAPTER}")):
            module.weight.data = module.weight.data.float()
            # The class alone is changed: a new module would leave the optimizer with the old parameters.
            module.__class__ = Float32Linear
            module.output_dtype = dtype if ".lora_B." in name else None


def compute_in_autocast(model: nn.Module) -> None:
    """Undo `compute_in_float32`."""
    for module in model.modules():
        if type(module) is Float32Linear:
            plain: Any = module
            plain.__class__ = nn.Linear


def initial_values(name: str, shape: torch.Size, seed: int) -> torch.Tensor:
    """Float32 values on the CPU: for A (rank x in) uniform in +-1/sqrt(in), for B (out x rank) zero."""
    if name.endswith("lora_B"):
        return torch.zeros(shape, dtype=torch.float32)
    generator = torch.Generator().manual_seed(seed_of(name, seed))
    # Kaiming uniform with a = sqrt(5): bound = sqrt(6 / ((1 + 5) * fan_in)).
    bound = 1 / math.sqrt(shape[1])
    return torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator)


def tensors_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    """SHA-256 over names and float32 bytes, in the order of the names."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].detach().to("cpu", torch.float32).numpy().tobytes())
    return digest.hexdigest()


def _shapes_digest(tensors: Mapping[str, torch.Tensor]) -> str:
    listing = "\n".join(f"{name} {tuple(tensors[name].shape)}" for name in sorted(tensors))
    return hashlib.sha256(listing.encode()).hexdigest()


def _lora_tensors(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """LoRA parameters by the plain name of their layer, as it is called without PEFT."""
    for name, parameter in model.named_parameters():
        if ".lora_" in name:
            plain = name.removeprefix("base_model.model.").replace(f".{ADAPTER}.weight", "")
            yield plain, parameter
