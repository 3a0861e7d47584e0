"""The shapes of a decoder, read off its config.json: linear layers, what is not quantized, buffers.

Arithmetic only: neither torch nor transformers is imported, so that 80 layers cost nothing.
`decoder_of` reads a configuration; `bench.load.footprint` turns the shapes into bytes. tests/test_shapes.py
holds them against the models that transformers builds.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from bench.errors import BadValue, UserError, nearest

LARGEST_SIZE = 2**31 - 1
MOST_LAYERS = 10_000
"""No known decoder comes near; a damaged configuration must not take the machine's memory for names."""
SIZES = {
    "num_hidden_layers": MOST_LAYERS,
    **dict.fromkeys(
        (
            "hidden_size",
            "intermediate_size",
            "num_attention_heads",
            "num_key_value_heads",
            "head_dim",
            "vocab_size",
            "max_position_embeddings",
        ),
        LARGEST_SIZE,
    ),
}
"""Fields of a configuration that are whole numbers from 1 on -> the largest that is believed."""
ATTENTION_INPUTS = ("q_proj", "k_proj", "v_proj")
MLP = ("gate_proj", "up_proj", "down_proj")
ROTARY_BUFFERS = 2
"""inv_freq and original_inv_freq, float32, half a head long each: once a model (transformers' rotary
embeddings; they are counted with the unquantized weights)."""


@dataclass(frozen=True)
class Layout:
    """What a model type fixes that its config.json does not say, or says in fields of its own."""

    biased_inputs: bool = False
    """q, k and v have a bias whatever the configuration says."""
    attention_bias_field: bool = False
    """``attention_bias`` of the configuration gives q, k, v and o a bias."""
    mlp_bias_field: bool = False
    """``mlp_bias`` of the configuration gives the MLP's projections a bias."""
    head_norms: bool = False
    """q and k are normalized head by head."""
    head_dim: int | None = None
    """The width of a head where the configuration is silent; None: hidden size over heads."""


LAYOUTS: Mapping[str, Layout] = {
    "llama": Layout(attention_bias_field=True, mlp_bias_field=True),
    "mistral": Layout(),
    "qwen2": Layout(biased_inputs=True),
    "qwen3": Layout(attention_bias_field=True, head_norms=True, head_dim=128),
}
"""model_type -> its layout, as transformers 5.24 builds it. Others are refused rather than guessed."""


@dataclass(frozen=True)
class Linear:
    """One linear layer: its weight is (``outputs``, ``inputs``) as torch stores it."""

    outputs: int
    inputs: int
    bias: bool

    @property
    def weights(self) -> int:
        """Number of weights, the bias excluded."""
        return self.outputs * self.inputs


@dataclass(frozen=True)
class Decoder:
    """The shape of a decoder with RMS norms and gated MLPs. Its layers are all alike."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    groups: int
    """Key and value heads."""
    head_dim: int
    vocabulary: int
    tied: bool
    """The head uses the embedding's weight."""
    head_norms: bool
    context: int | None
    """``max_position_embeddings``: tokens that the model was made for."""
    linears: Mapping[str, Linear]
    """The seven linear layers of one decoder layer by the last part of their name."""

    @property
    def queries(self) -> int:
        """Width of q: heads times the width of a head."""
        return self.heads * self.head_dim

    @property
    def keys(self) -> int:
        """Width of k, and of v."""
        return self.groups * self.head_dim

    @property
    def embedding_parameters(self) -> int:
        """Of the embedding, and of the head as well where it has a weight of its own."""
        return self.vocabulary * self.hidden

    @property
    def layer_unquantized_parameters(self) -> int:
        """Of one decoder layer: its norms and the biases of its linear layers."""
        norms = 2 * self.hidden + (2 * self.head_dim if self.head_norms else 0)
        return norms + sum(linear.outputs for linear in self.linears.values() if linear.bias)

    @property
    def layer_quantized_parameters(self) -> int:
        """Of one decoder layer: the weights of its linear layers."""
        return sum(linear.weights for linear in self.linears.values())

    @property
    def parameters(self) -> int:
        """Of the whole model, a tied head counted once."""
        layer = self.layer_quantized_parameters + self.layer_unquantized_parameters
        embeddings = self.embedding_parameters * (1 if self.tied else 2)
        return self.layers * layer + self.hidden + embeddings

    @property
    def buffer_bytes(self) -> int:
        """Of the rotary embedding's float32 buffers, once a model."""
        return ROTARY_BUFFERS * (self.head_dim // 2) * 4

    def lora_parameters(self, rank: int, targets: tuple[str, ...]) -> int:
        """Of one decoder layer's adapters: A is (rank, inputs) and B (outputs, rank) for each target."""
        return sum(rank * (self.linears[name].inputs + self.linears[name].outputs) for name in targets)


def decoder_of(architecture: Mapping[str, Any], layers: int | None = None) -> Decoder:
    """The decoder of a config.json; ``layers``: keep only the first so many.

    Raises UserError for a model type whose layout is not known, and BadValue for a configuration that lacks
    a size or does not have that many layers.
    """
    kind = str(architecture.get("model_type"))
    if kind not in LAYOUTS:
        near = nearest(kind, LAYOUTS)
        raise UserError(
            f"the shapes of model type '{kind}' are not known",
            f"did you mean '{near}'?" if near else f"known: {', '.join(LAYOUTS)}",
        )
    layout = LAYOUTS[kind]
    hidden, heads = _size(architecture, "hidden_size"), _size(architecture, "num_attention_heads")
    depth = _size(architecture, "num_hidden_layers")
    if layers is not None and layers > depth:
        raise BadValue(f"--layers {layers}: the model has {depth} decoder layers")
    groups = int(architecture.get("num_key_value_heads") or heads)
    width = int(architecture.get("head_dim") or layout.head_dim or hidden // heads)
    intermediate = _size(architecture, "intermediate_size")
    context = architecture.get("max_position_embeddings")
    return Decoder(
        layers=layers or depth,
        hidden=hidden,
        intermediate=intermediate,
        heads=heads,
        groups=groups,
        head_dim=width,
        vocabulary=_size(architecture, "vocab_size"),
        # None of these types ties where its configuration says nothing.
        tied=bool(architecture.get("tie_word_embeddings", False)),
        head_norms=layout.head_norms,
        context=int(context) if context else None,
        linears=_linears(architecture, layout, (hidden, intermediate, heads * width, groups * width)),
    )


def size_problem(architecture: Mapping[str, Any]) -> str | None:
    """What is wrong with the sizes that a configuration has, in words; None: nothing. One may be missing."""
    for field, largest in SIZES.items():
        value = architecture.get(field)
        if value is not None and (type(value) is not int or not 1 <= value <= largest):
            return f"{field} is no whole number from 1 to {largest} (got {value!r})"
    return None


def decoder_layers(architecture: Mapping[str, Any]) -> int:
    """How many decoder layers a configuration has. Raises BadValue where it does not say."""
    return _size(architecture, "num_hidden_layers")


def _linears(
    architecture: Mapping[str, Any], layout: Layout, widths: tuple[int, int, int, int]
) -> dict[str, Linear]:
    hidden, intermediate, queries, keys = widths
    everywhere = layout.attention_bias_field and bool(architecture.get("attention_bias"))
    inputs_biased = layout.biased_inputs or everywhere
    mlp_biased = layout.mlp_bias_field and bool(architecture.get("mlp_bias"))
    outputs = {"q_proj": queries, "k_proj": keys, "v_proj": keys}
    return {
        **{name: Linear(outputs[name], hidden, inputs_biased) for name in ATTENTION_INPUTS},
        "o_proj": Linear(hidden, queries, everywhere),
        "gate_proj": Linear(intermediate, hidden, mlp_biased),
        "up_proj": Linear(intermediate, hidden, mlp_biased),
        "down_proj": Linear(hidden, intermediate, mlp_biased),
    }


def _size(architecture: Mapping[str, Any], field: str) -> int:
    value = architecture.get(field)
    if type(value) is not int or value < 1:
        raise BadValue(f"the model's configuration has no valid '{field}' (got {value!r})")
    return value
