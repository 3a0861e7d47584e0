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

if TYPE_CHECKING:
    import torch

TWINS = ("twin-a", "twin-b")
"""The same adapter twice."""
MIB = 2**20

Kind = Literal["nothing", "delay", "holds-load", "holds-forward", "holds-backward", "holds-optimizer", "leaks",
               "hidden-dense-copy", "other-data", "other-adapters", "trains-the-base", "skips-layers"]  # fmt: skip


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


# ---- held or leaked ------------------------------------------------------------------------------


class _Held:
    """Memory outside of every layer, so that no walk over a layer finds it."""

    tensor: Any = None
    leaked: list[Any] = []
    dense: dict[int, Any] = {}

    @classmethod
    def take(cls, nbytes: int, device: Any) -> None:
        cls.tensor = _touched(nbytes, device)

    @classmethod
    def drop(cls, *_: object) -> None:
        cls.tensor = None


def _touched(nbytes: int, device: Any) -> Any:
    import torch

    return torch.ones(nbytes, dtype=torch.uint8, device=device)


def _hold_load(nbytes: int, layer: Layer) -> None:
    """From the first layer's quantization until adapters are attached."""
    import peft

    _Held.take(nbytes, layer.device)
    peft.get_peft_model = _before(peft.get_peft_model, _Held.drop)


def _let_go_after_the_loss(nbytes: int, layer: Layer) -> None:
    """The end of the hold that `_hold_forward` begins."""
    from torch.nn import functional

    functional.cross_entropy = _after(functional.cross_entropy, _Held.drop)


def _hold_forward(adapter: Planted, layer: Layer, built: Any) -> Any:
    """From the first layer's forward until the loss is there."""
    if adapter.layers == 1:
        nbytes = adapter.options.mebibytes * MIB
        built.register_forward_pre_hook(lambda module, inputs: _Held.take(nbytes, inputs[0].device))
    return built


def _hold_backward(nbytes: int, layer: Layer) -> None:
    import torch

    device = layer.device
    whole = _before(torch.Tensor.backward, lambda: _Held.take(nbytes, device))
    torch.Tensor.backward = _after(whole, _Held.drop)


def _hold_optimizer(nbytes: int, layer: Layer) -> None:
    from torch.optim import optimizer

    device = layer.device
    optimizer.register_optimizer_step_pre_hook(lambda *_: _Held.take(nbytes, device))
    optimizer.register_optimizer_step_post_hook(_Held.drop)


def _leak(nbytes: int, layer: Layer) -> None:
    """So much more after every step."""
    from torch.optim import optimizer

    device = layer.device
    optimizer.register_optimizer_step_post_hook(lambda *_: _Held.leaked.append(_touched(nbytes, device)))


# ---- other work ----------------------------------------------------------------------------------


def _other_data(nbytes: int, layer: Layer) -> None:
    """The text of other conversations."""
    from bench.run import workload

    told = workload.conversation
    workload.conversation = lambda index: told(index + 1000)


def _other_adapters(nbytes: int, layer: Layer) -> None:
    """Initial values of another seed."""
    from bench.load import lora

    drawn = lora.initial_values
    lora.initial_values = lambda name, shape, seed: drawn(name, shape, seed + 1)


def _train_the_base(nbytes: int, layer: Layer) -> None:
    """The norms' weights are to be trained too."""
    import peft

    wrap = peft.get_peft_model

    def wrapped(*arguments: Any, **more: Any) -> Any:
        model = wrap(*arguments, **more)
        for name, parameter in model.named_parameters():
            if name.endswith("norm.weight"):
                parameter.requires_grad_(True)
        return model

    peft.get_peft_model = wrapped


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

    _Held.dense[id(built)] = layer.tensors["weight"].to(layer.dtype)
    built.register_forward_hook(
        lambda module, inputs, output: functional.linear(
            inputs[0].to(output.dtype), _Held.dense[id(module)], module.bias
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


def _before(function: Callable[..., Any], action: Callable[[], object]) -> Callable[..., Any]:
    def changed(*arguments: Any, **more: Any) -> Any:
        action()
        return function(*arguments, **more)

    return changed


def _after(function: Callable[..., Any], action: Callable[[], object]) -> Callable[..., Any]:
    def changed(*arguments: Any, **more: Any) -> Any:
        result = function(*arguments, **more)
        action()
        return result

    return changed


AT_FIRST: dict[str, Callable[[int, Layer], None]] = {
    "holds-load": _hold_load,
    "holds-forward": _let_go_after_the_loss,
    "holds-backward": _hold_backward,
    "holds-optimizer": _hold_optimizer,
    "leaks": _leak,
    "other-data": _other_data,
    "other-adapters": _other_adapters,
    "trains-the-base": _train_the_base,
}
EVERY_LAYER: dict[str, Callable[[Planted, Layer, Any], Any]] = {
    "delay": _delay,
    "holds-forward": _hold_forward,
    "skips-layers": _skip,
    "hidden-dense-copy": _hidden_dense_copy,
}
