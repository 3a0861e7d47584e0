"""One honest int8 adapter under many names; under each name but the twins', one thing is planted.

A third party's distribution as far as the benchmark can tell (`tests.truth.session` announces it). Planting is
brutal: functions inside the worker are replaced once the first layer is built. The arithmetic is that of
``backends.eetq``, so that whatever is not planted is the same.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

from backends.eetq import Eetq
from bench.load.contract import Layer, Options
from tests.truth.planting import AT_FIRST, Held

if TYPE_CHECKING:
    import torch

TWINS = ("twin-a", "twin-b")
"""The same adapter twice."""
MIB = 2**20

Kind = Literal["nothing", "delay", "holds-load", "holds-forward", "holds-backward", "holds-optimizer", "leaks",
               "hidden-dense-copy", "other-data", "other-data-behind-the-reader", "other-ids-in-the-model",
               "other-adapters", "trains-the-base", "skips-layers"]  # fmt: skip


class Plant(Options):
    """What is planted, and how much of it."""

    kind: Kind
    delay_seconds: float = 0.0
    """Of every layer's forward."""
    mebibytes: int = 64
    """Held during one phase, or let go of never, once a step."""


def _variants() -> dict[str, Options]:
    planted = {f"planted-{kind}": Plant(kind=kind) for kind in Kind.__args__ if kind != "nothing"}
    return {**{name: Plant(kind="nothing") for name in TWINS}, **planted}


class Planted(Eetq):
    """Int8 with something planted, for ``make truth``."""

    variants = _variants()
    extra = None
    options: Plant  # type: ignore[assignment]
    layers = 0
    """Built so far."""

    @property
    def native(self) -> bool:
        return False

    def linear(self, layer: Layer) -> torch.nn.Module:
        if self.layers == 0 and self.options.kind in AT_FIRST:
            AT_FIRST[self.options.kind](self.options.mebibytes * MIB, layer)
        built = super().linear(layer)
        self.layers += 1
        change = EVERY_LAYER.get(self.options.kind)
        return change(self, layer, built) if change else built


def _hold_forward(adapter: Planted, layer: Layer, built: Any) -> Any:
    """From the first layer's forward until the loss is there."""
    if adapter.layers == 1:
        nbytes = adapter.options.mebibytes * MIB
        built.register_forward_pre_hook(lambda module, inputs: Held.take(nbytes, inputs[0].device))
    return built


# ---- other layers --------------------------------------------------------------------------------


def _delay(adapter: Planted, layer: Layer, built: Any) -> Any:
    """Spins, since a sleep is only as exact as the scheduler."""
    seconds = adapter.options.delay_seconds

    def spin(*_: object) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            pass

    built.register_forward_pre_hook(spin)
    return built


def _skip(adapter: Planted, layer: Layer, built: Any) -> Any:
    """Leaves every second layer as it was."""
    return built if adapter.layers % 2 else _dense(layer)


def _hidden_dense_copy(adapter: Planted, layer: Layer, built: Any) -> Any:
    """Computes with the unquantized weight, which it keeps where no walk over the layer comes by."""
    from torch.nn import functional

    Held.dense[id(built)] = layer.tensors["weight"].to(layer.dtype)
    built.register_forward_hook(
        lambda module, inputs, output: functional.linear(
            inputs[0].to(output.dtype), Held.dense[id(module)], module.bias
        )
    )
    return built


def _dense(layer: Layer) -> Any:
    import torch

    shape = layer.shape
    built = torch.nn.Linear(shape.in_features, shape.out_features, layer.bias is not None, device="meta")
    built.weight = torch.nn.Parameter(layer.tensors["weight"].to(layer.dtype), requires_grad=False)
    if layer.bias is not None:
        built.bias = torch.nn.Parameter(layer.bias, requires_grad=False)
    return built


# ---- which is which ------------------------------------------------------------------------------


EVERY_LAYER: dict[str, Callable[[Planted, Layer, Any], Any]] = {
    "delay": _delay,
    "holds-forward": _hold_forward,
    "skips-layers": _skip,
    "hidden-dense-copy": _hidden_dense_copy,
}
