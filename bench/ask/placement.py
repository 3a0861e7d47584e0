"""How many devices a run uses: one, or those that its placement spreads it over."""

from __future__ import annotations

from typing import Literal

from bench.ask.experiment import Experiment
from bench.errors import BadValue

LOGICAL_DEVICES = 2
"""On a CPU, where a placement over several devices is only tried out."""


def count_devices(experiment: Experiment, device: Literal["cpu", "cuda"], cards: int) -> int:
    """Devices of each run of ``experiment``. ``cards``: CUDA devices of this machine.

    Raises BadValue for a number that the placement or the machine does not have.
    """
    asked, placement = experiment.device_count, experiment.placement
    if placement == "auto":
        # Several were asked for by their number; how they are used is then the one way that all backends can.
        placement = "single" if asked in (None, 1) else "split"
    if placement == "single":
        if asked not in (None, 1):
            raise BadValue(
                f"--device-count {asked}: a single placement has one device",
                "spread the run with --placement split, ddp or fsdp",
            )
        return 1
    available = cards if device == "cuda" else None
    count = asked or available or LOGICAL_DEVICES
    if available is not None and count > available:
        raise BadValue(f"--device-count {count}: this machine has {available} CUDA devices")
    if count < 2:
        raise BadValue(f"--placement {placement} needs two devices or more", "use --placement single")
    return count
