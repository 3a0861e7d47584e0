"""bitsandbytes: NF4 with and without double quantization, and LLM.int8().

Layers are those that transformers builds (``bnb.nn.Linear4bit``, ``bnb.nn.Linear8bitLt``), quantized by
bitsandbytes' own functions piece by piece. The compute dtype is always given: bitsandbytes' own default
is float32, which is slow.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any, Literal

from backends._blocks import flat_blocks, row_blocks
from bench.load.contract import DTYPE_BYTES, Backend, Layer, Options, Shape, Workspace

if TYPE_CHECKING:
    import torch

BLOCK = 64
"""Weights that share one absmax (Linear4bit's default on every device)."""
DOUBLE_QUANT_BLOCK = 256
"""Absmax values that share one second-level absmax."""


class FourBit(Options):
    """Options of the 4-bit variants."""

    quant_type: Literal["nf4", "fp4"] = "nf4"
    double_quantization: bool = False


class Nf4(Backend):
    """bitsandbytes NF4: 4-bit NormalFloat in blocks of 64, one float32 absmax a block."""

    variants = {"bnb-nf4": FourBit()}
    refused_placements = {}
    requires = ("bitsandbytes",)
    extra = "bnb"
    uncached = None
    options: FourBit

    def linear(self, layer: Layer) -> torch.nn.Module:
        """A frozen bnb.nn.Linear4bit; blocks of 64 weights along the flattened matrix."""
        return self._layer(layer, *self._quantize(layer))

    def store(self, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Codes and absmax; with double quantization its codes, the second-level absmax and the offset."""
        import torch

        built: Any = layer
        state = built.quant_state
        tensors = {"codes": built.weight.data.view(torch.uint8), "absmax": state.absmax}
        if state.nested:
            tensors |= {"nested_absmax": state.state2.absmax, "offset": state.offset}
        return tensors

    def restore(self, layer: Layer) -> torch.nn.Module:
        """The layer from its codes; the code tables are bitsandbytes' own."""
        import bitsandbytes.functional as bnb
        import torch

        tensors, nested = layer.tensors, None
        if self.options.double_quantization:
            table = bnb.create_dynamic_map().to(layer.device)
            second = bnb.QuantState(
                tensors["nested_absmax"], code=table, blocksize=DOUBLE_QUANT_BLOCK, dtype=torch.float32
            )
            nested = (tensors["offset"], second)
        return self._layer(layer, tensors["codes"], self._state(layer, tensors["absmax"], nested))

    def _layer(self, layer: Layer, packed: torch.Tensor, state: Any) -> torch.nn.Module:
        import bitsandbytes as bnb
        import torch

        built = bnb.nn.Linear4bit(
            layer.shape.in_features,
            layer.shape.out_features,
            bias=layer.bias is not None,
            compute_dtype=layer.dtype,
            compress_statistics=self.options.double_quantization,
            quant_type=self.options.quant_type,
            device="meta",
        )
        built.quant_state = state
        built.weight = bnb.nn.Params4bit(
            packed,
            requires_grad=False,
            quant_state=state,
            blocksize=BLOCK,
            compress_statistics=self.options.double_quantization,
            quant_type=self.options.quant_type,
            module=built,
            bnb_quantized=True,
        )
        if layer.bias is not None:
            built.bias = torch.nn.Parameter(layer.bias, requires_grad=False)
        return built  # type: ignore[no-any-return]

    def _quantize(self, layer: Layer) -> tuple[torch.Tensor, Any]:
        """The codes (two to a byte, in one column) and bitsandbytes' QuantState, as its ``quantize_4bit``
        gives them for the whole weight at once."""
        import bitsandbytes.functional as bnb
        import torch

        weight = layer.tensors["weight"].reshape(-1)
        device, count, kind = layer.device, weight.numel(), self.options.quant_type
        packed = torch.empty(math.ceil(count / 2), 1, dtype=torch.uint8, device=device)
        absmax = torch.empty(math.ceil(count / BLOCK), dtype=torch.float32, device=device)
        for piece in flat_blocks(count, BLOCK):
            codes, state = bnb.quantize_4bit(
                weight[piece].to(device, layer.dtype), blocksize=BLOCK, quant_type=kind
            )
            packed[piece.start // 2 :][: len(codes)] = codes
            absmax[piece.start // BLOCK :][: len(state.absmax)] = state.absmax
        nested = None
        if self.options.double_quantization:
            offset = absmax.mean()
            absmax, second = bnb.quantize_blockwise(absmax - offset, blocksize=DOUBLE_QUANT_BLOCK)
            nested = (offset, second)
        return packed, self._state(layer, absmax, nested)

    def _state(self, layer: Layer, absmax: torch.Tensor, nested: tuple[torch.Tensor, Any] | None) -> Any:
        """The QuantState of a whole weight; ``nested``: offset and second-level state of its absmax."""
        import bitsandbytes.functional as bnb
        import torch

        offset, second = nested or (None, None)
        return bnb.QuantState(
            absmax=absmax,
            shape=torch.Size((layer.shape.out_features, layer.shape.in_features)),
            dtype=layer.dtype,
            blocksize=BLOCK,
            code=bnb.get_4bit_type(self.options.quant_type, device=layer.device),
            quant_type=self.options.quant_type,
            offset=offset,
            state2=second,
        )

    def expected_bits(self, shape: Shape) -> float:
        """4 + 32/64 = 4.5; with double quantization 4 + 8/64 + 32/(64*256) = 4.127 (QLoRA, section 3);
        plus the code tables of each layer, 16 (and 256) float32 values."""
        blocks = math.ceil(shape.weights / BLOCK)
        size = math.ceil(shape.weights / 2) + 16 * 4
        if self.options.double_quantization:
            size += blocks + math.ceil(blocks / DOUBLE_QUANT_BLOCK) * 4 + 256 * 4 + 4
        else:
            size += blocks * 4
        return size * 8 / shape.weights

    def workspace(self, shape: Shape, tokens: int) -> Workspace:
        """The whole weight in the compute dtype, in backward always and in forward except where
        bitsandbytes' fused kernel is chosen (by tokens and architecture, up to 1536 tokens), which is not
        counted on. With double quantization the scales too, twice in float32 (backends/cuda/ops.py and
        autograd/_functions.py of bitsandbytes 0.50.2)."""
        dense = shape.weights * DTYPE_BYTES[self.dtype]
        if self.options.double_quantization:
            dense += 2 * 4 * math.ceil(shape.weights / BLOCK)
        return Workspace(forward=dense, backward=dense)


class Nf4DoubleQuantization(Nf4):
    """bitsandbytes NF4 with double quantization: the absmax values are themselves 8-bit."""

    variants = {"bnb-nf4-dq": FourBit(double_quantization=True)}


class EightBit(Options):
    """Options of the int8 variant."""

    outlier_threshold: float = 6.0
    """Input columns with a larger magnitude are multiplied in the compute dtype (LLM.int8(), 2208.07339)."""


class Int8(Backend):
    """bitsandbytes LLM.int8(): int8 weights per output row, activations quantized in forward too."""

    variants = {"bnb-int8": EightBit()}
    refused_placements = {
        "fsdp": "bitsandbytes keeps its codes and scales on a parameter class of its own (Int8Params), "
        "which FSDP replaces by a plain parameter"
    }
    requires = ("bitsandbytes",)
    extra = "bnb"
    uncached = None
    options: EightBit

    def linear(self, layer: Layer) -> torch.nn.Module:
        """A frozen bnb.nn.Linear8bitLt without float16 master weights."""
        import bitsandbytes as bnb
        import torch

        # As Int8Params does on its way to a device, which it does for tensors of the CPU only. The quantizing
        # kernel takes float16; bfloat16 values of ordinary size lose nothing in the cast, since float16 has
        # more mantissa bits.
        weight = layer.tensors["weight"]
        codes = torch.empty(weight.shape, dtype=torch.int8, device=layer.device)
        scales = torch.empty(len(weight), dtype=torch.float32, device=layer.device)
        for rows in row_blocks(weight):
            piece = weight[rows].to(layer.device, torch.float16)
            codes[rows], scales[rows], _ = bnb.functional.int8_vectorwise_quant(piece)
        return self._layer(layer, codes, scales)

    def store(self, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        """Codes, and a scale for each output row."""
        weight: Any = layer.weight
        return {"codes": weight.CB, "scales": weight.SCB}

    def restore(self, layer: Layer) -> torch.nn.Module:
        """The layer from its codes."""
        return self._layer(layer, layer.tensors["codes"], layer.tensors["scales"])

    def _layer(self, layer: Layer, codes: torch.Tensor, scales: torch.Tensor) -> torch.nn.Module:
        import bitsandbytes as bnb
        import torch

        built = bnb.nn.Linear8bitLt(
            layer.shape.in_features,
            layer.shape.out_features,
            bias=layer.bias is not None,
            has_fp16_weights=False,
            threshold=self.options.outlier_threshold,
            device="meta",
        )
        built.weight = bnb.nn.Int8Params(
            codes, requires_grad=False, has_fp16_weights=False, CB=codes, SCB=scales
        )
        if layer.bias is not None:
            built.bias = torch.nn.Parameter(layer.bias, requires_grad=False)
        return built  # type: ignore[no-any-return]

    def expected_bits(self, shape: Shape) -> float:
        """8 bits, and one float32 scale for each output row."""
        return 8 + 32 / shape.in_features

    def workspace(self, shape: Shape, tokens: int) -> Workspace:
        """Forward: none of the weight, but for each token the input in float16 twice, in int8 and as a mask
        of outliers while it is quantized, then the product in int32, in float16 and in the compute dtype.
        Backward: the whole weight in the compute dtype (backends/cuda/ops.py and autograd/_functions.py of
        bitsandbytes 0.50.2)."""
        quantizing = shape.in_features * (2 + 2 + 1 + 1)
        multiplying = shape.in_features + shape.out_features * (4 + 2 + DTYPE_BYTES[self.dtype])
        return Workspace(
            forward=tokens * max(quantizing, multiplying),
            backward=shape.weights * DTYPE_BYTES[self.dtype],
        )
