"""Pieces of a weight, so that quantizing a large layer needs no float32 copy of all of it at once.

Every format here quantizes rows, or short runs of weights within them, independently of each other, so piece
by piece gives the same codes and scales as all at once. What a library needs besides is then a constant, and
not several times the layer: the largest linear layer of Qwen2-72B (29568 x 8192, 484 MB in bfloat16) took
5.8 GB in EETQ's formula and 3.3 GB in bitsandbytes' for a CPU.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

WEIGHTS_AT_ONCE = 2**24
"""64 MiB in float32, and a multiple of every group size."""


def row_blocks(weight: torch.Tensor) -> Iterator[slice]:
    """Slices of the rows of a weight (out x in), at most `WEIGHTS_AT_ONCE` weights each, but one row at
    least."""
    rows, columns = weight.shape
    step = max(1, WEIGHTS_AT_ONCE // columns)
    return (slice(start, start + step) for start in range(0, rows, step))


def flat_blocks(count: int, unit: int) -> Iterator[slice]:
    """Slices of ``count`` weights in a row, each but the last a multiple of ``unit``, at most about
    `WEIGHTS_AT_ONCE`."""
    step = max(1, WEIGHTS_AT_ONCE // unit) * unit
    return (slice(start, min(start + step, count)) for start in range(0, count, step))
