"""What autograd keeps of a decoder layer for its backward, in bytes, by arithmetic.

For the layers that transformers builds (RMS norms in float32, rotary embeddings, a gated MLP) with PEFT's
LoRA on them. Derived from those sources and held against the tensors that live while the real training loop
runs (tests/test_peaks.py). ``bench.load.moments`` adds what comes and goes.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

from bench.ask.experiment import Attention, Lora
from bench.ask.shapes import ATTENTION_INPUTS, MLP, Decoder

FLOAT32 = 4
INPUTS: Mapping[str, str] = {
    **dict.fromkeys(ATTENTION_INPUTS, "normed for attention"),
    "o_proj": "attended",
    "gate_proj": "normed for the MLP",
    "up_proj": "normed for the MLP",
    "down_proj": "gated",
}
"""Projection -> what goes into it."""


@dataclass(frozen=True)
class Work:
    """What of an experiment the activations depend on."""

    rows: int
    """Sequences of a micro-batch."""
    length: int
    """Tokens of a sequence."""
    width: int
    """Bytes of a number in the compute dtype."""
    attention: Attention
    masked: bool
    """Rows are padded, so that attention gets a mask."""
    lora: Lora
    casts_input: bool
    """See `bench.load.contract.Backend.adapter_casts_input`."""
    checkpointed: bool = True
    """Layers are recomputed in backward."""
    accumulated: bool = False
    """Gradients of earlier micro-batches lie there already."""

    @property
    def tokens(self) -> int:
        """Of a micro-batch."""
        return self.rows * self.length

    @property
    def kernel(self) -> Literal["fused", "math", "eager"]:
        """Fused kernels never hold the scores of all pairs of tokens; the other two do."""
        if self.attention in ("eager", "sdpa_math"):
            return "eager" if self.attention == "eager" else "math"
        return "fused"

    @property
    def adapter_bytes(self) -> int:
        """Of one LoRA weight, of its gradient, and of each moment of the optimizer."""
        return self.width if self.lora.precision == "compute" else FLOAT32

    @property
    def adapters_are_cast(self) -> bool:
        """Autocast computes with copies of the adapters in the compute dtype."""
        return self.lora.precision == "autocast" and self.width != FLOAT32

    @property
    def input_copy(self) -> int:
        """Bytes of a number in the copy of its input that each adapter keeps; 0: it keeps the input itself,
        which projections of the same input share."""
        if self.width == FLOAT32 or self.lora.precision == "compute":
            return 0
        if self.lora.precision == "float32":
            return FLOAT32
        return self.width if self.casts_input else 0


@dataclass(frozen=True)
class Kept:
    """What autograd keeps of one layer for its backward, the layer's input not included."""

    attention: int
    mlp: int

    @property
    def total(self) -> int:
        """Both halves."""
        return self.attention + self.mlp


def pairs(decoder: Decoder, work: Work) -> int:
    """Scores of attention: one for each head and pair of tokens of a row."""
    return work.rows * decoder.heads * work.length**2


def kept_by_layer(decoder: Decoder, work: Work) -> Kept:
    """Of a layer that is recomputed in backward, or was never checkpointed."""
    # A norm keeps its input in float32. Where that is no copy, the first norm keeps the layer's own input.
    own = work.checkpointed and work.width == FLOAT32
    first_norm = 0 if own else FLOAT32 * decoder.hidden
    attention = first_norm + _adapters_keep(decoder, work, (*ATTENTION_INPUTS, "o_proj"))
    # act(gate) * up: the activation keeps its input, the product both factors.
    gated = 3 * work.width * decoder.intermediate
    mlp = FLOAT32 * decoder.hidden + _adapters_keep(decoder, work, MLP) + gated
    copies = _adapter_copies(decoder, work)
    return Kept(work.tokens * attention + _attention_keeps(decoder, work), work.tokens * mlp + copies)


def shared_by_layers(decoder: Decoder, work: Work) -> int:
    """Once on each card, from the forward to the end of the backward: rotary cosines and sines, the mask."""
    rotary = 2 * work.width * work.length * decoder.head_dim
    if work.kernel == "eager":
        return rotary + work.width * work.rows * work.length**2
    return rotary + (work.rows * work.length**2 if work.masked else 0)


def _adapters_keep(decoder: Decoder, work: Work, names: tuple[str, ...]) -> int:
    """For each token: inputs of the adapters of these projections, and their products with A."""
    targets = [name for name in names if name in work.lora.target_modules]
    inner = FLOAT32 if work.lora.precision == "float32" else work.width
    products = len(targets) * work.lora.rank * inner
    if work.input_copy:
        return products + sum(work.input_copy * decoder.linears[name].inputs for name in targets)
    # Shared, and kept by some base layers (HQQ's) also where there is no adapter. What fused attention puts
    # out it keeps itself.
    shared = {INPUTS[name]: decoder.linears[name].inputs for name in names}
    if work.kernel == "fused":
        shared.pop("attended", None)
    return products + work.width * sum(shared.values())


def _adapter_copies(decoder: Decoder, work: Work) -> int:
    if not work.adapters_are_cast:
        return 0
    return work.width * decoder.lora_parameters(work.lora.rank, work.lora.target_modules)


def _attention_keeps(decoder: Decoder, work: Work) -> int:
    tokens, width = work.tokens, work.width
    norms = tokens * FLOAT32 * (decoder.queries + decoder.keys) if decoder.head_norms else 0
    if work.kernel == "fused":
        # Query, keys, values and output, and one float32 sum for each head. With a mask keys and values are
        # repeated for every head, and the mask becomes a bias in the compute dtype.
        keys = decoder.queries if work.masked else decoder.keys
        mask = width * work.rows * work.length**2 if work.masked else 0
        return norms + mask + tokens * (width * 2 * (decoder.queries + keys) + FLOAT32 * decoder.heads)
    if work.kernel == "math":
        # torch's own fallback computes in float32 throughout: softmax, query, repeated keys and values.
        return norms + FLOAT32 * (pairs(decoder, work) + 3 * tokens * decoder.queries)
    # The softmax in float32 and its copy in the compute dtype; query, repeated keys and values.
    copy = width if width != FLOAT32 else 0
    return norms + pairs(decoder, work) * (FLOAT32 + copy) + tokens * width * 3 * decoder.queries
