"""What ``backends/gptq.py`` and ``backends/awq.py`` share: choosing and filling gptqmodel's layers.

gptqmodel replaced AutoGPTQ and AutoAWQ and reads their checkpoints. Its automatic choice of a kernel is
not used: on a CPU with AVX-512 it compiles an extension for a minute that cannot train, and by default it
prefers kernels without a backward. The kernel is named per device instead, and is an option.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from backends._four_bit import GroupOptions, take
from bench.ask.experiment import Dtype
from bench.load.contract import DTYPE_BYTES, Layer, Shape, Workspace


class PackedOptions(GroupOptions):
    """Those of gptqmodel's backends."""

    kernel: str = "auto"
    """A trainable kernel of gptqmodel by its backend name; auto: the one known to train on the device."""


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
