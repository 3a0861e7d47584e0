"""GPTQ: 4-bit symmetric groups along the input, out of checkpoints in AutoGPTQ's format.

Training uses gptqmodel's dequantize-and-multiply kernels: ATen on a CPU, Triton v2 (which in training
mode falls back to torch) on CUDA. Published checkpoints load as they are; models that have none are
packed once, by rounding to nearest or by real GPTQ calibration (``backends/_gptq_format.py``).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from backends import _gptqmodel as shared
from backends._gptq_format import GptqCheckpoint
from bench.load.contract import Layer

if TYPE_CHECKING:
    import torch

AUTOMATIC_KERNELS = {"cpu": "gptq_torch_aten", "cuda": "gptq_triton"}


class Gptq(GptqCheckpoint):
    """GPTQ 4-bit symmetric, groups of 128, out of a pre-quantized checkpoint (gptqmodel)."""

    variants = {"gptq": shared.PackedOptions()}
    requires = ("gptqmodel", "optimum")
    extra = "gptq"
    options: shared.PackedOptions

    def linear(self, layer: Layer) -> torch.nn.Module:
        """gptqmodel's layer, its zero points brought into the form that its kernels compute with."""
        import torch
        from gptqmodel.utils.model import convert_gptq_v1_to_v2_format_module

        kernel = shared.kernel_class("gptq", "gptq", self.options, self.device, AUTOMATIC_KERNELS)
        built = shared.fill(kernel, layer, self.options, symmetric=True, names=self.packed_names)
        if self.zero_points_are_stored_less_one:
            convert_gptq_v1_to_v2_format_module(built, bits=4, pack_dtype=torch.int32)
        built.qzero_format(format=2)
        built.post_init()
        return built  # type: ignore[no-any-return]
