"""The dial on real weights: a source of tensors in which pairs of layers are rescaled, and its proof.

``StressedWeights`` stands between a model and its weights, so every backend quantizes the rescaled values
with its own code. ``prove`` computes one decoder layer in float32 with and without the factors. Adapters on
a rescaled layer have their own scaling multiplied by the same factor (``scale_adapters``): the trained
function and every LoRA gradient then stay what they are without the dial, so a healthy control reads healthy.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence

import torch
from torch import nn

from bench.ask.stress import Pair
from bench.load.weights import CPU, Weights

ADDS_BEFORE_THE_PRODUCT = ("q_proj", "k_proj", "v_proj", "up_proj")
"""Layers whose bias is part of what their partner undoes; that of o_proj and down_proj comes after it."""
SCALED_TENSORS = ("weight", "scales")
"""Of a dense layer, and of a packed one: its values are scales * (codes - zeros)."""
PROOF_TOKENS = 16
PROOF_SEED = 0
TOLERANCE = 2**-8
"""Relative difference in float32 that rounding can explain: a factor that is no power of two rounds each
weight once, by up to 2^-9 in bfloat16, in both layers. Powers of two give 0; a pair that does not undo its
factor gives a difference of the order of 1."""


class StressedWeights:
    """Another source's tensors, with the pairs' factors applied."""

    def __init__(self, weights: Weights, pairs: Sequence[Pair]) -> None:
        self.plain = weights
        """The source as it is."""
        self._factors = {name: factor for pair in pairs for name, factor in pair.factors.items()}

    def __contains__(self, name: str) -> bool:
        return name in self.plain

    def tensor(self, name: str, device: torch.device = CPU) -> torch.Tensor:
        """The tensor, rescaled where its layer is, in its own dtype."""
        tensor = self.plain.tensor(name, device)
        module, _, kind = name.rpartition(".")
        factor = self._factors.get(module)
        if factor is None or not _is_scaled(module, kind):
            return tensor
        return (tensor.double() * factor).to(tensor.dtype)


def _is_scaled(module: str, kind: str) -> bool:
    if kind == "bias":
        return module.endswith(ADDS_BEFORE_THE_PRODUCT)
    return kind in SCALED_TENSORS


def prove(model: nn.Module, dense: Weights, pairs: Sequence[Pair]) -> list[float]:
    """Compute each pair's decoder layer in float32 with and without the factors, on one random input.

    ``model``: the skeleton on the meta device. ``dense``: unquantized weights. Returns for each pair the
    largest difference, relative to the largest value that the layer adds. Raises ValueError where one is
    beyond `TOLERANCE`.
    """
    found = []
    for pair in pairs:
        plain = _contribution(model, dense, pair)
        stressed = _contribution(model, StressedWeights(dense, [pair]), pair)
        difference = float((stressed - plain).abs().max() / plain.abs().max())
        if not difference <= TOLERANCE:
            raise ValueError(
                f"rescaling {pair.scaled} by {pair.factor:g} changes what its layer computes in float32 by "
                f"{difference:.2g} of its largest value"
            )
        found.append(difference)
    return found


@torch.no_grad()
def _contribution(model: nn.Module, weights: Weights, pair: Pair) -> torch.Tensor:
    """What the pair's decoder layer adds to a random residual stream, (1, tokens, hidden), float32."""
    name = pair.scaled.rsplit(".", 2)[0]
    layer = copy.deepcopy(model.get_submodule(name)).to_empty(device="cpu").float().eval()
    for parameter_name, parameter in layer.named_parameters():
        parameter.copy_(weights.tensor(f"{name}.{parameter_name}").float())
    hidden = next(p for n, p in layer.named_parameters() if n.endswith("layernorm.weight")).numel()
    generator = torch.Generator().manual_seed(PROOF_SEED)
    stream = torch.randn(1, PROOF_TOKENS, hidden, generator=generator)
    rotary = model.get_submodule("model.rotary_emb")
    positions = rotary(stream, torch.arange(PROOF_TOKENS).unsqueeze(0))
    output = layer(stream, position_embeddings=positions)
    computed: torch.Tensor = output[0] if isinstance(output, tuple) else output
    return computed - stream


def scale_adapters(model: nn.Module, pairs: Sequence[Pair], adapter: str) -> None:
    """Multiply the adapters' own scaling (alpha over rank) on rescaled layers by their layer's factor.

    With W times s, the adapter's product times s as well: after the partner's 1/s both arrive unchanged, and
    so do the gradients of A and B.
    """
    factors = {name: factor for pair in pairs for name, factor in pair.factors.items()}
    for name, module in model.named_modules():
        factor = factors.get(name.removeprefix("base_model.model."))
        if factor is not None and isinstance(scaling := getattr(module, "scaling", None), dict):
            scaling[adapter] *= factor
