"""How often CUDA's caching allocator was out of memory while the measured steps ran.

A retry means that it gave all of its unused blocks back to the driver and asked again: the step waits for
that, and the card is as good as full (torch.cuda.memory_stats: num_alloc_retries, num_ooms).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch


class AllocatorTrouble:
    """Counts from the end of the warm-up on."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self._devices = [device for device in devices if device.type == "cuda"]
        self._before = self._counts()

    def after_step(self, *, warmup: bool) -> dict[str, int] | None:
        """The counts since the last warm-up step, over all devices; None without CUDA."""
        if not self._devices:
            return None
        counts = self._counts()
        if warmup:
            self._before = counts
        return {name: counts[name] - self._before[name] for name in counts}

    def _counts(self) -> dict[str, int]:
        stats = [torch.cuda.memory_stats(device) for device in self._devices]
        names = {"allocator_retries": "num_alloc_retries", "allocator_ooms": "num_ooms"}
        return {ours: sum(int(one.get(theirs, 0)) for one in stats) for ours, theirs in names.items()}
