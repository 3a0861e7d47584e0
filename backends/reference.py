"""The unquantized reference: what every quantized backend is compared with."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.load.contract import Backend, Layer, Options, Shape, Workspace

if TYPE_CHECKING:
    import torch


class Reference(Backend):
    """No quantization: plain linear layers in the compute dtype (bfloat16 by default)."""

    variants = {"bf16": Options()}
    refused_placements = {}
    uncached = "nothing is quantized"

    def linear(self, layer: Layer) -> torch.nn.Module:
        """A torch.nn.Linear whose weight is cast to the compute dtype."""
        import torch

        dense = torch.nn.Linear(
            layer.shape.in_features, layer.shape.out_features, bias=layer.bias is not None, device="meta"
        )
        weight = layer.tensors["weight"].to(device=layer.device, dtype=layer.dtype, copy=True)
        dense.weight = torch.nn.Parameter(weight, requires_grad=False)
        if layer.bias is not None:
            dense.bias = torch.nn.Parameter(layer.bias, requires_grad=False)
        return dense

    def expected_bits(self, shape: Shape) -> float:
        """The width of the compute dtype."""
        return 32.0 if self.dtype == "float32" else 16.0

    def workspace(self, shape: Shape, tokens: int) -> Workspace:
        """None: the weight is multiplied as it lies."""
        return Workspace(forward=0, backward=0)
