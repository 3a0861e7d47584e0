"""Fidelity: how far a quantized model's LoRA gradient is from the unquantized one, on one fixed batch.

Adapters are set to fixed values with a non-zero B (while B is zero the gradient of A is exactly zero, and
half of the comparison would be about nothing). The batch is the first of the work. A reference is a file
of gradients by tensor name, made once by the unquantized backend (`make_reference`).
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import nn

from bench.load.contract import Shape
from bench.load.lora import initial_values
from bench.load.model import DTYPES, BuiltModel
from bench.load.weights import Weights, seed_of
from bench.probe.ranges import Place
from bench.record.stability import Fidelity, LayerFidelity, WeightError
from bench.run.training import Trainer, micro_batch_loss
from bench.run.workload import Batch

ADAPTER_SEED = 20_240_914
LARGEST_B = 0.02
"""B is uniform in +-0.02: with rank 8 and alpha 16 the update B A is then a few percent of the weights, as
after some hundreds of steps, so the model still is the model."""
IDENTITY_ROWS = 1024
"""Rows of the identity that go through a layer at once."""


def gradients_on(trainer: Trainer, batch: Batch) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and LoRA gradients by name, float32 on the CPU, from the fixed adapters; no scaler, no update."""
    with torch.no_grad():
        for name, parameter in trainer.adapters.tensors.items():
            parameter.copy_(fixed_values(name, parameter.shape))
            parameter.grad = None
    loss = micro_batch_loss(trainer, batch)
    scale = FLOAT16_SCALE if trainer.dtype == torch.float16 else 1.0
    (loss * scale).backward()  # type: ignore[no-untyped-call]
    found = {
        name: parameter.grad.detach().to("cpu", torch.float32) / scale
        for name, parameter in trainer.adapters.tensors.items()
        if parameter.grad is not None
    }
    for parameter in trainer.parameters:
        parameter.grad = None
    return float(loss.detach()), found


FLOAT16_SCALE = 1024.0
"""Loss scale of the comparison in float16: small gradients would be flushed to zero without one, and a
fixed scale keeps the comparison the same for all backends."""


def fixed_values(name: str, shape: torch.Size) -> torch.Tensor:
    """Float32 values of one LoRA tensor, by its name: A as at the start of a training, B not zero."""
    if not name.endswith("lora_B"):
        return initial_values(name, shape, ADAPTER_SEED)
    generator = torch.Generator().manual_seed(seed_of(name, ADAPTER_SEED))
    return torch.empty(shape).uniform_(-LARGEST_B, LARGEST_B, generator=generator)


def batch_digest(batch: Batch) -> str:
    """SHA-256 over ids, labels and mask."""
    digest = hashlib.sha256()
    for tensor in (batch.input_ids, batch.labels, batch.attention_mask):
        digest.update(tensor.numpy().tobytes())
    return digest.hexdigest()


def make_reference(trainer: Trainer, batch: Batch, file: Path) -> None:
    """Write the gradients of an unquantized model to ``file``, whole or not at all."""
    loss, gradients = gradients_on(trainer, batch)
    dtype = next(name for name, known in DTYPES.items() if known == trainer.dtype)
    facts = {"loss": loss, "batch": batch_digest(batch), "dtype": dtype}
    file.parent.mkdir(parents=True, exist_ok=True)
    part = file.with_suffix(f".{os.getpid()}.part")
    save_file(gradients, part, metadata={"facts": json.dumps(facts)})
    part.replace(file)


def compare_gradients(trainer: Trainer, batch: Batch, file: Path) -> Fidelity:
    """The trainer's gradients beside the reference in ``file``, over all and by decoder layer."""
    with safe_open(file, framework="pt") as opened:
        facts = json.loads(opened.metadata()["facts"])
        reference = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 - not a dict
    digest = batch_digest(batch)
    if digest != facts["batch"]:
        return Fidelity(batch_digest=digest, note="the reference was made on another batch")
    loss, own = gradients_on(trainer, batch)
    if own.keys() != reference.keys() or any(own[n].shape != reference[n].shape for n in own):
        return Fidelity(batch_digest=digest, note="the adapters have other shapes than the reference's")
    layers: dict[int, list[str]] = {}
    for name in own:
        layer = Place(name, "output").layer
        if layer is not None:
            layers.setdefault(layer, []).append(name)
    return Fidelity(
        reference_dtype=facts["dtype"],
        batch_digest=digest,
        loss=loss,
        reference_loss=facts["loss"],
        overall=_compared(own, reference, own),
        layers=tuple(_compared(own, reference, layers[layer]) for layer in sorted(layers)),
    )


def _compared(
    own: Mapping[str, torch.Tensor], reference: Mapping[str, torch.Tensor], names: Iterable[str]
) -> LayerFidelity:
    dot = squares = reference_squares = difference = 0.0
    for name in names:
        a, b = own[name].double().flatten(), reference[name].double().flatten()
        dot += float(a @ b)
        squares += float(a @ a)
        reference_squares += float(b @ b)
        difference += float((a - b) @ (a - b))
    if not reference_squares:
        return LayerFidelity(cosine=None, norm_ratio=None, relative_error=None)
    both = math.sqrt(squares) * math.sqrt(reference_squares)
    return LayerFidelity(
        cosine=dot / both if both else None,
        norm_ratio=math.sqrt(squares / reference_squares),
        relative_error=math.sqrt(difference / reference_squares),
    )


@torch.no_grad()
def weight_errors(
    built: BuiltModel, shapes: Mapping[str, Shape], dense: Weights, dtype: torch.dtype
) -> tuple[WeightError, ...]:
    """How far each kind of projection's weights are from the dense ones, as the kernel multiplies them.

    A layer's weights are read by sending the identity through it, so what is compared is what trains; the
    result is rounded to the compute dtype (bfloat16: 0.0017 relative).
    """
    sums: dict[str, tuple[float, float]] = {}
    worst: dict[str, tuple[float, str]] = {}
    for name in built.layers:
        module = built.model.get_submodule(name)
        layer = getattr(module, "base_layer", module)
        error, size = _layer_error(layer, dense.tensor(f"{name}.weight"), shapes[name], dtype)
        kind = name.rpartition(".")[2]
        before = sums.get(kind, (0.0, 0.0))
        sums[kind] = (before[0] + error, before[1] + size)
        relative = math.sqrt(error / size) if size else 0.0
        if kind not in worst or not relative <= worst[kind][0]:
            worst[kind] = (relative, name)
    return tuple(
        WeightError(
            projection=kind,
            relative_error=math.sqrt(error / size),
            worst_module=worst[kind][1],
            worst_relative_error=worst[kind][0],
        )
        for kind, (error, size) in sums.items()
    )


def _layer_error(
    layer: nn.Module, dense: torch.Tensor, shape: Shape, dtype: torch.dtype
) -> tuple[float, float]:
    """Squared Frobenius norms: of the difference, and of the dense weight."""
    device = next((t.device for t in [*layer.parameters(), *layer.buffers()]), torch.device("cpu"))
    error = size = 0.0
    for start in range(0, shape.in_features, IDENTITY_ROWS):
        rows = min(IDENTITY_ROWS, shape.in_features - start)
        identity = torch.zeros(rows, shape.in_features, dtype=dtype, device=device)
        identity[torch.arange(rows), start + torch.arange(rows)] = 1
        # As in training: some layers leave it to autocast that both factors have one dtype.
        with torch.autocast(device.type, dtype, enabled=dtype != torch.float32):
            seen = _without_bias(layer, identity).float()
        wanted = dense[:, start : start + rows].to(device, torch.float32).t()
        error += float((seen - wanted).double().square().sum())
        size += float(wanted.double().square().sum())
    return error, size


def _without_bias(layer: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """The product alone: a bias added in 16 bits would round it."""
    bias = getattr(layer, "bias", None)
    if not isinstance(bias, torch.Tensor):
        product: torch.Tensor = layer(rows)
        return product
    layer.bias = None  # type: ignore[assignment]
    try:
        product = layer(rows)
    finally:
        layer.bias = bias
    return product
