"""Which attention kernel computes, for the whole process.

Globally and not by a context manager, since checkpointing recomputes the forward outside of any. cuDNN's is
always off: its backward gave NaN on H100 in torch 2.11 to 2.13 (pytorch#196678).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bench.ask.experiment import Attention

ALTERNATIVES: dict[Attention, Attention] = {
    "sdpa": "eager",
    "sdpa_flash": "eager",
    "sdpa_efficient": "eager",
    "sdpa_math": "eager",
    "eager": "sdpa",
}
"""What is tried instead of each, where a run fails: fused against unfused."""


NO_KERNEL = ("Invalid backend", "No viable backend", "No available kernel")
"""How torch says that, of the kernels it may use, none computes what it was given."""


def why_no_kernel(attention: Attention, error: Exception) -> str | None:
    """What an error of the forward means for the attention that was asked for; None: something else.

    The memory-efficient kernel, for one, has no grouped-query attention (seen on an H100 with torch 2.11)."""
    if not attention.startswith("sdpa_") or not str(error).startswith(NO_KERNEL):
        return None
    return f"torch's attention kernel '{attention}' does not take this model here: try sdpa or eager"


def implementation(attention: Attention) -> str:
    """transformers' name for it."""
    return "eager" if attention == "eager" else "sdpa"


def choose_kernel(attention: Attention) -> None:
    """Allow torch's scaled dot product only the named kernel, or all but cuDNN's."""
    only = attention.removeprefix("sdpa_") if attention.startswith("sdpa_") else None
    torch.backends.cuda.enable_cudnn_sdp(False)
    # These switches hold for the CPU's kernels too.
    torch.backends.cuda.enable_flash_sdp(only in (None, "flash"))
    torch.backends.cuda.enable_mem_efficient_sdp(only in (None, "efficient"))
    torch.backends.cuda.enable_math_sdp(only in (None, "math"))


def switch(model: nn.Module, attention: Attention) -> None:
    """Make a built model attend another way."""
    # What the setter of transformers 5 does; 4.51 has no setter and reads the same attribute in each forward.
    setter: Any = getattr(model, "set_attn_implementation", None)
    if setter is not None:
        setter(implementation(attention))
    else:
        model.config._attn_implementation = implementation(attention)  # type: ignore[union-attr]
    choose_kernel(attention)
