"""The operation that made the first value which is not finite: every operation watched, one by one.

`OperationWatch` sees each call that reaches torch's dispatcher, forward and backward, quantization kernels
included, and keeps the first whose inputs were finite and whose output was not. It is slow and is used for
one micro-batch, in the replay of a failure.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle
from torch.utils.weak import WeakTensorKeyDictionary

from bench.probe.ranges import DECODER_LAYER, abs_max, plain_name
from bench.record.stability import FailurePhase

INTENDED = frozenset(
    (
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_",
        "full", "full_like", "new_full", "scalar_tensor", "lift_fresh", "fill_", "zeros", "ones",
        "masked_fill", "masked_fill_", "where",
    )
)  # fmt: skip
"""Operations whose infinities somebody wrote down (masks, constants), or that only reserve memory."""

WORDS: Mapping[str, str] = {
    "mm": "matrix product",
    "addmm": "matrix product",
    "bmm": "matrix product",
    "baddbmm": "matrix product",
    "linear": "matrix product",
    "matmul": "matrix product",
    "mul": "elementwise product",
    "mul_": "elementwise product",
    "add": "addition",
    "add_": "addition",
    "sub": "subtraction",
    "div": "division",
    "_to_copy": "cast to another dtype",
    "copy_": "cast to another dtype",
    "to": "cast to another dtype",
    "silu": "activation",
    "gelu": "activation",
    "silu_backward": "gradient of the activation",
    "gelu_backward": "gradient of the activation",
    "_softmax": "softmax",
    "_log_softmax": "log softmax of the loss",
    "nll_loss_forward": "mean loss over the answer tokens",
    "pow": "power",
    "rsqrt": "reciprocal square root",
    "exp": "exponential",
    "embedding": "lookup in the embedding",
    "native_dropout": "dropout",
}


@dataclass(frozen=True)
class Operation:
    """One call: finite values in, something else out."""

    name: str
    """As torch names it, e.g. ``aten.mm.default``."""
    phase: FailurePhase
    module: str | None
    """The module inside of which it was called, by its plain name."""
    value: float
    """NaN or an infinity."""
    input_abs_max: float | None
    """Of its floating inputs, factors and other plain numbers included; None: it had none."""
    output_dtype: str

    @property
    def description(self) -> str:
        """In words."""
        words = _words(self.name)
        if words == "cast to another dtype":
            words = f"cast to {self.output_dtype}"
        place = f" in {self.module}" if self.module else ""
        return f"{words}{place}, {self.phase}"


def _words(name: str) -> str:
    base = name.split(".")[1] if "." in name else name
    if "scaled_dot_product" in base:
        return "attention's scaled dot product"
    if not name.startswith("aten."):
        return f"the quantization library's {base}"
    return WORDS.get(base, f"{base} operation")


class OperationWatch(TorchDispatchMode):
    """As a context manager around one forward and backward of ``model``. ``found``: the first operation."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.found: Operation | None = None
        self.phase: FailurePhase = "forward"
        """Set to "backward" by whoever starts it."""
        self._model = model
        self._stack: list[str] = []
        self._current: str | None = None
        """In the backward: the module that is being gone through."""
        self._claimed = WeakTensorKeyDictionary()
        """Tensors with a hook on their gradient, and the module that it names."""
        self._handles: list[RemovableHandle] = []

    def __enter__(self) -> Self:
        """Put hooks on every module, so that an operation knows where it is."""
        for name, module in self._model.named_modules():
            before, after = self._hooks(plain_name(name))
            self._handles.append(module.register_forward_pre_hook(before))
            self._handles.append(module.register_forward_hook(after))
        return super().__enter__()  # type: ignore[no-any-return, no-untyped-call]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Take the hooks off."""
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call, and look at what came out."""
        kwargs = kwargs or {}
        if self.found is not None:
            return func(*args, **kwargs)
        name = str(func)
        written, read = _overwritten(func, name.split(".")[1], args, kwargs)
        # What is overwritten must be looked at before it is.
        spoilt = any(map(self._is_bad, read))
        sizes = [float(abs_max(tensor)) for tensor in read if tensor.numel()]
        output = func(*args, **kwargs)
        if name.split(".")[1] not in INTENDED and not spoilt:
            self._look(name, args, kwargs, [*_floating(output), *written], sizes)
        return output

    def _look(
        self, name: str, args: Any, kwargs: Any, results: list[torch.Tensor], overwritten: list[float]
    ) -> None:
        """``overwritten``: absolute maxima of the inputs that were."""
        worst = next((v for r in results if (v := _bad_value(r)) is not None), None)
        if worst is None:
            return
        inputs = [t for t in _floating((args, kwargs)) if all(t is not result for result in results)]
        if any(self._is_bad(tensor) for tensor in inputs):
            return
        if worst == float("-inf") and self._in_attention():
            return  # a mask: these scores are meant to vanish in the softmax
        sizes = [float(abs_max(tensor)) for tensor in inputs if tensor.numel()]
        sizes += [*overwritten, *map(abs, _numbers((args, kwargs)))]
        self.found = Operation(
            name=name,
            phase=self.phase,
            module=self._where(),
            value=worst,
            # A mask's minus infinity is no size.
            input_abs_max=max(filter(math.isfinite, sizes), default=None),
            output_dtype=str(results[0].dtype).removeprefix("torch."),
        )

    def _is_bad(self, tensor: torch.Tensor) -> bool:
        """Whether an input is not finite. Masks give attention's softmax minus infinity on purpose: what
        comes of it is the softmax's doing."""
        value = _bad_value(tensor)
        return value is not None and not (value == float("-inf") and self._in_attention())

    def _where(self) -> str | None:
        return self._stack[-1] if self._stack else self._current

    def _in_attention(self) -> bool:
        """In its core, that is: a projection's minus infinity is no mask."""
        return (self._where() or "").endswith("attn")

    def _hooks(self, name: str) -> tuple[Any, Any]:
        def before(module: nn.Module, inputs: Any) -> None:
            if DECODER_LAYER.match(name):
                # Checkpointing may leave a layer's second forward in its middle, without the hooks after it.
                self._stack.clear()
            if inputs and self._stack:
                self._tell_of(inputs[0], self._stack[-1])
            self._stack.append(name)

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._stack:
                self._stack.pop()
            self._tell_of(output[0] if isinstance(output, tuple) else output, name)

        return before, after

    def _tell_of(self, tensor: Any, module: str) -> None:
        """In the backward, what follows the tensor's gradient belongs to ``module``: to what put the tensor
        out, or, where no module did, to what called the module that took it in. The first to claim a tensor
        keeps it: an MLP hands on what its down_proj put out."""
        if not isinstance(tensor, torch.Tensor) or not tensor.requires_grad or tensor in self._claimed:
            return
        self._claimed[tensor] = module

        def arrived(gradient: torch.Tensor) -> None:
            self._stack.clear()
            self._current = module

        tensor.register_hook(arrived)  # type: ignore[no-untyped-call]


def _leaves(value: Any) -> Iterator[Any]:
    """What nested arguments hold."""
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        for inner in value:
            yield from _leaves(inner)
    else:
        yield value


def _floating(value: Any) -> list[torch.Tensor]:
    """Floating tensors in nested arguments."""
    tensors = (leaf for leaf in _leaves(value) if isinstance(leaf, torch.Tensor))
    return [tensor for tensor in tensors if tensor.is_floating_point() and tensor.device.type != "meta"]


def _numbers(value: Any) -> list[float]:
    """Plain floating numbers in nested arguments: the factor of a product, say."""
    return [leaf for leaf in _leaves(value) if isinstance(leaf, float)]


def _overwritten(
    func: Any, base: str, args: Any, kwargs: Mapping[str, Any]
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    """Floating arguments that an operation writes into, and those of them that it reads as well.

    ``add_`` reads what it overwrites; ``copy_`` and whatever fills an ``out`` do not.
    """
    schema = func._schema
    if not schema.is_mutable:
        return [], []
    named = dict(zip((argument.name for argument in schema.arguments), args, strict=False)) | dict(kwargs)
    written = _floating(
        [named.get(a.name) for a in schema.arguments if a.alias_info and a.alias_info.is_write]
    )
    return written, written if base.endswith("_") and base not in INTENDED | {"copy_"} else []


def _bad_value(tensor: torch.Tensor) -> float | None:
    """A value of the tensor that is not finite: NaN first, then an infinity."""
    if not tensor.numel() or bool(torch.isfinite(tensor).all()):
        return None
    if bool(torch.isnan(tensor).any()):
        return float("nan")
    return float("inf") if bool((tensor == float("inf")).any()) else float("-inf")
