"""AWQ: 4-bit asymmetric groups with activation-aware scaling, out of checkpoints in AutoAWQ's GEMM format.

On CUDA the computation is in float16 whatever was asked, as transformers' AWQ quantizer decides: that is
the dtype in which Qwen2 overflows, so it is recorded and shown. On a CPU gptqmodel's ATen kernel trains
in the requested dtype. It dequantizes a whole layer through 64-bit integers, several times 8 bytes a weight
(6 GB for the largest layer of Qwen2-72B); here it is given the layer in pieces, with the same result to the
bit in a third of the time.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any

from backends import _gptqmodel as shared
from bench.ask.experiment import Dtype
from bench.load.contract import DTYPE_BYTES, Layer, PackedBackend, Shape, Workspace

if TYPE_CHECKING:
    import torch

AUTOMATIC_KERNELS = {"cpu": "awq_torch_aten", "cuda": "awq_gemm"}
COLUMN_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's interleave of 8 output columns in a word."""
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


class Awq(PackedBackend):
    """AWQ 4-bit asymmetric, groups of 128, out of a pre-quantized checkpoint (gptqmodel)."""

    variants = {"awq": shared.PackedOptions()}
    refused_placements = {"fsdp": shared.NOT_CUT}
    requires = ("gptqmodel", "optimum")
    extra = "awq"
    codes = ("qweight",)
    adapter_casts_input = False
    method = "awq"
    calibration_moves_scales = True
    packed_names = ("qweight", "qzeros", "scales")
    options: shared.PackedOptions

    def effective_dtype(self, requested: Dtype) -> Dtype:
        """float16 on CUDA (transformers' AwqQuantizer.update_dtype); as asked on a CPU."""
        if self.device == "cuda" and requested != "float16":
            self.notes.append(f"float16 instead of {requested}: the AWQ kernels on CUDA compute in float16")
            return "float16"
        return requested

    def fit(self, shapes: Sequence[Shape]) -> None:
        """Replace a group size that does not divide the input features."""
        self.options, note = shared.fitted(self.options, shapes, self.device)
        self.notes += [note] if note else []

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take over a published checkpoint's group size; only the GEMM layout trains."""
        group = shared.checked_group(config, self.method, self.device)
        layout = str(config.get("version", config.get("format", "gemm"))).lower()
        if layout != "gemm":
            raise ValueError(f"the checkpoint's layout '{layout}' is not 'gemm', the one that trains")
        self.options, note = shared.regrouped(self.options, group, "as the checkpoint has it")
        self.notes += [note] if note else []

    def config(self) -> dict[str, Any]:
        """As AutoAWQ writes it."""
        return {
            "quant_method": "awq",
            "bits": 4,
            "group_size": self.options.group_size,
            "zero_point": True,
            "version": "gemm",
            "modules_to_not_convert": None,
        }

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Round to nearest without activation scaling: scale = (max - min)/15 of each group."""
        import torch

        dense = weight.to(torch.float32)
        rows, columns = dense.shape
        groups = dense.reshape(rows, -1, self.options.group_size)
        low, high = groups.amin(dim=2).clamp_max(0), groups.amax(dim=2).clamp_min(0)
        scale = ((high - low) / 15).to(torch.float16)  # (out, groups)
        step = torch.where(scale > 0, scale.to(torch.float32), 1.0)
        zeros = torch.round(-low / step).clamp(0, 15)
        codes = (torch.round(groups / step.unsqueeze(2)) + zeros.unsqueeze(2)).clamp(0, 15)
        codes = codes.reshape(rows, columns).to(torch.int32).t().contiguous()
        return {
            "qweight": shared.pack_columns(codes, COLUMN_ORDER),
            "qzeros": shared.pack_columns(zeros.to(torch.int32).t().contiguous(), COLUMN_ORDER),
            "scales": scale.t().contiguous(),
        }

    def draw(
        self, shape: Shape, deviation: float, generator: torch.Generator, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Even codes; zero points of 7 and 8, on either side of the codes' mean."""
        import torch

        groups, words = shape.in_features // self.options.group_size, shape.out_features // 8
        sevens = torch.full((groups, words), 0x77777777, dtype=torch.int32, device=device)
        # 7 + 1 = 8: each zero point is raised or not by a bit of its own.
        raised = shared.random_words((groups, words), generator, device) & 0x11111111
        return {
            "qweight": shared.random_words((shape.in_features, words), generator, device),
            "qzeros": sevens + raised,
            "scales": shared.random_scales((groups, shape.out_features), deviation, generator, device),
        }

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

    def expected_bits(self, shape: Shape) -> float:
        """4 + (16 + 4)/group for float16 scales and packed zeros."""
        return 4 + 20 / self.options.group_size

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

    def calibrate(self, model_folder: Path, output: Path, texts: Sequence[str]) -> str:
        """Real AWQ (scales searched on activations, 2306.00978) by gptqmodel."""
        shared.run_calibration(
            model_folder,
            output,
            texts,
            {
                "bits": 4,
                "group_size": self.options.group_size,
                "sym": False,
                "quant_method": "awq",
                "format": "gemm",
            },
        )
        return "awq"


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
