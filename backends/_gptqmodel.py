"""What ``backends/gptq.py`` and ``backends/awq.py`` share: choosing and filling gptqmodel's layers.

gptqmodel replaced AutoGPTQ and AutoAWQ and reads their checkpoints. Its automatic choice of a kernel is
not used: on a CPU with AVX-512 it compiles an extension for a minute that cannot train, and by default it
prefers kernels without a backward. The kernel is named per device instead, and is an option.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from bench.ask.experiment import Dtype
from bench.load.contract import DTYPE_BYTES, Layer, Options, Shape, Workspace, largest_dividing_group

if TYPE_CHECKING:
    import torch

EVEN_CODES_DEVIATION = ((16**2 - 1) / 12) ** 0.5
GROUP_SIZES = {"cpu": (32, 64, 128), "cuda": (16, 32, 64, 128)}
"""What the trainable kernels take: the CPU's ATen kernel starts at 32."""


NOT_CUT = (
    "gptqmodel keeps packed weights in buffers, and FSDP cuts parameters alone: each card would hold all"
)
"""Why FSDP is refused."""


class GroupOptions(Options):
    """Options of a 4-bit checkpoint."""

    group_size: int = 128


class PackedOptions(GroupOptions):
    """Those of gptqmodel's backends."""

    kernel: str = "auto"
    """A trainable kernel of gptqmodel by its backend name; auto: the one known to train on the device."""


Chosen = TypeVar("Chosen", bound=GroupOptions)


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


def kernel_class(
    method: str, checkpoint_format: str, options: PackedOptions, device: str, automatic: Mapping[str, str]
) -> Any:
    """gptqmodel's layer class for the named kernel. Raises ValueError where it cannot train."""
    from gptqmodel.utils.importer import hf_select_quant_linear_v2

    name = automatic[device] if options.kernel == "auto" else options.kernel
    chosen = hf_select_quant_linear_v2(
        bits=4,
        group_size=options.group_size,
        desc_act=False,
        sym=method == "gptq",
        zero_point=None if method == "gptq" else True,
        format=checkpoint_format,
        quant_method=method,
        backend=name,
        device_map={"": device},
        pack=False,
    )
    if not chosen.SUPPORTS_TRAINING:
        raise ValueError(f"gptqmodel's kernel '{name}' ({chosen.__name__}) cannot train")
    return chosen


def fill(kernel: Any, layer: Layer, options: PackedOptions, *, symmetric: bool, names: Sequence[str]) -> Any:
    """An instance of ``kernel`` holding the packed tensors of ``layer``, on its device, not yet ready."""
    import torch

    with torch.device("meta"):
        built = kernel(
            bits=4,
            group_size=options.group_size,
            sym=symmetric,
            desc_act=False,
            in_features=layer.shape.in_features,
            out_features=layer.shape.out_features,
            bias=layer.bias is not None,
            register_buffers=True,
        )
    take(built, layer, names)
    for name, buffer in list(built.named_buffers(recurse=False)):
        if buffer.is_meta:
            raise ValueError(
                f"{layer.name}: gptqmodel's layer has a tensor '{name}' that no checkpoint fills"
            )
    built.requires_grad_(False)
    return built


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


def dequantizing_workspace(shape: Shape, dtype: Dtype) -> Workspace:
    """Of gptqmodel's kernels in plain torch: the forward dequantizes the whole weight, and autograd keeps it
    for the backward.

    At most at once: codes and zero points as int8 and their difference (2 bytes a weight), the scales and
    the product in float16 (4), or before that the codes as int32 and int8 (5); then the float16 product and
    its copy in the compute dtype. ``torch.compile``, which gptqmodel asks for, may fuse the first steps; that
    is not counted on (``_dequantize_from_codes`` in nn_modules/qlinear/__init__.py of gptqmodel 7.7.0).
    """
    dense = shape.weights * DTYPE_BYTES[dtype]
    return Workspace(forward=max(6 * shape.weights, 2 * shape.weights + dense), backward=0, kept=dense)


def run_calibration(
    model_folder: Path, output: Path, texts: Sequence[str], config: Mapping[str, Any]
) -> None:
    """Quantize the checkpoint in ``model_folder`` with gptqmodel, calibrating on ``texts``."""
    # gptqmodel's loader wants two workers in its pool, also on two cores, where it would start one.
    os.environ.setdefault("GPTQMODEL_CPU_WORKERS", "2")
    from gptqmodel import GPTQModel, QuantizeConfig

    model = GPTQModel.load(str(model_folder), QuantizeConfig(**config))
    model.quantize(list(texts), batch_size=1)
    model.save(str(output))


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
