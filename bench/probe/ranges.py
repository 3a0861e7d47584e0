"""The always-on probe: how large the numbers get, forward and backward, at every place worth knowing.

Hooks on modules keep two scalars a place, on the device; `RangeProbe.read` fetches them all with one copy a
device and dtype. Every tensor is detached first: a probe that touches autograd changes what non-reentrant
checkpointing saves. What checkpointing computes again in the backward is not recorded twice.

    probe = RangeProbe(model, linear_names)
    probe.forward_begins(); ...; probe.backward_begins(); ...; probe.ends()
    (micro_batch,) = probe.read()
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

WRAPPER = "base_model.model."
"""What PEFT puts before every name."""
BETWEEN = ("o_proj", "down_proj")
"""Projections whose input no module puts out: attention's weighted sum, and act(gate) * up."""
DECODER_LAYER = re.compile(r"^(.*\.)?layers\.(\d+)$")

Part = Literal["input", "output"]


@dataclass(frozen=True)
class Place:
    """A tensor of a module, by the module's plain name."""

    module: str
    part: Part

    @property
    def layer(self) -> int | None:
        """The decoder layer that it belongs to."""
        found = re.search(r"(?:^|\.)layers\.(\d+)(?:\.|$)", self.module)
        return int(found.group(1)) if found else None


@dataclass(frozen=True)
class Seen:
    """The largest absolute value at a place; NaN and infinity come through as such."""

    place: Place
    abs_max: float
    dtype: torch.dtype
    device: str


@dataclass
class MicroBatchRanges:
    """What one micro-batch showed, in the order in which it was computed."""

    forward: list[Seen] = field(default_factory=list)
    backward: list[Seen] = field(default_factory=list)
    """Of the gradient with respect to the tensor at the place."""


@dataclass(frozen=True)
class _Extremes:
    """What a hook keeps: the rest of the arithmetic waits for the read, since each operation is a launch."""

    place: Place
    low: torch.Tensor
    high: torch.Tensor


@dataclass
class _Pending:
    forward: list[_Extremes] = field(default_factory=list)
    backward: list[_Extremes] = field(default_factory=list)


def abs_max(tensor: torch.Tensor) -> torch.Tensor:
    """Largest absolute value as a float32 scalar on the tensor's device, NaN if there is one.

    By ``aminmax``: one pass without a temporary, 3 to 30 times faster on a CPU than ``abs().amax()``.
    """
    return _larger(*torch.aminmax(tensor.detach()))


def _larger(low: torch.Tensor, high: torch.Tensor) -> torch.Tensor:
    # Subtracted, not negated: of zeros that is 0 and not -0.
    return torch.maximum(0.0 - low.float(), high.float())


def plain_name(name: str) -> str:
    """A module's name as the model without PEFT has it."""
    return name.removeprefix(WRAPPER).removesuffix(".base_layer")


class RangeProbe:
    """Hooks on a model. ``fine``: on every module that computes, both ways; else on the decoder layers, the
    linear layers in them, the embedding, the last norm and the head, and backward on the decoder layers."""

    def __init__(self, model: nn.Module, linears: Iterable[str], *, fine: bool = False) -> None:
        self._phase: Literal["off", "forward", "backward"] = "off"
        self._micro_batches: list[_Pending] = []
        self._handles: list[RemovableHandle] = []
        self.layers = 0
        """Decoder layers found."""
        wanted = set(linears)
        for name, module in model.named_modules():
            self._attach(plain_name(name), name, module, wanted, fine)

    def remove(self) -> None:
        """Take every hook off."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def forward_begins(self) -> None:
        """A micro-batch begins."""
        self._micro_batches.append(_Pending())
        self._phase = "forward"

    def backward_begins(self) -> None:
        """Its forward is done."""
        self._phase = "backward"

    def ends(self) -> None:
        """Its backward is done."""
        self._phase = "off"

    def read(self) -> list[MicroBatchRanges]:
        """Everything since the last read, one a micro-batch. This waits for the devices."""
        pending, self._micro_batches = self._micro_batches, []
        values = _fetch([seen for batch in pending for seen in (*batch.forward, *batch.backward)])
        return [
            MicroBatchRanges(
                [_seen(extremes, next(values)) for extremes in batch.forward],
                [_seen(extremes, next(values)) for extremes in batch.backward],
            )
            for batch in pending
        ]

    def _attach(self, plain: str, name: str, module: nn.Module, linears: set[str], fine: bool) -> None:
        layer = DECODER_LAYER.match(plain)
        self.layers += layer is not None
        whole = layer is not None or plain in ("model.embed_tokens", "model.norm", "lm_head")
        # PEFT's layer, with the adapter's part, and not the base layer inside it, which has the same name.
        base = name.endswith(".base_layer")
        linear = plain in linears and not base
        inner = fine and not base and _computes(plain, module)
        if whole or linear or inner:
            backward = layer is not None or fine
            self._handles.append(module.register_forward_hook(self._output_hook(plain, backward)))
        if linear and plain.endswith(BETWEEN):
            self._handles.append(module.register_forward_pre_hook(self._input_hook(plain)))

    def _output_hook(self, plain: str, backward: bool) -> Any:
        place = Place(plain, "output")

        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
                return
            if self._phase == "forward":
                self._micro_batches[-1].forward.append(_extremes(place, tensor))
            # Under the reentrant mode the only pass with gradients is the one within the backward.
            if backward and tensor.requires_grad and self._phase != "off":
                tensor.register_hook(gradient)  # type: ignore[no-untyped-call]

        def gradient(value: torch.Tensor) -> None:
            if self._phase == "backward":
                self._micro_batches[-1].backward.append(_extremes(place, value))

        return hook

    def _input_hook(self, plain: str) -> Any:
        place = Place(plain, "input")

        def hook(module: nn.Module, inputs: tuple[Any, ...]) -> None:
            if self._phase == "forward" and inputs and isinstance(inputs[0], torch.Tensor):
                self._micro_batches[-1].forward.append(_extremes(place, inputs[0]))

        return hook


def _computes(plain: str, module: nn.Module) -> bool:
    """What ``fine`` adds: norms, activations, attention and MLP as wholes, and the parts of each adapter."""
    last = plain.rpartition(".")[2]
    return last in ("self_attn", "mlp", "act_fn") or "norm" in last or isinstance(module, nn.Linear)


def _extremes(place: Place, tensor: torch.Tensor) -> _Extremes:
    return _Extremes(place, *torch.aminmax(tensor.detach()))


def _seen(extremes: _Extremes, abs_max: float) -> Seen:
    return Seen(extremes.place, abs_max, extremes.low.dtype, str(extremes.low.device))


def _fetch(kept: list[_Extremes]) -> Iterator[float]:
    """Their largest absolute values in order, with one copy for each device and dtype."""
    alike: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for place, extremes in enumerate(kept):
        alike.setdefault((extremes.low.device, extremes.low.dtype), []).append(place)
    values = [0.0] * len(kept)
    for places in alike.values():
        low = torch.stack([kept[place].low for place in places])
        high = torch.stack([kept[place].high for place in places])
        for place, value in zip(places, _larger(low, high).tolist(), strict=True):
            values[place] = value
    return iter(values)
