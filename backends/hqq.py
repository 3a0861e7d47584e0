"""HQQ: half-quadratic quantization, 4 bits in groups of 64, built layer by layer with hqq itself.

transformers' ``HqqConfig`` does not load in the 5.x releases (its quantizer has no quantize operation),
so each layer is an ``HQQLinear`` made from its dense weight while the model is loaded. The default
backend of HQQLinear is named explicitly: it is process-wide state that other code can change, and ATEN
falls back to it silently where its extension is missing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Literal

from backends import _blocks
from bench.load.contract import (
    DTYPE_BYTES,
    Backend,
    Layer,
    Options,
    Shape,
    Workspace,
    largest_dividing_group,
)

if TYPE_CHECKING:
    import torch


class HqqOptions(Options):
    """Options of hqq's BaseQuantizeConfig."""

    bits: Literal[2, 4, 8] = 4
    group_size: int = 64
    axis: Literal[0, 1] = 1
    optimize: bool = True
    """Run the half-quadratic solver for the zero points; False: round to nearest."""


class Hqq(Backend):
    """HQQ 4-bit in groups of 64, zero points found by its half-quadratic solver, no calibration data."""

    variants = {"hqq": HqqOptions()}
    refused_placements = {}
    requires = ("hqq",)
    extra = "hqq"
    codes = ("W_q",)
    adapter_casts_input = False
    uncached = None
    options: HqqOptions

    def fit(self, shapes: Sequence[Shape]) -> None:
        """Replace a group size that does not divide the input features."""
        if not self.options.optimize:
            self.notes.append("zero points are rounded to nearest: the half-quadratic solver is off")
        wanted = self.options.group_size
        group = largest_dividing_group(shapes, wanted, [8, 16, 32, 64, 128, 256, 512, 1024])
        if group is None:
            raise ValueError(f"no HQQ group size up to {wanted} divides every layer's input features")
        if group != wanted:
            self.notes.append(f"group size {group} instead of {wanted}, which does not divide every layer")
            self.options = self.options.model_copy(update={"group_size": group})
        if self.options.optimize and any(self._in_pieces(shape.weights) for shape in shapes):
            self.notes.append(
                f"layers of more than {_blocks.WEIGHTS_AT_ONCE} weights are quantized in pieces on a CPU, "
                "and the solver ends in each by the piece's mean error instead of the layer's"
            )
        packed = 8 // self.options.bits
        if self.options.axis == 1 and any(shape.weights // group % packed for shape in shapes):
            raise ValueError(
                f"hqq packs {packed} groups to a byte: each layer's number of groups must divide by it"
            )

    def linear(self, layer: Layer) -> torch.nn.Module:
        """A frozen HQQLinear that dequantizes again in backward (hqq's memory-saving autograd function)."""
        import torch
        from hqq.core.quantize import HQQBackend, HQQLinear

        HQQLinear.set_backend(HQQBackend.PYTORCH)
        config = self._config()
        weight = layer.tensors["weight"].to(layer.device)
        if self._in_pieces(weight.numel()):
            return self._layer(layer, *_quantize_in_blocks(weight, config["weight_quant_params"]))
        dense = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
        dense.weight = torch.nn.Parameter(weight, requires_grad=False)
        built = HQQLinear(dense, config, compute_dtype=layer.dtype, device=str(layer.device))
        built.bias = layer.bias
        return built  # type: ignore[no-any-return]

    def _in_pieces(self, weights: int) -> bool:
        """Whether a layer is too large for hqq's temporaries of several times its float32 size. On CUDA its
        solver computes in float16 and in the card's memory."""
        return self.device == "cpu" and self.options.axis == 1 and weights > _blocks.WEIGHTS_AT_ONCE

    def store(self, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Packed codes, and a scale and a zero for each group in the compute dtype."""
        built: Any = layer
        return {"codes": built.W_q, "scale": built.meta["scale"], "zero": built.meta["zero"]}

    def restore(self, layer: Layer) -> torch.nn.Module:
        """The layer from its codes; everything else of hqq's meta-data follows from options and shape."""
        import torch
        from hqq.core.quantize import HQQBackend, HQQLinear, Quantizer

        HQQLinear.set_backend(HQQBackend.PYTORCH)
        options, tensors = self.options, layer.tensors
        packing = Quantizer.bit_to_packing[options.bits]
        meta = {
            "nbits": options.bits,
            "group_size": options.group_size,
            "axis": options.axis,
            "shape": torch.Size((layer.shape.out_features, layer.shape.in_features)),
            "scale": tensors["scale"],
            "zero": tensors["zero"],
            "packing": packing,
            "unpack_view_dtype": Quantizer.unpack_view_dtype[packing],
            "view_as_float": False,
            "quant_scale": False,
            "quant_zero": False,
        }
        return self._layer(layer, tensors["codes"], meta)

    def _config(self) -> dict[str, Any]:
        from hqq.core.quantize import BaseQuantizeConfig

        config: dict[str, Any] = BaseQuantizeConfig(
            nbits=self.options.bits, group_size=self.options.group_size, axis=self.options.axis
        )
        config["weight_quant_params"]["optimize"] = self.options.optimize
        return config

    def _layer(self, layer: Layer, codes: torch.Tensor, meta: dict[str, Any]) -> torch.nn.Module:
        """A layer around codes that are there already."""
        from hqq.core.quantize import HQQLinear

        device = str(layer.device)
        built = HQQLinear(None, self._config(), compute_dtype=layer.dtype, device=device, initialize=False)
        built.out_features, built.in_features = layer.shape.out_features, layer.shape.in_features
        built.W_q, built.meta = codes, meta
        built.cuda(device)  # to the device named, whichever it is
        built.ready = True
        built.bias = layer.bias
        return built  # type: ignore[no-any-return]

    def expected_bits(self, shape: Shape) -> float:
        """Codes, and for each group a scale and a zero in the compute dtype: 4 + 2*16/64 = 4.5."""
        return self.options.bits + 2 * (32 if self.dtype == "float32" else 16) / self.options.group_size

    def kernel(self, layer: torch.nn.Module) -> str:
        """HQQLinear and its process-wide backend."""
        return f"HQQLinear[{type(layer).backend.name}]"  # type: ignore[attr-defined]

    def workspace(self, shape: Shape, tokens: int) -> Workspace:
        """The whole weight in the compute dtype, three times at once: unpacked, less its zero points, and
        times its scales. Forward and backward each dequantize anew (core/quantize.py of hqq 0.2.8:
        ``Quantizer.dequantize``, ``HQQMatmulNoCacheMul``)."""
        dense = 3 * shape.weights * DTYPE_BYTES[self.dtype]
        return Workspace(forward=dense, backward=dense)


def _quantize_in_blocks(weight: torch.Tensor, params: dict[str, Any]) -> tuple[torch.Tensor, dict[str, Any]]:
    """What hqq's ``Quantizer.quantize`` gives for the whole weight (out x in) with groups along its rows.

    Without the solver to the bit. The solver ends once the mean error over what it was given stops falling,
    so each piece ends by its own mean error instead of by the layer's.
    """
    import torch
    from hqq.core.quantize import Quantizer

    groups = weight.numel() // params["group_size"]
    codes = torch.empty(groups, params["group_size"], dtype=torch.uint8)
    scale, zero = (torch.empty(groups, 1, dtype=torch.float32) for _ in range(2))
    meta: dict[str, Any] = {}
    for rows in _blocks.row_blocks(weight):
        piece, meta = Quantizer.quantize(weight[rows], **params, bitpack=False, device="cpu")
        first = rows.start * weight.shape[1] // params["group_size"]
        here = slice(first, first + len(piece))
        codes[here], scale[here], zero[here] = piece.to(torch.uint8), meta["scale"], meta["zero"]
    packing = Quantizer.bit_to_packing[params["nbits"]]
    meta |= {"shape": weight.shape, "scale": scale, "zero": zero, "packing": packing}
    return Quantizer.pack[packing](codes), meta | {"quant_scale": False, "quant_zero": False}
