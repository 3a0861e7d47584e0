"""Gradients: the global norm before clipping, and what is not finite."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch.nn.utils import get_total_norm


def gradient_norm(parameters: Iterable[torch.nn.Parameter]) -> torch.Tensor:
    """Global L2 norm of the gradients as a float32 scalar tensor; non-finite values come through as such.

    Raises ValueError where no parameter has a gradient: a norm of nothing is not zero.
    """
    gradients = [parameter.grad.detach().float() for parameter in parameters if parameter.grad is not None]
    if not gradients:
        raise ValueError("no trainable tensor has a gradient")
    return get_total_norm(gradients)


def all_finite(parameters: Iterable[torch.Tensor]) -> bool:
    """Whether every value of every tensor is finite. Detached: a probe must not touch autograd."""
    return all(bool(torch.isfinite(parameter.detach()).all()) for parameter in parameters)
