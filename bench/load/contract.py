"""The contract that a backend keeps. Adapters in ``backends/`` import this module and nothing else of ours.

A backend says how **one linear layer** is quantized. The harness does everything else, the same for all:
it reads or draws the weights one tensor at a time, places what is not quantized, attaches LoRA, trains,
times and measures. So two backends cannot differ in their embeddings' dtype, their initial adapters or
their data, and no adapter ever holds a whole 16-bit model.

Two kinds exist: `Backend` quantizes dense weights while they are loaded; `PackedBackend` reads layers
that a pre-quantized checkpoint holds already packed, and can pack one where a model has none.

This module never imports torch: the command line lists backends without it.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from bench.ask.experiment import Dtype, Frozen, Placement

if TYPE_CHECKING:
    import torch


class Options(Frozen):
    """Base of a backend's options: typed, immutable, unknown keys refused."""


@dataclass(frozen=True)
class Shape:
    """Shape of one linear layer's weight, ``(out_features, in_features)`` as torch stores it."""

    out_features: int
    in_features: int

    @property
    def weights(self) -> int:
        """Number of weights, biases excluded."""
        return self.out_features * self.in_features


@dataclass(frozen=True)
class Layer:
    """One linear layer to be built. Its tensors are on ``device``, where the result belongs."""

    name: str
    shape: Shape
    tensors: Mapping[str, torch.Tensor]
    """``weight`` (out x in, the checkpoint's dtype), or the packed tensors by their checkpoint names."""
    bias: torch.Tensor | None
    """``(out_features,)`` in ``dtype``, on ``device``."""
    dtype: torch.dtype
    """Compute dtype: what the layer receives and returns."""
    device: torch.device


DTYPE_BYTES: Mapping[Dtype, int] = {"bfloat16": 2, "float16": 2, "float32": 4}


@dataclass(frozen=True)
class Workspace:
    """Bytes that one layer's training kernel needs beside its weights, its input and its output."""

    forward: int
    """The most at once while the forward multiplies, what is kept included."""
    backward: int
    """The most at once while the backward multiplies, what was kept not included."""
    kept: int = 0
    """From the forward (or its recomputation) to the layer's backward."""


class Backend(ABC):
    """One way to keep frozen weights small while LoRA adapters on top of them are trained.

    Subclasses set the class attributes, and write `linear` and `expected_bits`. The first line of their
    docstring is what ``qlora-bench backends`` shows.
    """

    variants: ClassVar[Mapping[str, Options]]
    """Ids that people type -> the options each stands for."""
    requires: ClassVar[tuple[str, ...]] = ()
    """Importable packages it needs, also the names of their distributions. A run can import these
    quantization libraries and no others."""
    extra: ClassVar[str | None] = None
    """The extra of pyproject.toml that brings them."""
    distributions: ClassVar[Mapping[str, str]] = {}
    """Of what it requires, package -> distribution, where their names differ."""
    environments: ClassVar[tuple[str, ...]] = ("current",)
    """The environments that it runs in (``bench.run.environments``), the ordinary one first. ``current``: the
    interpreter that runs the command."""
    refused_devices: ClassVar[Mapping[str, str]] = {}
    """Kinds of device ("cpu", "cuda") that it cannot be trained on, with the reason."""
    codes: ClassVar[tuple[str, ...]] = ("weight",)
    """Attributes of the built layer that hold the quantized codes; all other tensors are metadata."""
    adapter_casts_input: ClassVar[bool] = True
    """Whether PEFT's LoRA layer on top casts its input to the adapter's dtype under autocast too, so that
    each projection keeps a copy of its own. All do, but those written for HQQ and AWQ layers."""
    refused_placements: ClassVar[Mapping[Placement, str]] = {
        "fsdp": "its adapter does not say that its layers can be cut over processes and gathered again"
    }
    """Placements that it cannot be trained in, with the reason."""
    uncached: ClassVar[str | None] = "its adapter does not say how a quantized layer is stored"
    """Why ``--cache`` keeps nothing of it; None: it has `store` and `restore`."""
    placement: Placement = "single"
    """How this run uses its devices; set by the harness before `fit`."""

    def __init__(self, options: Options, device: str, requested_dtype: Dtype) -> None:
        self.options = options
        self.device = device
        self.notes: list[str] = []
        """Departures from what was asked, one sentence each; they stand beside the numbers."""
        self.dtype: Dtype = self.effective_dtype(requested_dtype)
        """The compute dtype of everything in the model that is not quantized."""

    def effective_dtype(self, requested: Dtype) -> Dtype:
        """The compute dtype in which this backend really trains on ``self.device``; a note where it is
        not the requested one."""
        return requested

    def fit(self, shapes: Sequence[Shape]) -> None:  # noqa: B027 - a hook, empty on purpose
        """Adjust ``self.options`` to the model's shapes before anything is loaded, with a note for each
        change. Raises ValueError where no option fits."""

    def ready_kernels(self) -> bool:
        """Compile or load, before the load is timed, what the kernels need once and not for each model.
        Returns whether there was anything of the kind. Raises ImportError where it cannot be had here."""
        return False

    @abstractmethod
    def linear(self, layer: Layer) -> torch.nn.Module:
        """Build the frozen, quantized layer on ``layer.device``."""

    def store(self, layer: torch.nn.Module) -> dict[str, torch.Tensor]:
        """What a layer that `linear` built is made of, for ``--cache``: contiguous tensors by names of your
        own, biases excluded. What follows from options, shape and library version need not be among them.

        The tensors may be the layer's own: they are written before anything computes."""
        raise NotImplementedError

    def restore(self, layer: Layer) -> torch.nn.Module:
        """The layer as `linear` built it, to the bit, from ``layer.tensors`` as `store` gave them. They are
        on ``layer.device``; nothing is quantized."""
        raise NotImplementedError

    def stored_form(self) -> str:
        """What `store` gives, where options and library versions do not tell. Another form is another entry
        of the cache."""
        return ""

    def finish(self, model: torch.nn.Module) -> None:  # noqa: B027 - a hook, empty on purpose
        """Leave on the whole model, once all its layers are built, what the library's own loader leaves there
        and PEFT knows its layers by."""

    @abstractmethod
    def expected_bits(self, shape: Shape) -> float:
        """Storage bits per weight by arithmetic: codes, scales, zeros and tables; biases excluded."""

    def kernel(self, layer: torch.nn.Module) -> str:
        """Name of what computes in training."""
        return type(layer).__name__

    def workspace(self, shape: Shape, tokens: int) -> Workspace:
        """What the training kernel of a layer needs besides, in bytes, for ``qlora-bench plan``.

        ``tokens``: rows of its input. Unless a backend says otherwise: that it dequantizes the whole weight
        in the compute dtype, and that autograd keeps that copy for the backward, as it does for a plain
        ``x @ dequantize()``.
        """
        dense = shape.weights * DTYPE_BYTES[self.dtype]
        return Workspace(forward=dense, backward=dense, kept=dense)


class PackedBackend(Backend):
    """A backend whose layers come packed out of a checkpoint (AutoGPTQ and AutoAWQ formats)."""

    uncached = "its layers come packed out of a checkpoint and are not quantized in a run"
    method: ClassVar[str]
    """``quant_method`` in the checkpoint's config.json."""
    calibration_moves_scales: ClassVar[bool] = False
    """Its calibration moves scales between weights and the norms before them, so that neither a weight nor
    an adapter's gradient has a counterpart in the dense model."""
    packed_names: ClassVar[tuple[str, ...]]
    """Tensor names of one packed layer in the checkpoint."""
    checkpoint_of: ClassVar[str | None] = None
    """Id of the backend whose packed checkpoints it reads: that one makes them, in the current environment,
    so that both train the same codes. None: its own."""

    @abstractmethod
    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take bits, group size and format from a checkpoint's ``quantization_config``.

        Raises ValueError for one that this backend cannot train."""

    @abstractmethod
    def config(self) -> dict[str, Any]:
        """The ``quantization_config`` of a checkpoint packed with ``self.options``."""

    @abstractmethod
    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Quantize one dense weight (out x in) by rounding to nearest, in the checkpoint's layout."""

    @abstractmethod
    def draw(
        self, shape: Shape, deviation: float, generator: torch.Generator, device: torch.device
    ) -> dict[str, torch.Tensor]:
        """A layer of random codes and valid scales, as `pack` would give them, on ``device``.

        The weights it stands for are as wide as normal ones of the standard deviation ``deviation``."""

    @abstractmethod
    def calibrate(self, model_folder: Path, output: Path, texts: Sequence[str]) -> str:
        """Quantize a dense checkpoint with calibration on ``texts``; returns the method's name."""


def largest_dividing_group(shapes: Iterable[Shape], wanted: int, allowed: Sequence[int]) -> int | None:
    """The largest allowed group size, at most ``wanted``, that divides every layer's input features.

    SmolLM2's hidden size 576 is 9 x 64, for example: 128 does not divide it, 64 does.
    """
    inputs = {shape.in_features for shape in shapes}
    fitting = [size for size in allowed if size <= wanted and all(n % size == 0 for n in inputs)]
    return max(fitting, default=None)
