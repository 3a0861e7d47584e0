"""Time, with the device's queue empty at both ends."""

from __future__ import annotations

import time
from collections.abc import Sequence

import torch


def now(devices: Sequence[torch.device]) -> float:
    """Seconds of a monotonic clock, read after every CUDA device has finished its queued work.

    One synchronisation at each end of a step: a 72B step lasts seconds, so this is noise, and without it
    a step's time would be the time to queue it.
    """
    for device in devices:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
    return time.perf_counter()
