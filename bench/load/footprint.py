"""The memory of a QLoRA training by arithmetic: what each card holds in each phase, term by term.

    model = SizedModel.of(decoder, backend)          # after backend.fit
    Plan(model, work).single()    # everything on one device
    Plan(model, work).split(7)    # layers spread over seven

Nothing is allocated and torch is not imported. Weights, LoRA, gradients and optimizer are exact: they are
held against the bytes in the committed records (tests/test_footprint.py). Activations are held against the
tensors that live in the real loop (tests/test_peaks.py) and against published peaks of an A100.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from bench.ask.footprint import PHASES, CardNeed, Footprint, PhaseNeed
from bench.load.activations import FLOAT32, Work, kept_by_layer, shared_by_layers
from bench.load.allowance import allowance
from bench.load.moments import Moment, backward_moments, forward_moments, head_moment
from bench.load.sized import SizedModel
from bench.load.split import most_layers, spread


@dataclass(frozen=True)
class Part:
    """The part of a model on one card."""

    layers: int
    first: bool = True
    """Holds the embedding."""
    last: bool = True
    """Holds the last norm and the head, and computes the logits and the loss."""


class Plan:
    """The bytes of one training."""

    def __init__(self, model: SizedModel, work: Work) -> None:
        self.model = model
        self.work = work
        decoder, spaces = model.decoder, model.workspaces(work.tokens)
        self._checkpoint = work.tokens * work.width * decoder.hidden
        self._shared = shared_by_layers(decoder, work)
        self._kept = kept_by_layer(decoder, work)
        self._dense_kept = sum(space.kept for space in spaces.values())
        self._forward = _fullest(forward_moments(decoder, work, spaces))
        self._backward = _fullest(backward_moments(decoder, work, spaces))
        self._lora = decoder.lora_parameters(work.lora.rank, work.lora.target_modules)

    def single(self) -> Footprint:
        """Everything on one card."""
        return Footprint((self.card(Part(self.model.decoder.layers)),))

    def split(self, cards: int) -> Footprint:
        """Decoder layers spread over ``cards`` of one process, balanced by the bytes of each card's peak: the
        embedding on the first card, the head and the logits on the last."""
        if cards == 1:
            return self.single()
        depth, ends = self.model.decoder.layers, _ends(cards)
        peaks = {end: [self._peak(end, layers) for layers in range(depth + 1)] for end in set(ends)}
        layers = spread(depth, [peaks[end] for end in ends])
        return Footprint(tuple(self.card(Part(count, *end)) for count, end in zip(layers, ends, strict=True)))

    def fits(self, cards: int, capacity_bytes: int) -> bool:
        """Whether some split over ``cards`` keeps each within ``capacity_bytes``. Agrees with `split`, and is
        quicker to ask."""
        depth = self.model.decoder.layers
        if cards == 1:
            return self.single().peak_bytes <= capacity_bytes
        ends = _ends(cards)
        room = {end: most_layers(partial(self._peak, end), depth, capacity_bytes) for end in set(ends)}
        held = [count for end in ends if (count := room[end]) is not None]
        return len(held) == cards and sum(held) >= depth

    def card(self, part: Part) -> CardNeed:
        """Every phase of one card."""
        terms = {
            "loaded": self._weights(part),
            "forward": self._forward_terms(part),
            "backward": self._backward_terms(part),
            "optimizer_step": self._optimizer_terms(part),
        }
        return CardNeed(part.layers, tuple(PhaseNeed(name, self._allowed(terms[name])) for name in PHASES))

    def _peak(self, end: tuple[bool, bool], layers: int) -> int:
        """Bytes of a card with so many layers; ``end``: whether it is the first, and whether the last."""
        return self.card(Part(layers, *end)).peak.total_bytes

    def _weights(self, part: Part) -> dict[str, int]:
        model = self.model
        unquantized = part.layers * model.layer_unquantized
        if part.first:
            unquantized += model.embedding + model.decoder.buffer_bytes
        if part.last:
            unquantized += model.last_norm
            # A tied head on another card than the embedding needs the weight there as well.
            unquantized += 0 if model.decoder.tied and part.first else model.embedding
        return {
            "quantized_weights": part.layers * model.layer_packed,
            "unquantized_weights": unquantized,
        }

    def _always(self, part: Part) -> dict[str, int]:
        """What every phase of a step has: the weights, the adapters, and the optimizer's state."""
        size = self._adapters(part.layers)
        return {**self._weights(part), "lora": size, "optimizer_state": 2 * size}

    def _adapters(self, layers: int) -> int:
        """LoRA weights of so many layers, or their gradients."""
        return layers * self._lora * self.work.adapter_bytes

    def _forward_terms(self, part: Part) -> dict[str, int]:
        terms = self._always(part)
        terms["gradients"] = terms["lora"] if self.work.accumulated else 0
        if part.layers == 0:
            return self._at_head(part, terms, backward=False)
        # Autocast keeps its copies until the forward ends; without checkpointing autograd keeps them.
        cached = self.work.adapters_are_cast and self.work.checkpointed
        copies = part.layers * self._lora * self.work.width if cached else 0
        in_layers = self._resting(part, part.layers - 1, self._forward) | {"adapter_copies": copies}
        return _fuller(terms | in_layers, self._at_head(part, terms, backward=False))

    def _backward_terms(self, part: Part) -> dict[str, int]:
        always, earlier = self._always(part), self._adapters(part.layers) if self.work.accumulated else 0
        head = self._at_head(part, always | {"gradients": earlier}, backward=True)
        if part.layers == 0:
            return head
        # The card's last layer goes backward first, with everything of the others still there and no
        # gradient yet; its first layer goes last, with every other's gradients. Between the two both change
        # evenly, so that one of the ends is the fullest. The first layer's own gradients come when its MLP's
        # half is gone.
        others = self._adapters(part.layers - 1)
        begin = self._resting(part, part.layers - 1, self._backward) | {"gradients": earlier}
        end = self._resting(part, 0, self._backward) | {"gradients": max(others, earlier)}
        ended = self._resting(part, 0, Moment(self._kept.attention, self._checkpoint, 0))
        ended["gradients"] = self._adapters(part.layers)
        return max((head, always | begin, always | end, always | ended), key=_size)

    def _optimizer_terms(self, part: Part) -> dict[str, int]:
        terms = self._always(part)
        # Its foreach form takes the roots of all second moments at once; gradients in 16 bit are read by the
        # norm and the probes in float32.
        temporaries = part.layers * self._lora * FLOAT32
        return terms | {"gradients": terms["lora"], "optimizer_temporaries": temporaries}

    def _resting(self, part: Part, others: int, moment: Moment | None) -> dict[str, int]:
        """What a card's layers hold between forward and backward: ``others`` that wait, and one in ``moment``
        (None: none)."""
        here = others + (moment is not None)
        moment = moment or Moment(0, 0, 0)
        waiting = 0 if self.work.checkpointed else others
        # Each checkpoint is a layer's input. Without them autograd holds the inputs with the rest.
        inputs = here if self.work.checkpointed else min(here, 1)
        return {
            "checkpoints": inputs * self._checkpoint + (self._shared if part.layers else 0),
            "kept_activations": waiting * self._kept.total + moment.kept,
            "moving_activations": moment.moving,
            "kernel_workspace": waiting * self._dense_kept + moment.workspace,
        }

    def _at_head(self, part: Part, terms: dict[str, int], *, backward: bool) -> dict[str, int]:
        """While the head computes the loss or its gradient; every layer of the card waits."""
        resting = self._resting(part, part.layers, None)
        if not part.last:
            return terms | resting
        logits, rest = head_moment(self.model.decoder, self.work, backward=backward)
        return terms | resting | {"logits": logits, "moving_activations": rest}

    def _allowed(self, terms: dict[str, int]) -> dict[str, int]:
        """``terms``, without those that are nothing, and the allowance where the device is a card."""
        present = {name: size for name, size in terms.items() if size}
        if self.model.backend.device != "cuda":
            return present
        return present | {"allowance": allowance(_size(present))}


def _ends(cards: int) -> list[tuple[bool, bool]]:
    """Of each card: whether it is the first, and whether it is the last."""
    return [(place == 0, place == cards - 1) for place in range(cards)]


def _fullest(moments: Sequence[Moment]) -> Moment:
    return max(moments, key=lambda moment: moment.total)


def _size(terms: dict[str, int]) -> int:
    return sum(terms.values())


def _fuller(one: dict[str, int], other: dict[str, int]) -> dict[str, int]:
    return max(one, other, key=_size)
