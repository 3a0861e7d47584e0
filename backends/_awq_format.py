"""The AWQ checkpoint, which ``backends/awq.py`` and ``backends/autoawq.py`` both train on.

4-bit asymmetric groups in AutoAWQ's GEMM format: how one is packed, drawn, calibrated and read, and what it
weighs. How a layer of it computes is each adapter's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends import _four_bit, _gptqmodel
from bench.ask.experiment import Dtype
from bench.load.contract import Shape

if TYPE_CHECKING:
    import torch

COLUMN_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
"""AutoAWQ's interleave of 8 output columns in a word."""


class AwqCheckpoint(_four_bit.FourBitCheckpoint):
    """A backend on AWQ checkpoints."""

    adapter_casts_input = False
    method = "awq"
    calibration_moves_scales = True
    packed_names = ("qweight", "qzeros", "scales")

    def effective_dtype(self, requested: Dtype) -> Dtype:
        """float16 on CUDA (transformers' AwqQuantizer.update_dtype); as asked on a CPU."""
        if self.device == "cuda" and requested != "float16":
            self.notes.append(f"float16 instead of {requested}: the AWQ kernels on CUDA compute in float16")
            return "float16"
        return requested

    def check_layout(self, config: Mapping[str, Any]) -> None:
        """Only the GEMM layout trains."""
        layout = str(config.get("version", config.get("format", "gemm"))).lower()
        if layout != "gemm":
            raise ValueError(f"the checkpoint's layout '{layout}' is not 'gemm', the one that trains")

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
            "qweight": _four_bit.pack_columns(codes, COLUMN_ORDER),
            "qzeros": _four_bit.pack_columns(zeros.to(torch.int32).t().contiguous(), COLUMN_ORDER),
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
        raised = _four_bit.random_words((groups, words), generator, device) & 0x11111111
        return {
            "qweight": _four_bit.random_words((shape.in_features, words), generator, device),
            "qzeros": sevens + raised,
            "scales": _four_bit.random_scales((groups, shape.out_features), deviation, generator, device),
        }

    def expected_bits(self, shape: Shape) -> float:
        """4 + (16 + 4)/group for float16 scales and packed zeros."""
        return 4 + 20 / self.options.group_size

    def calibrate(self, model_folder: Path, output: Path, texts: Sequence[str]) -> str:
        """Real AWQ (scales searched on activations, 2306.00978) by gptqmodel."""
        _gptqmodel.run_calibration(
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
