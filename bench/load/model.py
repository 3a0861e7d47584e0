"""Building the model: a skeleton without memory, filled tensor by tensor, quantized layer by layer.

One function for every backend and every kind of weights (`build_model`), so that whatever is not a
quantized layer is the same in all of them by construction: same values, same dtype, same code.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from bench.load.cache import QuantizedCache
from bench.load.contract import Backend, Layer, PackedBackend, Shape
from bench.load.heap import trim_heap
from bench.load.layout import Layout, carry
from bench.load.older import in_terms_of, transformers_major
from bench.load.weights import Weights

DTYPES = {"bfloat16": torch.bfloat16, "float16": torch.float16, "float32": torch.float32}
HASH_CHUNK_BYTES = 64 * 2**20
HEAD = "lm_head.weight"


@dataclass(frozen=True)
class BuiltModel:
    """A frozen causal language model, the names of its quantized linear layers, and where its parts are."""

    model: nn.Module
    layers: tuple[str, ...]
    layout: Layout

    def quantized(self) -> Iterator[tuple[str, nn.Module]]:
        """The quantized layers by name, in the model's order."""
        for name in self.layers:
            yield name, self.model.get_submodule(name)


def skeleton(architecture: Mapping[str, Any], attention: str) -> nn.Module:
    """The model of a config.json without any weight memory: parameters on the meta device, buffers real.

    Raises ValueError for a model type that transformers does not know.
    """
    from accelerate import init_empty_weights
    from transformers import AutoConfig, AutoModelForCausalLM

    settings = {key: value for key, value in architecture.items() if key != "quantization_config"}
    settings = in_terms_of(transformers_major(), settings)
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    config.use_cache = False
    with init_empty_weights(include_buffers=False):
        model: nn.Module = AutoModelForCausalLM.from_config(
            config, attn_implementation=attention, trust_remote_code=False
        )
    model.tie_weights()  # type: ignore[operator]
    return model


def linear_shapes(model: nn.Module) -> dict[str, Shape]:
    """Every linear layer that the libraries quantize: all but the output head."""
    head = model.get_output_embeddings()  # type: ignore[operator]
    return {
        name: Shape(module.out_features, module.in_features)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) and module is not head
    }


def build_model(
    model: nn.Module,
    weights: Weights,
    backend: Backend,
    layout: Layout,
    progress: Callable[[int, int], None] = lambda done, total: None,
    cache: QuantizedCache | None = None,
) -> BuiltModel:
    """Fill ``model`` in place: linear layers through ``backend``, the rest in the compute dtype, each part
    where ``layout`` says.

    ``progress`` is called with the number of modules done and in all. ``cache``: quantized layers are read
    from it, or kept in it. Raises BrokenCache where it does not hold what was written.
    """
    dtype = DTYPES[backend.dtype]
    shapes = linear_shapes(model)
    _place_the_rest(model, weights, shapes, dtype, layout)
    for done, (name, shape) in enumerate(shapes.items()):
        progress(done, len(shapes))
        # In a function of its own, so that a layer's dense weight is gone before the next one is read.
        quantized = _quantize(name, shape, model, weights, backend, layout.device_of(name), cache)
        model.set_submodule(name, quantized, strict=True)
        if cache is not None:
            cache.keep(name, backend, quantized)
        trim_heap()
    progress(len(shapes), len(shapes))
    backend.finish(model)
    model.requires_grad_(False)
    # Training mode throughout: in eval mode several kernels take paths without a backward.
    model.train()
    carry(model, layout)
    return BuiltModel(model, tuple(shapes), layout)


def _quantize(
    name: str,
    shape: Shape,
    model: nn.Module,
    weights: Weights,
    backend: Backend,
    device: torch.device,
    cache: QuantizedCache | None,
) -> nn.Module:
    dtype = DTYPES[backend.dtype]
    bias = _bias(f"{name}.bias", shape, model.get_submodule(name).bias is not None, weights, device)
    bias = None if bias is None else bias.to(dtype)
    stored = cache.tensors(name, device) if cache is not None else None
    if stored is not None:
        return backend.restore(Layer(name, shape, stored, bias, dtype, device))
    tensors = {suffix: weights.tensor(f"{name}.{suffix}", device) for suffix in _tensor_names(backend)}
    if "weight" in tensors:
        _check_shape(f"{name}.weight", tensors["weight"], (shape.out_features, shape.in_features))
    return backend.linear(Layer(name, shape, tensors, bias, dtype, device))


def _bias(
    name: str, shape: Shape, wanted: bool, weights: Weights, device: torch.device
) -> torch.Tensor | None:
    """A layer's bias. AutoGPTQ writes one of zeros for layers of a model that has none, and that is passed
    over. Raises ValueError for one that would be lost."""
    if not wanted and name not in weights:
        return None
    bias = weights.tensor(name, device)
    if not wanted:
        if bias.count_nonzero():
            raise ValueError(f"tensor '{name}' is not zero, and the configuration has no bias there")
        return None
    _check_shape(name, bias, (shape.out_features,))
    return bias


def unquantized_digest(built: BuiltModel) -> str:
    """SHA-256 over names and bytes of everything that is not a quantized layer, as placed. The copy that a
    tied head on another device needs counts as the embedding it is."""
    digest = hashlib.sha256()
    tied = built.model.config.tie_word_embeddings  # type: ignore[union-attr]
    for name, parameter in _outside(built.model, built.layers):
        if tied and name == HEAD:
            continue
        digest.update(name.encode())
        # Of one that is cut over several processes, the whole: each of them asks for it here.
        whole = getattr(parameter, "full_tensor", parameter.detach)()
        flat = whole.detach().contiguous().view(-1).view(torch.uint8)
        for start in range(0, flat.numel(), HASH_CHUNK_BYTES):
            digest.update(flat[start : start + HASH_CHUNK_BYTES].cpu().numpy().tobytes())
    return digest.hexdigest()


def _tensor_names(backend: Backend) -> tuple[str, ...]:
    return backend.packed_names if isinstance(backend, PackedBackend) else ("weight",)


def _outside(
    model: nn.Module, layers: Mapping[str, Shape] | tuple[str, ...]
) -> Iterator[tuple[str, nn.Parameter]]:
    prefixes = tuple(f"{name}." for name in layers)
    for name, parameter in model.named_parameters():
        if not name.startswith(prefixes):
            yield name, parameter


def _check_shape(name: str, tensor: torch.Tensor, expected: tuple[int, ...]) -> None:
    if tuple(tensor.shape) != expected:
        raise ValueError(
            f"tensor '{name}' has shape {tuple(tensor.shape)}, the configuration says {expected}"
        )


def _place_the_rest(
    model: nn.Module, weights: Weights, shapes: Mapping[str, Shape], dtype: torch.dtype, layout: Layout
) -> None:
    for name, parameter in list(_outside(model, shapes)):
        owner, _, attribute = name.rpartition(".")
        value = weights.tensor(name, layout.device_of(name))
        _check_shape(name, value, tuple(parameter.shape))
        placed = nn.Parameter(value.to(dtype), requires_grad=False)
        setattr(model.get_submodule(owner), attribute, placed)
    # A tied head still holds its meta tensor; tying again points it at the placed embedding.
    model.tie_weights()  # type: ignore[operator]
    _untie_across(model, layout)
    for name, module in model.named_modules():
        for buffer_name, buffer in list(module.named_buffers(recurse=False)):
            setattr(module, buffer_name, buffer.to(layout.device_of(name)))


def _untie_across(model: nn.Module, layout: Layout) -> None:
    """A tied head in another place than the embedding needs the weight there as well."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()  # type: ignore[operator]
    there = layout.place_of(HEAD)
    if head is not None and head.weight is embedding.weight and there != layout.places[0]:
        copied = embedding.weight.detach().to(there.device, copy=True)
        head.weight = nn.Parameter(copied, requires_grad=False)
