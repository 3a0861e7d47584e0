"""AWQ: 4-bit asymmetric groups with activation-aware scaling, out of checkpoints in AutoAWQ's GEMM format.

On CUDA the computation is in float16 whatever was asked, as transformers' AWQ quantizer decides: that is
the dtype in which Qwen2 overflows, so it is recorded and shown. On a CPU gptqmodel's ATen kernel trains
in the requested dtype. It dequantizes a whole layer through 64-bit integers, several times 8 bytes a weight
(6 GB for the largest layer of Qwen2-72B); here it is given the layer in pieces, with the same result to the
bit in a third of the time.
"""

from __future__ import annotations

from types import MethodType
from typing import TYPE_CHECKING, Any

from backends import _gptqmodel as shared
from backends._awq_format import AwqCheckpoint
from bench.load.contract import DTYPE_BYTES, Layer, Shape, Workspace

if TYPE_CHECKING:
    import torch

AUTOMATIC_KERNELS = {"cpu": "awq_torch_aten", "cuda": "awq_gemm"}
DENSE_FROM_TOKENS = 1025
"""From so many rows on AwqGemmFn dequantizes in forward and multiplies densely."""
SPLITS = 8
"""Below that its kernel splits the sum in so many parts and keeps each one's product in float32."""

WEIGHTS_AT_ONCE = 2**20
"""On a CPU: pieces whose 64-bit integers stay in a processor's cache."""
BYTES_OF_A_PIECE = 24
"""A weight: what is shifted, masked and put in order, as 64-bit integers (``dequantize_gemm`` in
quantization/awq/utils/packing_utils.py of gptqmodel 7.7.0)."""
IN_PIECES = (
    "gptqmodel's kernel for a CPU, given each weight in pieces of at most 2^20: the same values to the bit, "
    "with less memory and time than it takes for a whole layer at once"
)


class Awq(AwqCheckpoint):
    """AWQ 4-bit asymmetric, groups of 128, out of a pre-quantized checkpoint (gptqmodel)."""

    variants = {"awq": shared.PackedOptions()}
    requires = ("gptqmodel", "optimum")
    extra = "awq"
    options: shared.PackedOptions

    def ready_kernels(self) -> bool:
        """On CUDA gptqmodel compiles the GEMM kernel where it is first asked for, once for each machine. That
        takes a minute or more, and the CUDA toolkit's compiler."""
        if self.device != "cuda" or self._kernel_name != AUTOMATIC_KERNELS["cuda"]:
            return False
        from gptqmodel.utils.awq import awq_runtime_available, awq_runtime_error

        if not awq_runtime_available():
            raise ImportError(
                "gptqmodel's AWQ kernel for CUDA needs the CUDA toolkit's nvcc and was not compiled here: "
                f"train with --set awq.kernel=awq_torch, or see why: {awq_runtime_error()}"
            )
        return True

    def linear(self, layer: Layer) -> torch.nn.Module:
        """gptqmodel's AWQ layer."""
        kernel = shared.kernel_class("awq", "gemm", self.options, self.device, AUTOMATIC_KERNELS)
        built = shared.fill(kernel, layer, self.options, symmetric=False, names=self.packed_names)
        built.post_init()
        if self._kernel_name == AUTOMATIC_KERNELS["cpu"]:
            # On the instance: gptqmodel wants every subclass to declare anew all that it supports.
            built.awq_weight_dequantize = MethodType(_dequantized_in_pieces, built)
            self.notes += [IN_PIECES] if IN_PIECES not in self.notes else []
        return built  # type: ignore[no-any-return]

    @property
    def _kernel_name(self) -> str:
        return AUTOMATIC_KERNELS[self.device] if self.options.kernel == "auto" else self.options.kernel

    def workspace(self, shape: Shape, tokens: int) -> Workspace:
        """The GEMM kernel on CUDA: backward dequantizes the whole weight; forward too from 1025 tokens on,
        below it holds eight partial products in float32 (nn_modules/qlinear/gemm_awq.py and
        gptqmodel_ext/awq/quantization/gemm_cuda_gen.cu of gptqmodel 7.7.0). On a CPU the forward dequantizes
        the whole weight, piece by piece, and autograd keeps it. Other kernels: as plain torch."""
        dense = shape.weights * DTYPE_BYTES[self.dtype]
        if self._kernel_name == AUTOMATIC_KERNELS["cpu"]:
            piece = min(WEIGHTS_AT_ONCE, shape.weights) * BYTES_OF_A_PIECE
            return Workspace(forward=dense + piece, backward=0, kept=dense)
        if self._kernel_name != AUTOMATIC_KERNELS["cuda"]:
            return shared.dequantizing_workspace(shape, self.dtype)
        partial = SPLITS * 4 * tokens * shape.out_features
        return Workspace(forward=dense if tokens >= DENSE_FROM_TOKENS else partial, backward=dense)


def _dequantized_in_pieces(layer: Any, device: torch.device, dtype: torch.dtype) -> torch.Tensor:
    """The weight (in x out) of gptqmodel's ``layer``, made of a few groups of input rows at a time."""
    import torch
    from gptqmodel.quantization.awq.utils.packing_utils import dequantize_gemm

    weight = torch.empty(layer.in_features, layer.out_features, device=device, dtype=dtype)
    size, groups = layer.group_size, max(1, WEIGHTS_AT_ONCE // (layer.group_size * layer.out_features))
    for first in range(0, len(layer.scales), groups):
        of_groups = slice(first, first + groups)
        rows = slice(first * size, (first + groups) * size)
        weight[rows] = dequantize_gemm(
            layer.qweight[rows], layer.qzeros[of_groups], layer.scales[of_groups], layer.bits, size
        )
    return weight
