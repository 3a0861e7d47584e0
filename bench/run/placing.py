"""How the runs of a sweep use the cards of this machine: as asked, or on one card where all fit on it.

`settle` is for ``--placement auto``: with several cards and a model too large for one of them the decoder
layers are spread over all, for every backend of the sweep, so that their figures stay alike.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from bench.ask.cards import cards_here
from bench.ask.experiment import Experiment
from bench.ask.plan import RunRequest
from bench.errors import BadValue, UserError
from bench.load.fit import outlooks
from bench.load.registry import Entry
from bench.record.environment import Device

GIB = 2**30


def refuse_placement(experiment: Experiment, entries: Mapping[str, Entry]) -> None:
    """Raise BadValue where the placement is possible with no backend that was asked for. Where it is with
    some, the others become rows that say why."""
    placement = experiment.placement
    if placement == "auto":
        return
    refused = {name: entries[name].backend.refused_placements.get(placement) for name in experiment.backends}
    if all(refused.values()):
        able = [n for n, entry in entries.items() if placement not in entry.backend.refused_placements]
        raise BadValue(
            f"--placement {placement} is not possible with {', '.join(refused)}: "
            f"{next(iter(refused.values()))}",
            f"possible with: {', '.join(able)}" if able else None,
        )


def cards_on_cluster(experiment: Experiment, gpus_per_run: int | None, here: int) -> int:
    """CUDA devices that a run on a cluster has: those it asks for. ``here``: those of this machine, which may
    have none.

    Raises BadValue where what is asked contradicts itself.
    """
    if gpus_per_run is None:
        return max(here, experiment.device_count or 1) if experiment.device == "cuda" else here
    if experiment.device == "cpu":
        raise BadValue(f"--gpus-per-run {gpus_per_run}: these runs are on the CPU", "use --device cuda")
    if experiment.device_count is not None and experiment.device_count > gpus_per_run:
        raise BadValue(f"--gpus-per-run {gpus_per_run}: a run uses {experiment.device_count} cards")
    return gpus_per_run


def settle(requests: Sequence[RunRequest], cards: Sequence[Device]) -> tuple[list[RunRequest], str]:
    """``requests``, each planned for one card, on as many as they need; and why, for the headline."""
    sizes = [card.total_memory_bytes for card in cards if card.total_memory_bytes is not None]
    if len(cards) < 2 or not sizes or any(request.device != "cuda" for request in requests):
        return list(requests), ""
    smallest = min(sizes)
    try:
        found = outlooks(requests, cards_here([smallest]))
    except UserError:
        return list(requests), ""  # a model of unknown shape: nothing can be computed, nor split
    needs = {one.backend: one.footprint.peak_bytes for one in found if one.footprint and not one.fits}
    if not needs:
        return list(requests), ""
    backend = min(needs, key=lambda name: needs[name])
    why = (
        f", split over {len(cards)} cards ({backend} needs {needs[backend] / GIB:.1f} GiB and a card has "
        f"{smallest / GIB:.1f})"
    )
    change = {"placement": "split", "device_count": len(cards)}
    return [request.model_copy(update=change) for request in requests], why
