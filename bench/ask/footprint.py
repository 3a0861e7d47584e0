"""What a memory plan says: bytes by card, phase and term, and whether that fits.

``bench.load.footprint`` computes these values by arithmetic and ``bench.show.footprint`` shows them. All
sizes are bytes; a term that is not there is 0 bytes, since it was computed and not observed.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from bench.ask.cards import Cards

PHASES = ("loaded", "forward", "backward", "optimizer_step")
"""Of a step from the second on, when the optimizer's state exists. ``loaded``: what lies there after the
load, before adapters and optimizer."""
TERMS: Mapping[str, str] = {
    "quantized_weights": "packed weights with their metadata",
    "unquantized_weights": "embedding, head, norms, biases",
    "lora": "LoRA weights",
    "gradients": "gradients of the LoRA weights",
    "optimizer_state": "AdamW's two moments",
    "optimizer_temporaries": "a copy of the LoRA weights inside the optimizer's step",
    "adapter_copies": "LoRA weights cast by autocast, until the forward ends",
    "checkpoints": "one residual stream for each decoder layer",
    "kept_activations": "activations of the layers that are recomputed or not checkpointed",
    "moving_activations": "activations and their gradients that come and go",
    "kernel_workspace": "dequantized weights and other temporaries of the training kernel",
    "logits": "logits, their float32 copy and their gradient",
    "allowance": "CUDA context, cuBLAS workspace, allocator",
}
"""Term -> what it is."""

TIGHT_SHARE = 0.10
"""What fragmentation may take of a full card in an unlucky case: 22.68 GiB were reserved for 20.62 GiB
(abacaj/fine-tune-mistral#3). A training that fits with less of its peak to spare is called tight."""


@dataclass(frozen=True)
class PhaseNeed:
    """The fullest moment of one phase on one card."""

    phase: str
    terms: Mapping[str, int]

    @property
    def total_bytes(self) -> int:
        """All terms together."""
        return sum(self.terms.values())

    @property
    def largest_term(self) -> str:
        """The term with the most bytes."""
        return max(self.terms, key=lambda term: self.terms[term])


@dataclass(frozen=True)
class CardNeed:
    """What one card holds."""

    layers: int
    """Decoder layers on it."""
    phases: tuple[PhaseNeed, ...]

    @property
    def peak(self) -> PhaseNeed:
        """The fullest phase."""
        return max(self.phases, key=lambda phase: phase.total_bytes)


@dataclass(frozen=True)
class Footprint:
    """What a training holds on each of its cards."""

    cards: tuple[CardNeed, ...]

    @property
    def fullest(self) -> int:
        """Place of the card with the highest peak, counted from 0."""
        return max(range(len(self.cards)), key=lambda place: self.cards[place].peak.total_bytes)

    @property
    def peak_bytes(self) -> int:
        """Of the fullest card in its fullest phase."""
        return self.cards[self.fullest].peak.total_bytes


@dataclass(frozen=True)
class Outlook:
    """One backend on one set of cards."""

    backend: str
    cards: Cards
    dtype: str
    """The compute dtype that the backend really trains in on CUDA."""
    length: int
    """The sequence length that was asked about, in tokens."""
    footprint: Footprint | None = None
    """At that length; None: not possible at all, see ``reason``."""
    longest: int | None = None
    """The longest sequence that fits, a multiple of `bench.load.fit.LENGTH_STEP`; None: not even the
    shortest does."""
    longest_is_limit: bool = False
    """Nothing longer was tried: ``longest`` is the model's own limit."""
    notes: tuple[str, ...] = ()
    """Departures from what was asked, one sentence each."""
    reason: str | None = None
    """Why the backend cannot train this model."""

    @property
    def fits(self) -> bool | None:
        """At the length that was asked about; None: not possible at all."""
        if self.footprint is None:
            return None
        return self.footprint.peak_bytes <= self.cards.capacity_bytes

    @property
    def tight(self) -> bool | None:
        """It fits, but an unlucky fragmentation of the memory could still be too much (`TIGHT_SHARE`)."""
        if self.footprint is None or self.spare_bytes is None:
            return None
        return bool(self.fits) and self.spare_bytes < TIGHT_SHARE * self.footprint.peak_bytes

    @property
    def spare_bytes(self) -> int | None:
        """Capacity of a card less the peak of the fullest one; negative where it does not fit."""
        if self.footprint is None:
            return None
        return self.cards.capacity_bytes - self.footprint.peak_bytes
