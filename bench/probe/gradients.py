"""Gradients of the trainable tensors: norms before clipping, and counts of what is not finite or zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.utils import get_total_norm


def gradient_norm(parameters: Iterable[nn.Parameter]) -> torch.Tensor:
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


@dataclass(frozen=True)
class TensorStatistics:
    """Of each trainable tensor's gradient, in the tensors' order; None: it has no gradient."""

    norms: tuple[float | None, ...]
    non_finite: tuple[int | None, ...]
    zeros: tuple[int | None, ...]


def tensor_statistics(tensors: Sequence[nn.Parameter]) -> TensorStatistics:
    """Norms in float32, and counts. Waits for the device once, or twice where something is not finite."""
    gradients = {i: p.grad.detach() for i, p in enumerate(tensors) if p.grad is not None}
    if not gradients:
        nothing = (None,) * len(tensors)
        return TensorStatistics(nothing, nothing, nothing)
    norms = torch._foreach_norm([gradient.float() for gradient in gradients.values()])
    zeros = [gradient.numel() - torch.count_nonzero(gradient) for gradient in gradients.values()]
    device = norms[0].device
    both = torch.stack([value.to(device, torch.float64) for value in (*norms, *zeros)]).tolist()
    norm_of = dict(zip(gradients, both, strict=False))
    zeros_of = dict(zip(gradients, map(int, both[len(gradients) :]), strict=True))
    # A norm is finite exactly when all values are, short of overflow of the sum, so counting waits for that.
    bad = dict.fromkeys(gradients, 0) | {
        i: int((~torch.isfinite(gradients[i])).sum())
        for i, norm in norm_of.items()
        if not math.isfinite(norm)
    }
    places = range(len(tensors))
    return TensorStatistics(
        tuple(norm_of.get(i) for i in places),
        tuple(bad.get(i) for i in places),
        tuple(zeros_of.get(i) for i in places),
    )


def non_finite_tensors(tensors: Mapping[str, torch.Tensor]) -> list[str]:
    """Names of the tensors that hold a value which is not finite, in order."""
    names = list(tensors)
    if not names:
        return []
    device = tensors[names[0]].device
    # On a CPU 40 times as fast as the largest absolute value. A sum of squares can overflow by itself, so
    # where it is not finite the values are looked at.
    norms = torch._foreach_norm([tensor.detach().float() for tensor in tensors.values()])
    finite = torch.isfinite(torch.stack([norm.to(device) for norm in norms])).tolist()
    suspects = [name for name, good in zip(names, finite, strict=True) if not good]
    return [name for name in suspects if not all_finite([tensors[name]])]
