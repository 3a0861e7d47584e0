"""Which part of a model is on which device: all of it on one, or its decoder layers spread over several.

    layout = Layout.on(device)                    # everything in one place
    layout = spread_layout(request, backend, devices)   # --placement split
    built = build_model(skeleton, weights, backend, layout)

Decoder layers stay in order, as many on each device as ``qlora-bench plan`` puts there: balanced by the bytes
of each device's peak, with the head and its logits counted. `carry` makes a spread model compute: what goes
into a layer is moved to that layer's device. One device works at a time.

A CPU has no second device; there several places share it, so that everything but the copying itself is the
same (tests/test_layout.py holds that no operation mixes two places).
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch
from torch import nn

from bench.ask.plan import RunRequest
from bench.ask.shapes import decoder_of
from bench.load.contract import Backend
from bench.load.fit import work_of
from bench.load.footprint import Plan
from bench.load.sized import SizedModel

LAYER = re.compile(r"(?:^|\.)layers\.(\d+)(?:\.|$)")
AT_THE_END = ("model.norm", "lm_head")
"""What computes after the last decoder layer."""
WRAPPER = "base_model.model."
"""What PEFT puts before every name."""


@dataclass(frozen=True)
class Place:
    """Somewhere that a part of a model can be."""

    label: str
    """As it stands in records: cuda:3, or cpu:1 for the second place on one CPU."""
    device: torch.device


@dataclass(frozen=True)
class Layout:
    """Places, and how many decoder layers each holds, in order."""

    places: tuple[Place, ...]
    layers: tuple[int, ...] | None = None
    """None: one place holds everything."""

    @classmethod
    def on(cls, device: torch.device) -> Layout:
        """Everything on one device."""
        return cls((Place(str(device), device),))

    @property
    def devices(self) -> tuple[torch.device, ...]:
        """Each device once, the first place's first."""
        return tuple(dict.fromkeys(place.device for place in self.places))

    def place_of(self, name: str) -> Place:
        """Where a module, a parameter or a buffer of this name is. PEFT's prefix makes no difference."""
        if self.layers is None:
            return self.places[0]
        plain = name.removeprefix(WRAPPER)
        found = LAYER.search(plain)
        if found is None:
            return self.places[-1 if plain.startswith(AT_THE_END) else 0]
        ends = accumulate(self.layers)
        index = int(found.group(1))
        return next(place for place, end in zip(self.places, ends, strict=True) if index < end)

    def device_of(self, name: str) -> torch.device:
        """The device of `place_of`."""
        return self.place_of(name).device


def spread_layout(request: RunRequest, backend: Backend, places: Sequence[Place]) -> Layout:
    """The layout of ``--placement split``. ``backend`` has been fitted to the model's shapes.

    Raises UserError for a model whose shapes are not known, and ValueError for fewer layers than places.
    """
    decoder = decoder_of(request.model.architecture)
    if decoder.layers < len(places):
        raise ValueError(f"{decoder.layers} decoder layers cannot be spread over {len(places)} devices")
    model = SizedModel.of(decoder, backend)
    work = work_of(request, backend, model.width, request.workload.sequence_length)
    footprint = Plan(model, work).split(len(places))
    return Layout(tuple(places), tuple(card.layers for card in footprint.cards))


def carry(model: nn.Module, layout: Layout) -> None:
    """Move what goes into each decoder layer, the last norm and the head to where that is."""
    if layout.layers is None:
        return
    for name, module in model.named_modules():
        is_layer = re.fullmatch(r"(?:.*\.)?layers\.\d+", name) is not None
        if is_layer or name in AT_THE_END:
            place = layout.place_of(name)

            def bring(
                module: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], place: Place = place
            ) -> tuple[tuple[Any, ...], dict[str, Any]]:
                return _brought(inputs, place), _brought(named, place)

            module.register_forward_pre_hook(bring, with_kwargs=True)


def moved(tensor: torch.Tensor, place: Place) -> torch.Tensor:
    """The tensor in another place. Nothing else of the harness crosses from one to another in a forward."""
    return tensor.to(place.device)


def misplaced(model: nn.Module, layout: Layout) -> list[str]:
    """Parameters and buffers that are not where the layout says, one sentence each."""
    tensors = [*model.named_parameters(), *model.named_buffers()]
    return [
        f"{name} is on {tensor.device} instead of {layout.device_of(name)}"
        for name, tensor in tensors
        if tensor.device != layout.device_of(name)
    ]


def _brought(value: Any, place: Place) -> Any:
    if isinstance(value, torch.Tensor):
        return moved(value, place)
    if isinstance(value, tuple | list):
        return type(value)(_brought(part, place) for part in value)
    if isinstance(value, dict):
        return {key: _brought(part, place) for key, part in value.items()}
    return value
