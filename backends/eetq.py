"""EETQ: int8 weights, one symmetric scale for each output channel, activations in 16 bit (W8A16).

Quantization as EETQ defines it: scale = absmax/128 in float32, stored as float16; codes =
round-half-away(weight/scale) clipped to [-128, 127].

Two kernels. On a CUDA device with the ``eetq`` package (NetEase-FuXi/EETQ, built from source; it knows
float16 only) its own GEMM runs. Anywhere else a portable one does: int8 stays int8 in memory, and
forward and backward multiply by the weight dequantized on the fly, so the backward does not recover the
weight by multiplying an identity matrix as the upstream integration does. The record names the kernel.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from typing import TYPE_CHECKING, Any, Literal

from bench.ask.experiment import Dtype
from bench.load.contract import DTYPE_BYTES, Backend, Layer, Options, Shape, Workspace

if TYPE_CHECKING:
    import torch


class EetqOptions(Options):
    """Options of the EETQ backend."""

    kernel: Literal["auto", "portable", "native"] = "auto"


class Eetq(Backend):
    """EETQ int8 per output channel, W8A16: native CUDA kernel where installed, else a portable one."""

    variants = {"eetq": EetqOptions()}
    refused_placements = {}
    extra = "eetq"
    codes = ("weight",)
    uncached = None
    options: EetqOptions

    @property
    def native(self) -> bool:
        """Whether the eetq package's own kernel runs."""
        possible = self.device == "cuda" and importlib.util.find_spec("eetq") is not None
        if self.options.kernel == "native" and not possible:
            raise ValueError(
                "EETQ's native kernel needs a CUDA device and the eetq package; "
                "use eetq.kernel=auto or portable"
            )
        return possible and self.options.kernel != "portable"

    def effective_dtype(self, requested: Dtype) -> Dtype:
        """The native GEMM reinterprets its input's bytes as float16, whatever they are."""
        if self.native and requested != "float16":
            self.notes.append(f"float16 instead of {requested}: EETQ's native kernel knows nothing else")
            return "float16"
        return requested

    def linear(self, layer: Layer) -> torch.nn.Module:
        """A frozen int8 layer; the weight is (out x in) int8 for the portable kernel."""
        from backends._eetq_kernels import NativeLinear, PortableLinear, quantize

        if self.native:
            return NativeLinear.quantized(layer.tensors["weight"], layer.bias, layer.device)
        codes, scale = quantize(layer.tensors["weight"].to(layer.device))
        return PortableLinear(codes, scale, layer.bias)

    def store(self, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Codes as the kernel lays them out, and a scale for each output channel."""
        kernel: Any = layer
        return {"codes": kernel.weight, "scale": kernel.weight_scale}

    def restore(self, layer: Layer) -> torch.nn.Module:
        """The layer from its codes."""
        from backends._eetq_kernels import NativeLinear, PortableLinear

        kind = NativeLinear if self.native else PortableLinear
        return kind(layer.tensors["codes"], layer.tensors["scale"], layer.bias)

    def stored_form(self) -> str:
        """The two kernels lay codes out differently, and which one runs "auto" does not say."""
        if not self.native:
            return "portable"
        try:
            return f"eetq {importlib.metadata.version('eetq')}"
        except importlib.metadata.PackageNotFoundError:
            return "eetq"

    def expected_bits(self, shape: Shape) -> float:
        """8 bits, and one float16 scale for each output channel."""
        return 8 + 16 / shape.in_features

    def kernel(self, layer: torch.nn.Module) -> str:
        """Says which of the two kernels computed."""
        return "eetq native (w8_a16_gemm)" if self.native else "portable torch int8 (W8A16)"

    def workspace(self, shape: Shape, tokens: int) -> Workspace:
        """Portable: the whole weight in the compute dtype twice, before and after its scales, in forward and
        backward. Native: none in forward; in backward an identity as wide as the input, and the weight that
        is recovered by multiplying it (``backends/_eetq_kernels.py``)."""
        width = DTYPE_BYTES[self.dtype]
        if self.native:
            return Workspace(forward=0, backward=width * (shape.in_features**2 + shape.weights))
        return Workspace(forward=2 * width * shape.weights, backward=2 * width * shape.weights)
