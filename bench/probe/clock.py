"""Time, with the device's queue empty at both ends, and Python's garbage collector out of the way."""

from __future__ import annotations

import gc
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

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


@contextmanager
def old_objects_left_alone() -> Iterator[None]:
    """Within it, the garbage collector looks only at objects that were made within it.

    The libraries leave a million objects. Going through them all takes a fraction of a second, and falls to
    whichever step happens to make the number full.
    """
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()
