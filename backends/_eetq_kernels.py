"""The two kernels behind ``backends/eetq.py``: a portable one in torch, and the eetq package's own.

Both layers are ``torch.nn.Linear`` subclasses with an int8 ``weight``, so PEFT puts its ordinary LoRA
layer on top of them (its own EETQ layer exists only where the ``eetq`` package imports).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from backends._blocks import row_blocks


def quantize(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Quantize a dense weight (out x in) to int8 codes (out x in) and float16 scales (out,).

    scale = absmax/128 in float32; codes = round-half-away(weight/scale) clipped to [-128, 127]
    (NetEase-FuXi/EETQ, ``symmetric_quantize``). A row of zeros keeps scale 0 and codes 0.
    """
    codes = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
    scales = torch.empty(len(weight), dtype=torch.float16, device=weight.device)
    for rows in row_blocks(weight):
        codes[rows], scales[rows] = _quantize_rows(weight[rows])
    return codes, scales


def _quantize_rows(weight: Tensor) -> tuple[Tensor, Tensor]:
    dense = weight.to(torch.float32)
    scale = dense.abs().amax(dim=1) / 128
    ratio = dense / torch.where(scale > 0, scale, 1.0).unsqueeze(1)
    # torch.round rounds halves to even; EETQ's C++ rounds them away from zero.
    # Adding 0.5 and truncating would not do either: 0.49999997 + 0.5 is 1 in float32.
    whole = torch.trunc(ratio)
    codes = whole + torch.sign(ratio) * ((ratio - whole).abs() >= 0.5)
    codes = codes.clamp(-128, 127).to(torch.int8)
    return codes, scale.to(torch.float16)


class _DequantizedMatmul(torch.autograd.Function):
    """x (..., in) times the dequantized weight; only the codes and scales are kept for backward."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        ctx.save_for_backward(codes, scale)
        return x @ (codes.to(x.dtype) * scale.to(x.dtype).unsqueeze(1)).t()

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        codes, scale = ctx.saved_tensors
        (gradient,) = gradients
        return gradient @ (codes.to(gradient.dtype) * scale.to(gradient.dtype).unsqueeze(1)), None, None


class _Int8Linear(nn.Linear):
    """A frozen linear layer whose ``weight`` is int8 codes and whose ``weight_scale`` is float16."""

    weight_scale: Tensor

    def __init__(
        self, out_features: int, in_features: int, codes: Tensor, scale: Tensor, bias: Tensor | None
    ) -> None:
        super().__init__(in_features, out_features, bias=bias is not None, device="meta")
        self.weight = nn.Parameter(codes, requires_grad=False)
        self.register_buffer("weight_scale", scale)
        if bias is not None:
            self.bias = nn.Parameter(bias, requires_grad=False)


class PortableLinear(_Int8Linear):
    """W8A16 on any device and dtype."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__(codes.shape[0], codes.shape[1], codes, scale, bias)

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        out: Tensor = _DequantizedMatmul.apply(x, self.weight, self.weight_scale)
        return out if self.bias is None else out + self.bias


class _NativeMatmul(torch.autograd.Function):
    """EETQ's GEMM. Its weight layout is interleaved for the tensor cores and has no inverse in the
    package, so backward recovers the dense weight as the upstream integration does: GEMM with identity."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor, scale: Tensor) -> Tensor:
        from eetq import w8_a16_gemm

        ctx.save_for_backward(codes, scale)
        return w8_a16_gemm(x, codes, scale)  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        from eetq import w8_a16_gemm

        codes, scale = ctx.saved_tensors
        (gradient,) = gradients
        identity = torch.eye(codes.shape[0], dtype=gradient.dtype, device=gradient.device)
        return gradient @ w8_a16_gemm(identity, codes, scale).t(), None, None


class NativeLinear(_Int8Linear):
    """EETQ's own kernel: CUDA and float16 only; codes are (in x out), interleaved."""

    def __init__(self, codes: Tensor, scale: Tensor, bias: Tensor | None) -> None:
        super().__init__(codes.shape[1], codes.shape[0], codes, scale, bias)

    @classmethod
    def quantized(cls, weight: Tensor, bias: Tensor | None, device: torch.device) -> NativeLinear:
        """The layer of a dense weight (out x in), which the package quantizes on the CPU, in float16 and
        transposed."""
        from eetq import quant_weights

        codes, scale = quant_weights(weight.to(torch.float16).t().contiguous().cpu(), torch.int8, False)
        return cls(codes.to(device), scale.to(device), bias)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(torch.float16)
        out: Tensor = _NativeMatmul.apply(x, self.weight, self.weight_scale)
        return out if self.bias is None else out + self.bias
