"""What is planted into a whole worker, by replacing functions of torch, PEFT and the harness inside it.

`AT_FIRST` says what is done when the first layer is built; `tests.truth.adapters` does it, and plants the rest
into single layers.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from bench.load.contract import Layer

# ---- held or leaked ------------------------------------------------------------------------------


class Held:
    """Memory outside of every layer, so that no walk over a layer finds it."""

    tensor: Any = None
    leaked: list[Any] = []
    dense: dict[int, Any] = {}

    @classmethod
    def take(cls, nbytes: int, device: Any) -> None:
        cls.tensor = touched(nbytes, device)

    @classmethod
    def drop(cls, *_: object) -> None:
        cls.tensor = None


def touched(nbytes: int, device: Any) -> Any:
    import torch

    return torch.ones(nbytes, dtype=torch.uint8, device=device)


def _hold_load(nbytes: int, layer: Layer) -> None:
    """From the first layer's quantization until adapters are attached."""
    import peft

    Held.take(nbytes, layer.device)
    peft.get_peft_model = _before(peft.get_peft_model, Held.drop)


def _let_go_after_the_loss(nbytes: int, layer: Layer) -> None:
    """The end of the hold that `_hold_forward` begins."""
    from torch.nn import functional

    functional.cross_entropy = _after(functional.cross_entropy, Held.drop)


def _hold_backward(nbytes: int, layer: Layer) -> None:
    import torch

    device = layer.device
    whole = _before(torch.Tensor.backward, lambda: Held.take(nbytes, device))
    torch.Tensor.backward = _after(whole, Held.drop)


def _hold_optimizer(nbytes: int, layer: Layer) -> None:
    from torch.optim import optimizer

    device = layer.device
    optimizer.register_optimizer_step_pre_hook(lambda *_: Held.take(nbytes, device))
    optimizer.register_optimizer_step_post_hook(Held.drop)


def _leak(nbytes: int, layer: Layer) -> None:
    """So much more after every step."""
    from torch.optim import optimizer

    device = layer.device
    optimizer.register_optimizer_step_post_hook(lambda *_: Held.leaked.append(touched(nbytes, device)))


# ---- other work ----------------------------------------------------------------------------------


def _other_data(nbytes: int, layer: Layer) -> None:
    """The text of other conversations."""
    from bench.run import workload

    told = workload.conversation
    workload.conversation = lambda index: told(index + 1000)


def _other_data_behind_the_reader(nbytes: int, layer: Layer) -> None:
    """Each micro-batch backwards, once the reader has counted it."""
    from bench.run import workload

    draw = workload.WorkloadReader.next_batch

    def turned(reader: Any) -> Any:
        batch = draw(reader)
        return type(batch)(batch.input_ids.flip(1), batch.labels.flip(1), batch.attention_mask.flip(1))

    workload.WorkloadReader.next_batch = turned


def _other_ids_in_the_model(nbytes: int, layer: Layer) -> None:
    """Each id replaced by the one before it, on its way into the model."""
    import torch
    from torch.nn.modules import module

    def shift(called: Any, inputs: Any) -> Any:
        return (torch.clamp(inputs[0] - 1, min=0),) if isinstance(called, torch.nn.Embedding) else None

    module.register_module_forward_pre_hook(shift)


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
    "other-data-behind-the-reader": _other_data_behind_the_reader,
    "other-ids-in-the-model": _other_ids_in_the_model,
    "other-adapters": _other_adapters,
    "trains-the-base": _train_the_base,
}
