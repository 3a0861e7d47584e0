"""What really reached the model: a digest over the token ids as its embedding received them.

The reader's digest says what was handed out. Between the reader and the model there is code that a library
may have replaced, so the ids are taken once more where they are computed with, together with the labels and
masks that the loop used. Both digests must be the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from bench.run.workload import Batch


class Consumed:
    """A hook on a model's embedding, and the running digest of what came by."""

    def __init__(self, model: nn.Module) -> None:
        embedding = model.get_input_embeddings()  # type: ignore[operator]
        self._handle = embedding.register_forward_pre_hook(self._receive)
        self._received: list[torch.Tensor] = []
        self._digest = hashlib.sha256()

    @property
    def digest(self) -> str:
        """As `WorkloadReader.digest`, over what was counted."""
        return self._digest.hexdigest()

    def begin(self) -> None:
        """A step begins; whatever came by before was none of a step."""
        self._received.clear()

    def count(self, batches: Sequence[Batch]) -> None:
        """Take in what came by since the step began. ``batches``: as the loop had them.

        Waits for the device, like everything that is read after a step.
        """
        if len(self._received) != len(batches):
            self._digest.update(f"{len(self._received)} of {len(batches)} micro-batches".encode())
        for ids, batch in zip(self._received, batches, strict=False):
            replace(batch, input_ids=ids.cpu().contiguous()).add_to(self._digest)
        self._received.clear()

    def remove(self) -> None:
        """Take the hook off."""
        self._handle.remove()

    def _receive(self, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        self._received += [value.detach() for value in inputs[:1] if isinstance(value, torch.Tensor)]
