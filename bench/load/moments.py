"""The moments of a training step that may be the fullest, in bytes: inside a layer, and at the head.

Beside what autograd keeps (``bench.load.activations``) stand what comes and goes and what the training
kernel needs at that moment. ``bench.load.footprint`` takes the fullest. Derived from the sources of
transformers, PEFT and torch, and held against the tensors of the real loop (tests/test_peaks.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.ask.shapes import Decoder
from bench.load.activations import FLOAT32, Kept, Work, kept_by_layer, pairs
from bench.load.contract import Workspace

LEFT_BY_RECOMPUTATION = 4
"""Tensors as wide as the residual stream that checkpointing's recomputation leaves alive beside what is kept,
where adapters copied their inputs: the middle of the layer, both norms' outputs, and a gradient more."""
HEAD_FACTOR = 3 * FLOAT32
"""For each logit in backward: log-probabilities, the loss's gradient with respect to them, and that with
respect to the logits, all float32 (cross_entropy is log_softmax and nll_loss)."""


@dataclass(frozen=True)
class Moment:
    """One moment inside a layer."""

    kept: int
    moving: int
    workspace: int

    @property
    def total(self) -> int:
        """Everything at once."""
        return self.kept + self.moving + self.workspace


def forward_moments(decoder: Decoder, work: Work, spaces: Mapping[str, Workspace]) -> list[Moment]:
    """Of the last layer's forward. ``spaces``: of each of a layer's linear layers."""
    tokens, width = work.tokens, work.width
    residual, inner = tokens * width * decoder.hidden, tokens * width * decoder.intermediate
    if not work.checkpointed:
        kept, dense = kept_by_layer(decoder, work).total, sum(space.kept for space in spaces.values())
        # Through the down projection, when all else is kept already.
        cast = tokens * FLOAT32 * decoder.intermediate + inner if work.input_copy else 0
        more = max(space.forward - space.kept for space in spaces.values())
        return [Moment(kept, 4 * residual + cast, dense), Moment(kept, 2 * residual, dense + more)]
    # The up projection: act(gate), the base's product, the adapter's product scaled, and their sum. An
    # adapter that computes in float32 has its product in it before that is cast.
    sums = 4 * inner
    if work.lora.precision == "float32":
        sums += tokens * FLOAT32 * decoder.intermediate - inner
    cast = tokens * FLOAT32 * decoder.hidden if work.input_copy else 0
    factors = {"up_proj": inner, "down_proj": inner}
    return [
        Moment(0, 2 * residual + cast + sums, 0),
        *(Moment(0, 2 * residual + factors.get(name, 0), space.forward) for name, space in spaces.items()),
        Moment(0, 2 * residual + _attending(decoder, work), 0),
    ]


def backward_moments(decoder: Decoder, work: Work, spaces: Mapping[str, Workspace]) -> list[Moment]:
    """Of a layer that is recomputed and then goes backward, or only goes backward."""
    tokens, width = work.tokens, work.width
    kept, dense = kept_by_layer(decoder, work), sum(space.kept for space in spaces.values())
    residual, inner = tokens * width * decoder.hidden, tokens * width * decoder.intermediate
    left = LEFT_BY_RECOMPUTATION * residual if work.checkpointed and work.input_copy else 0
    moving = residual + left
    # Through the adapter of the down projection: the gradient of its input, cast from float32 or to it.
    cast = tokens * FLOAT32 * decoder.intermediate if work.input_copy else 0
    moments = [
        Moment(kept.total, moving + inner + cast, dense),
        *_through_down(kept, work, decoder, spaces["down_proj"], moving, dense),
        # Through attention, when the MLP's half is gone.
        Moment(kept.attention, moving + _attending_backward(decoder, work), dense),
    ]
    if work.checkpointed:
        # While the forward is recomputed.
        moments += [
            Moment(kept.total, 2 * residual, dense - space.kept + space.forward) for space in spaces.values()
        ]
    return moments


def _through_down(
    kept: Kept, work: Work, decoder: Decoder, down: Workspace, moving: int, dense: int
) -> list[Moment]:
    """Through the down projection itself, after its adapter: the weight is dequantized, multiplied, and both
    gradients are added. The adapter's copy of the input is gone by then, or the input itself; but not where
    PEFT has a layer of its own on top, since HQQ's base layer keeps the input as well."""
    inner = work.tokens * work.width * decoder.intermediate
    gone = work.input_copy or (work.width if work.casts_input else 0)
    left = kept.total - work.tokens * gone * decoder.intermediate
    weight = min(down.backward, work.width * decoder.linears["down_proj"].weights)
    return [
        Moment(left, moving + inner, dense + down.backward),
        Moment(left, moving + 2 * inner, dense + weight),
        Moment(left, moving + 3 * inner, dense),
    ]


def _attending(decoder: Decoder, work: Work) -> int:
    """What attention itself holds for a moment in forward."""
    queries = work.tokens * decoder.queries
    if work.kernel == "fused":
        return 3 * work.width * queries
    if work.kernel == "math":
        # Scores before and after the mask, the mask, and the five widened tensors that lead there.
        return FLOAT32 * (2 * pairs(decoder, work) + 5 * queries + work.length**2)
    # Masked scores, their float32 copy and its softmax.
    return pairs(decoder, work) * (work.width + 2 * FLOAT32) + 3 * work.width * queries


def _attending_backward(decoder: Decoder, work: Work) -> int:
    """What attention itself holds for a moment in backward, beside what it kept."""
    queries = work.tokens * decoder.queries
    if work.kernel == "fused":
        return 3 * work.width * queries
    if work.kernel == "math":
        return FLOAT32 * (2 * pairs(decoder, work) + queries)
    # Two float32 gradients of the softmax; its copy in the compute dtype is gone by then.
    copy = work.width if work.width != FLOAT32 else 0
    return pairs(decoder, work) * (2 * FLOAT32 - copy) + work.width * queries


def head_moment(decoder: Decoder, work: Work, *, backward: bool) -> tuple[int, int]:
    """Of the last norm, the head and the loss: bytes of the logits in all their forms, and of the rest.

    Forward: logits in the compute dtype, in float32, and log-probabilities. The last token of a row predicts
    nothing, so that a row has ``length - 1`` of the last two.
    """
    predicted = work.rows * (work.length - 1) * decoder.vocabulary
    rest = work.tokens * FLOAT32 * decoder.hidden
    if backward:
        return HEAD_FACTOR * predicted, rest
    # Float32 logits of one row are contiguous without the last token, and are not copied.
    copied = work.width != FLOAT32 or work.rows > 1
    logits = work.tokens * decoder.vocabulary * work.width
    return logits + predicted * FLOAT32 * (2 if copied else 1), rest
