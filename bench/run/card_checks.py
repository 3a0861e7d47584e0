"""The preflight inside its worker: what NVML says of the cards, then copies between them.

    python -m bench.run.worker ORDER.json DESCRIPTOR --preflight

Every finding is told as soon as it is there, so that a copy that hangs or a driver that crashes costs only
what was not looked at yet. ``bench.run.preflight`` is the parent's side.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from bench.probe.cards import Nvml
from bench.probe.machine import visible_cards
from bench.record.preflight import CardFindings, PairFindings
from bench.run.events import Channel

if TYPE_CHECKING:
    from bench.load.layout import Place
    from bench.probe.peer_copy import Transfer

SETTLING_SECONDS = 0.5
"""Of work before clocks and the PCIe link are read: both rise with it."""


@dataclass(frozen=True)
class Card:
    """A card as torch numbers it, and what was found before torch was imported."""

    place: Place
    findings: CardFindings


def examine(channel: Channel, count: int) -> None:
    """Tell everything about the first ``count`` cards that are visible to this process.

    Raises RuntimeError where torch does not find so many.
    """
    channel.stage("reading the driver")
    with Nvml() as nvml:
        if nvml.driver is not None:
            channel.send("section", name="driver", value=nvml.driver)
        if os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
            channel.send("section", name="visible_devices", value=os.environ["CUDA_VISIBLE_DEVICES"])
        # Before CUDA is started here: what uses memory now is not ours.
        before = {uuid: nvml.findings(uuid, "") for uuid in nvml.uuids}
        _tell_visible(channel, before, count)
        channel.stage("starting CUDA")
        cards = _cards(before, count)
        for card in cards:
            channel.section(f"card {card.place.label}", card.findings)
        from bench.probe.transfer import TorchTransfer

        check_cards(channel, nvml, cards, TorchTransfer())


def _tell_visible(channel: Channel, before: dict[str, CardFindings | None], count: int) -> None:
    """What is known of the cards without CUDA, in CUDA's order: on a card that somebody else has filled it
    does not even start. Replaced by what is found once it has."""
    visible = visible_cards(os.environ.get("CUDA_VISIBLE_DEVICES"), list(before))
    for place, uuid in enumerate(visible[:count]):
        known = before.get(uuid)
        if known is not None:
            label = f"cuda:{place}"
            channel.section(f"card {label}", known.model_copy(update={"device": label}))


def check_cards(
    channel: Channel,
    nvml: Nvml,
    cards: Sequence[Card],
    transfer: Transfer,
    sizes_bytes: Sequence[int] | None = None,
) -> None:
    """Copy from the host to every card and back, then from every card to every other. Raises what CUDA
    raises."""
    from bench.probe.peer_copy import SIZES_BYTES, PairCheck, ordered_pairs

    sizes = tuple(sizes_bytes or SIZES_BYTES)
    for card in cards:
        label = card.place.label
        channel.stage(f"copying from the host to {label} and back")
        copies = PairCheck(transfer, card.place, card.place, sizes).run()
        found = {"host_copies": copies, "busy": _busy_state(nvml, card, transfer)}
        channel.section(f"card {label}", card.findings.model_copy(update=found))
    findings = {card.place: card.findings for card in cards}
    for source, target in ordered_pairs([card.place for card in cards]):
        channel.stage(f"copying from {source.label} to {target.label}")
        link = nvml.link(findings[source].uuid or "", findings[target].uuid or "")
        pair = PairFindings(
            source=source.label,
            target=target.label,
            peer_access=_peer_access(source, target),
            nvlinks=link.nvlinks,
            link=link.words,
        )
        name = f"pair {source.label} {target.label}"
        channel.section(name, pair)
        check = PairCheck(transfer, source, target, sizes, pair.peer_access)
        channel.section(name, pair.model_copy(update={"copies": check.run()}))


def _cards(before: dict[str, CardFindings | None], count: int) -> list[Card]:
    """The first cards in torch's order, each with what NVML said of the card with its UUID."""
    import torch

    from bench.load.layout import Place

    found = torch.cuda.device_count()
    if found < count:
        raise RuntimeError(f"torch finds {found or 'no'} CUDA devices, and the runs use {count}")
    cards = []
    for index in range(count):
        place = Place(f"cuda:{index}", torch.device("cuda", index))
        properties = torch.cuda.get_device_properties(index)
        known = before.get(f"GPU-{properties.uuid}")
        if known is None:
            # A MIG slice, or no NVML: torch's own words are all there is.
            known = CardFindings(
                device=place.label, name=properties.name, total_bytes=properties.total_memory
            )
        cards.append(Card(place, known.model_copy(update={"device": place.label})))
    return cards


def _busy_state(nvml: Nvml, card: Card, transfer: Transfer) -> object:
    if card.findings.nvml_index is None:
        return None
    with transfer.busy([card.place]):
        time.sleep(SETTLING_SECONDS)
        return nvml.state(card.findings.uuid or "")


def _peer_access(source: Place, target: Place) -> bool | None:
    """Whether the driver says that ``source`` reaches the memory of ``target``."""
    import torch

    if source.device.type != "cuda":
        return None
    return torch.cuda.can_device_access_peer(source.device, target.device)
