"""The operation that made the first value which is not finite: every operation watched, one by one.

`OperationWatch` sees each call that reaches torch's dispatcher, forward and backward, quantization kernels
included, and keeps the first whose inputs were finite and whose output was not. It is slow and is used for
one micro-batch, in the replay of a failure.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Self

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.hooks import RemovableHandle

from bench.probe.ranges import DECODER_LAYER, abs_max, plain_name
from bench.record.stability import FailurePhase

INTENDED = frozenset(
    (
        "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "resize_",
        "full", "full_like", "new_full", "scalar_tensor", "fill_", "zeros", "ones",
        "masked_fill", "masked_fill_", "where",
    )
)  # fmt: skip
"""Operations whose infinities somebody wanted (masks), or that only reserve memory."""

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
    """Of its floating inputs; None: it had none."""
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
        """In the backward: the module whose output's gradient was computed last."""
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
        output = func(*args, **(kwargs or {}))
        if self.found is None:
            self._look(str(func), args, kwargs or {}, output)
        return output

    def _look(self, name: str, args: Any, kwargs: Any, output: Any) -> None:
        if name.split(".")[1] in INTENDED:
            return
        results = list(_floating(output))
        worst = next((v for r in results if (v := _bad_value(r)) is not None), None)
        if worst is None:
            return
        # An operation in place has its result among its inputs by now.
        inputs = [t for t in _floating((args, kwargs)) if all(t is not result for result in results)]
        if any(_bad_value(tensor) is not None for tensor in inputs):
            return
        if worst == float("-inf") and self._in_attention():
            return  # a mask: these scores are meant to vanish in the softmax
        self.found = Operation(
            name=name,
            phase=self.phase,
            module=self._where(),
            value=worst,
            input_abs_max=max((float(abs_max(t)) for t in inputs if t.numel()), default=None),
            output_dtype=str(results[0].dtype).removeprefix("torch."),
        )

    def _where(self) -> str | None:
        return self._stack[-1] if self._stack else self._current

    def _in_attention(self) -> bool:
        return "attn" in (self._where() or "")

    def _hooks(self, name: str) -> tuple[Any, Any]:
        def before(module: nn.Module, inputs: Any) -> None:
            if DECODER_LAYER.match(name):
                # Checkpointing may leave a layer's second forward in its middle, without the hooks after it.
                self._stack.clear()
            self._stack.append(name)

        def after(module: nn.Module, inputs: Any, output: Any) -> None:
            if self._stack:
                self._stack.pop()
            tensor = output[0] if isinstance(output, tuple) else output
            if isinstance(tensor, torch.Tensor) and tensor.requires_grad:
                tensor.register_hook(arrived)  # type: ignore[no-untyped-call]

        def arrived(gradient: torch.Tensor) -> None:
            self._stack.clear()
            self._current = name

        return before, after


def _floating(value: Any) -> Iterator[torch.Tensor]:
    """Floating tensors in nested arguments."""
    if isinstance(value, torch.Tensor):
        if value.is_floating_point() and value.device.type != "meta":
            yield value
    elif isinstance(value, dict):
        for inner in value.values():
            yield from _floating(inner)
    elif isinstance(value, list | tuple):
        for inner in value:
            yield from _floating(inner)


def _bad_value(tensor: torch.Tensor) -> float | None:
    """A value of the tensor that is not finite: NaN first, then an infinity."""
    if not tensor.numel() or bool(torch.isfinite(tensor).all()):
        return None
    if bool(torch.isnan(tensor).any()):
        return float("nan")
    return float("inf") if bool((tensor == float("inf")).any()) else float("-inf")
