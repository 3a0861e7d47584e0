"""What all adapters on 4-bit checkpoints share, whichever library trains them.

Choosing a group size, filling a library's empty layer, packing and drawing codes. The two formats are in
``_gptq_format.py`` and ``_awq_format.py``; what only gptqmodel has is in ``_gptqmodel.py``.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from bench.load.contract import Layer, Options, PackedBackend, Shape, largest_dividing_group

if TYPE_CHECKING:
    import torch

EVEN_CODES_DEVIATION = ((16**2 - 1) / 12) ** 0.5
GROUP_SIZES = {"cpu": (32, 64, 128), "cuda": (16, 32, 64, 128)}
"""What the trainable kernels take: the CPU's ATen kernel starts at 32."""


class GroupOptions(Options):
    """Options of a 4-bit checkpoint."""

    group_size: int = 128


Chosen = TypeVar("Chosen", bound=GroupOptions)


class FourBitCheckpoint(PackedBackend):
    """A backend on 4-bit checkpoints in groups. What differs from format to format is below it."""

    codes = ("qweight",)
    refused_placements = {
        "fsdp": "the packed weights are buffers, and FSDP cuts parameters alone: each card would hold all"
    }
    options: GroupOptions

    def fit(self, shapes: Sequence[Shape]) -> None:
        """Replace a group size that does not divide the input features."""
        self._take(*fitted(self.options, shapes, self.device))

    def adopt(self, config: Mapping[str, Any]) -> None:
        """Take over a published checkpoint's group size; ValueError where it cannot be trained."""
        group = checked_group(config, self.method, self.device)
        self.check_layout(config)
        self._take(*regrouped(self.options, group, "as the checkpoint has it"))

    @abstractmethod
    def check_layout(self, config: Mapping[str, Any]) -> None:
        """Raise ValueError for a layout of a published checkpoint that this adapter does not read."""

    def _take(self, options: GroupOptions, note: str | None) -> None:
        self.options = options
        self.notes += [note] if note else []


def fitted(options: Chosen, shapes: Sequence[Shape], device: str) -> tuple[Chosen, str | None]:
    """Options whose group size divides every layer, and a note where that is not the wanted one.

    Raises ValueError where none does or where 8 codes do not fill a word.
    """
    if any(shape.out_features % 8 for shape in shapes):
        raise ValueError("4-bit codes are packed 8 to a word: every layer's output features must divide by 8")
    group = largest_dividing_group(shapes, options.group_size, GROUP_SIZES[device])
    if group is None:
        raise ValueError(
            f"no group size of {GROUP_SIZES[device]} up to {options.group_size} divides every "
            f"layer's input features"
        )
    return regrouped(options, group, "the largest that divides every layer")


def regrouped(options: Chosen, group: int, why: str) -> tuple[Chosen, str | None]:
    """Options with another group size, and a note where that is a change."""
    if group == options.group_size:
        return options, None
    note = f"group size {group} instead of {options.group_size}: {why}"
    return options.model_copy(update={"group_size": group}), note


def checked_group(config: Mapping[str, Any], method: str, device: str) -> int:
    """The group size of a published checkpoint's ``quantization_config``; ValueError if not trainable."""
    if config.get("quant_method", method) != method:
        raise ValueError(f"the checkpoint's quant_method is '{config['quant_method']}', not '{method}'")
    bits, group = (
        config.get("bits", config.get("w_bit")),
        config.get("group_size", config.get("q_group_size")),
    )
    if bits != 4:
        raise ValueError(f"the checkpoint has {bits} bits, this backend trains 4")
    if group not in GROUP_SIZES[device]:
        raise ValueError(
            f"the checkpoint's group size {group} is not one of {GROUP_SIZES[device]}, which the "
            f"trainable {method} kernels take on {device}"
        )
    return int(group)


def take(built: Any, layer: Layer, names: Sequence[str]) -> None:
    """Give a library's empty layer the packed tensors of ``layer`` and its bias. Raises ValueError for a
    tensor of another shape."""
    for name in names:
        tensor = layer.tensors[name]
        expected = getattr(built, name)
        if tensor.shape != expected.shape:
            raise ValueError(
                f"{layer.name}.{name} has shape {tuple(tensor.shape)}, "
                f"the layer needs {tuple(expected.shape)}"
            )
        setattr(built, name, tensor.to(layer.device, copy=True))
    if layer.bias is not None:
        built.bias = layer.bias


def random_words(shape: tuple[int, int], generator: torch.Generator, device: torch.device) -> torch.Tensor:
    """int32 words of 8 random codes each: every code from 0 to 15 is as likely."""
    import torch

    low, high = -(2**31), 2**31
    return torch.randint(low, high, shape, generator=generator, device=device, dtype=torch.int32)


def random_scales(
    shape: tuple[int, int], deviation: float, generator: torch.Generator, device: torch.device
) -> torch.Tensor:
    """float16 scales, within a tenth of what gives weights of the standard deviation ``deviation``: codes
    that are all as likely have one of sqrt((16^2 - 1)/12) = 4.61."""
    import torch

    spread = 0.9 + 0.2 * torch.rand(shape, generator=generator, device=device)
    return (deviation / EVEN_CODES_DEVIATION * spread).to(torch.float16)


def pack_rows(codes: torch.Tensor) -> torch.Tensor:
    """Pack 4-bit codes (rows x columns, int32) 8 rows to an int32 word, lowest bits first."""
    import torch

    rows, columns = codes.shape
    words = torch.zeros(rows // 8, columns, dtype=torch.int32)
    for place in range(8):
        words |= codes[place::8].to(torch.int32) << (4 * place)
    return words


def pack_columns(codes: torch.Tensor, order: Sequence[int]) -> torch.Tensor:
    """Pack 4-bit codes (rows x columns, int32) 8 columns to an int32 word, taken in ``order``."""
    import torch

    grouped = codes.reshape(codes.shape[0], -1, 8)
    words = torch.zeros(grouped.shape[:2], dtype=torch.int32)
    for place, column in enumerate(order):
        words |= grouped[:, :, column].to(torch.int32) << (4 * place)
    return words
