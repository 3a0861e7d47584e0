"""The GPTQ checkpoint, which ``backends/gptq.py`` and ``backends/auto_gptq.py`` both train on.

4-bit symmetric groups along the input in AutoGPTQ's format: how one is packed, drawn, calibrated and read,
and what it weighs. How a layer of it computes is each adapter's own.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from backends import _four_bit, _gptqmodel
from bench.load.contract import Shape, Workspace

if TYPE_CHECKING:
    import torch


class GptqCheckpoint(_four_bit.FourBitCheckpoint):
    """A backend on GPTQ checkpoints."""

    method = "gptq"
    packed_names = ("qweight", "qzeros", "scales", "g_idx")
    zero_points_are_stored_less_one = True
    """AutoGPTQ's first format ("gptq") stores zero - 1; "gptq_v2" stores zero."""

    def check_layout(self, config: Mapping[str, Any]) -> None:
        """Either zero-point format; which one it is decides how zero points are read."""
        layout = config.get("checkpoint_format", config.get("format", "gptq"))
        if layout not in ("gptq", "gptq_v2"):
            raise ValueError(f"the checkpoint's format '{layout}' is not 'gptq' or 'gptq_v2'")
        self.zero_points_are_stored_less_one = layout == "gptq"

    def config(self) -> dict[str, Any]:
        """As AutoGPTQ writes it."""
        return {
            "quant_method": "gptq",
            "bits": 4,
            "group_size": self.options.group_size,
            "desc_act": False,
            "sym": True,
            "checkpoint_format": "gptq",
            "true_sequential": True,
            "damp_percent": 0.01,
        }

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Round to nearest: scale = 2*absmax/15 of each group, zero point 8, w = scale * (code - 8)."""
        import torch

        dense = weight.to(torch.float32)
        rows, columns = dense.shape
        groups = dense.reshape(rows, -1, self.options.group_size)
        scale = (groups.abs().amax(dim=2) * 2 / 15).to(torch.float16)  # (out, groups)
        step = torch.where(scale > 0, scale.to(torch.float32), 1.0).unsqueeze(2)
        codes = (torch.round(groups / step) + 8).clamp(0, 15).reshape(rows, columns).to(torch.int32)
        zeros = torch.full((scale.shape[1], rows), 8 - 1, dtype=torch.int32)
        index = torch.arange(columns, dtype=torch.int32) // self.options.group_size
        return {
            "qweight": _four_bit.pack_rows(codes.t().contiguous()),
            "qzeros": _four_bit.pack_columns(zeros, range(8)),
            "scales": scale.t().contiguous(),
            "g_idx": index,
        }

    def draw(
        self, shape: Shape, deviation: float, generator: torch.Generator, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """Even codes around the zero point 8, which its first format stores as 7."""
        import torch

        groups = shape.in_features // self.options.group_size
        index = torch.arange(shape.in_features, dtype=torch.int32, device=device)
        return {
            "qweight": _four_bit.random_words(
                (shape.in_features // 8, shape.out_features), generator, device
            ),
            "qzeros": torch.full(
                (groups, shape.out_features // 8), 0x77777777, dtype=torch.int32, device=device
            ),
            "scales": _four_bit.random_scales((groups, shape.out_features), deviation, generator, device),
            "g_idx": index // self.options.group_size,
        }

    def expected_bits(self, shape: Shape) -> float:
        """4 + (16 + 4)/group for float16 scales and packed zeros, a 32-bit group index for each input, and
        the library's table of 8 shifts."""
        return 4 + 20 / self.options.group_size + 32 / shape.out_features + 8 * 32 / shape.weights

    def workspace(self, shape: Shape, tokens: int) -> Workspace:
        """As of a kernel in plain torch."""
        return _gptqmodel.dequantizing_workspace(shape, self.dtype)

    def calibrate(self, model_folder: Path, output: Path, texts: Sequence[str]) -> str:
        """Real GPTQ (second-order rounding, 2210.17323) by gptqmodel."""
        _gptqmodel.run_calibration(
            model_folder,
            output,
            texts,
            {
                "bits": 4,
                "group_size": self.options.group_size,
                "desc_act": False,
                "sym": True,
                "quant_method": "gptq",
                "format": "gptq",
            },
        )
        return "gptq"
