"""AutoGPTQ: the checkpoints of ``backends/gptq.py``, trained as people did before gptqmodel replaced it.

Its last release (0.7.1, 2024) is at home with transformers 4.51, so it runs in the environment ``legacy``.
What trains is its plain torch kernel, which transformers chooses there with ``use_exllama=False``: it
dequantizes in float16 and multiplies; ExLlama's kernels have no backward.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from backends import _four_bit
from backends._gptq_format import GptqCheckpoint
from bench.load.contract import Layer, Shape

if TYPE_CHECKING:
    import torch


class AutoGptq(GptqCheckpoint):
    """GPTQ 4-bit symmetric, groups of 128, the same checkpoints as 'gptq' (AutoGPTQ, an older stack)."""

    variants = {"auto-gptq": _four_bit.GroupOptions()}
    environments = ("legacy",)
    requires = ("auto_gptq", "optimum")
    distributions = {"auto_gptq": "auto-gptq"}
    checkpoint_of = "gptq"
    # PEFT 0.15's layer casts only where autocast is off, and asks that of CUDA alone.
    adapter_casts_input = False

    def check_layout(self, config: Mapping[str, Any]) -> None:
        """AutoGPTQ reads its own first format only."""
        super().check_layout(config)
        if not self.zero_points_are_stored_less_one:
            raise ValueError("the checkpoint's format is 'gptq_v2', and AutoGPTQ reads 'gptq'")

    def linear(self, layer: Layer) -> torch.nn.Module:
        """AutoGPTQ's layer, of the class that PEFT finds for the configuration that `finish` leaves."""
        from auto_gptq.utils.import_utils import dynamically_import_QuantLinear

        group = self.options.group_size
        kind = dynamically_import_QuantLinear(
            use_triton=False,
            desc_act=False,
            group_size=group,
            bits=4,
            disable_exllama=True,
            disable_exllamav2=True,
        )
        size = layer.shape
        built = kind(4, group, size.in_features, size.out_features, layer.bias is not None, trainable=True)
        _four_bit.take(built, layer, self.packed_names)
        if self.dtype == "float32":
            # It multiplies by a weight in the scales' dtype, which only autocast brings to that of its input.
            built.scales = built.scales.float()
        built.wf = built.wf.to(layer.device)
        built.requires_grad_(False)
        return built  # type: ignore[no-any-return]

    def expected_bits(self, shape: Shape) -> float:
        """As the checkpoint's, with float32 scales where float32 is computed in."""
        return super().expected_bits(shape) + (16 / self.options.group_size if self.dtype == "float32" else 0)

    def finish(self, model: torch.nn.Module) -> None:
        """As transformers' loader does: PEFT 0.15 looks for a quantization method and its configuration."""
        from transformers import GPTQConfig

        unknown: Any = model
        unknown.quantization_method = "gptq"
        unknown.config.quantization_config = GPTQConfig(
            bits=4, group_size=self.options.group_size, desc_act=False, use_exllama=False
        )
