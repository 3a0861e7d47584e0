"""The full depth on the cards that a person names: the plan of ``bench.load.fit``, and what was measured.

Where the slices ran on CUDA, each card's plan is corrected by what the slices' peaks were more (or less) than
their own plans. With e(n) the line over the depth n through (peak allocated - planned tensors) at the slices,
a card that holds n of the layers needs in each phase

    context + (planned tensors + e(n)) * (1 + what the allocator cannot use)

With all layers on one card the bracket is the forecast's own peak line. Elsewhere the plan stands alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace

from bench.ask.cards import Cards
from bench.ask.footprint import CardNeed, Outlook
from bench.ask.plan import RunRequest
from bench.ask.shapes import decoder_of
from bench.errors import UserError
from bench.load.allowance import ALLOCATOR_SHARE, CONTEXT_BYTES
from bench.load.fit import outlooks, work_of
from bench.load.footprint import Plan
from bench.load.registry import find_backends
from bench.load.sized import SizedModel, layer_shapes
from bench.record.forecast import CardOutlook

TRAINING = ("forward", "backward", "optimizer_step")
HIGHEST = "highest"
ALLOWANCE = "allowance"

Excess = Mapping[str, Callable[[int], float]]
"""Phase -> measured less planned bytes of tensors, over the number of layers on one card."""


def planned_peaks(request: RunRequest, depths: Sequence[int]) -> dict[int, dict[str, int]] | None:
    """Bytes of tensors at the fullest moment of each phase of a step and of the whole step, at each depth.

    By arithmetic, the allowance left out, on the request's device. None: the model's shapes are not known, or
    the backend cannot train them.
    """
    entry = find_backends()[request.backend]
    found = {}
    try:
        for depth in depths:
            decoder = decoder_of(request.model.architecture, depth)
            backend = entry.backend(entry.options(request.options), request.device, request.dtype)
            backend.fit(list(layer_shapes(decoder).values()))
            model = SizedModel.of(decoder, backend)
            work = work_of(request, backend, model.width, request.workload.sequence_length)
            (card,) = Plan(model, work).single().cards
            peaks = {phase: size for phase, size in _tensors(card).items() if phase in TRAINING}
            found[depth] = peaks | {HIGHEST: max(peaks.values())}
    except (UserError, ValueError):
        return None
    return found


def card_outlooks(request: RunRequest, cards: Sequence[Cards], excess: Excess) -> tuple[CardOutlook, ...]:
    """The whole model on each set of cards. ``excess``: empty where no CUDA memory was measured.

    Raises UserError for a model of unknown shape.
    """
    planned = outlooks([request], cards)
    if not excess:
        return tuple(_outlook(one) for one in planned)
    return tuple(_measured(request, one, excess) for one in planned)


def _outlook(planned: Outlook) -> CardOutlook:
    on_cards = planned.footprint.cards if planned.footprint else ()
    return CardOutlook(
        cards=planned.cards.label,
        card_count=planned.cards.count,
        capacity_bytes=planned.cards.capacity_bytes,
        sequence_length=planned.length,
        fits=planned.fits,
        longest_sequence=planned.longest,
        peak_bytes=tuple(card.peak.total_bytes for card in on_cards),
        basis="arithmetic",
        reason=planned.reason,
    )


def _measured(request: RunRequest, planned: Outlook, excess: Excess) -> CardOutlook:
    if planned.footprint is None:
        return _outlook(planned)
    peaks = [measured_need(card, excess) for card in planned.footprint.cards]
    more = max(
        peak - card.peak.total_bytes for peak, card in zip(peaks, planned.footprint.cards, strict=True)
    )
    # The same bytes at every length: what the slices measured at the one they ran with.
    smaller = replace(planned.cards, capacity_bytes=max(planned.cards.capacity_bytes - more, 0))
    (again,) = outlooks([request], [smaller])
    return _outlook(planned).model_copy(
        update={
            "fits": max(peaks) <= planned.cards.capacity_bytes,
            "longest_sequence": again.longest,
            "peak_bytes": tuple(peaks),
            "basis": "measured",
        }
    )


def measured_need(card: CardNeed, excess: Excess) -> int:
    """Bytes of one card at its fullest phase, as this module's formula says. ``loaded`` is never the fullest
    phase of a training."""
    tensors = _tensors(card)
    fullest = max(tensors[phase] + line(card.layers) for phase, line in excess.items())
    return max(0, round(CONTEXT_BYTES + fullest * (1 + ALLOCATOR_SHARE)))


def _tensors(card: CardNeed) -> dict[str, int]:
    """Phase -> planned bytes without the allowance."""
    return {phase.phase: phase.total_bytes - phase.terms.get(ALLOWANCE, 0) for phase in card.phases}
