"""AutoAWQ: the checkpoints of ``backends/awq.py``, trained as people did before gptqmodel replaced it.

Its last release (0.2.9, 2025) was tested with transformers 4.51, so it runs in the environment ``legacy``.
Its layers compute in float16 whatever they are given. What trains is its GEMM layer, with the kernels of
autoawq-kernels where they are installed and Triton's elsewhere.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from backends import _four_bit
from backends._awq_format import AwqCheckpoint
from bench.load.contract import DTYPE_BYTES, Layer, Shape, Workspace

if TYPE_CHECKING:
    import torch


class AutoAwq(AwqCheckpoint):
    """AWQ 4-bit asymmetric, groups of 128, the same checkpoints as 'awq' (AutoAWQ, an older stack; CUDA)."""

    variants = {"autoawq": _four_bit.GroupOptions()}
    environments = ("legacy",)
    requires = ("awq",)
    distributions = {"awq": "autoawq"}
    checkpoint_of = "awq"
    refused_devices = {
        "cpu": "AutoAWQ's kernels with a backward are for CUDA; on a CPU it asks for "
        "intel-extension-for-pytorch, which has none"
    }

    def linear(self, layer: Layer) -> torch.nn.Module:
        """AutoAWQ's GEMM layer."""
        from awq.modules.linear.gemm import WQLinear_GEMM

        size = layer.shape
        built = WQLinear_GEMM(
            w_bit=4,
            group_size=self.options.group_size,
            in_features=size.in_features,
            out_features=size.out_features,
            bias=layer.bias is not None,
            dev=layer.device,
            training=True,
        )
        _four_bit.take(built, layer, self.packed_names)
        built.requires_grad_(False)
        return built  # type: ignore[no-any-return]

    def workspace(self, shape: Shape, tokens: int) -> Workspace:
        """The whole weight in float16 in both directions: its fused kernels take over below 1024 tokens in
        forward, which is not counted on (``WQLinearMMFunction`` of autoawq 0.2.9)."""
        dense = shape.weights * DTYPE_BYTES[self.dtype]
        return Workspace(forward=dense, backward=dense)
