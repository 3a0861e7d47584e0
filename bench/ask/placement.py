"""How a run uses devices, and how many: one, or those that its placement spreads it over."""

from __future__ import annotations

from typing import Literal

from bench.ask.experiment import Experiment, Placement
from bench.errors import BadValue

LOGICAL_DEVICES = 2
"""On a CPU, where a placement over several devices is only tried out."""


def place(experiment: Experiment, device: Literal["cpu", "cuda"], cards: int) -> tuple[Placement, int]:
    """The placement of each run of ``experiment``, and its devices. ``cards``: CUDA devices of this machine.

    ``auto`` is one device here; ``bench.run.placing`` spreads a model that does not fit on it.

    Raises BadValue for a number that the placement or the machine does not have.
    """
    asked, several = experiment.device_count, experiment.device_count not in (None, 1)
    # Several that are asked for by their number alone are used in the one way that all backends can be.
    automatic: Placement = "split" if several else "single"
    placement = automatic if experiment.placement == "auto" else experiment.placement
    if placement == "single":
        if several:
            raise BadValue(
                f"--device-count {asked}: a single placement has one device",
                "spread the run with --placement split, ddp or fsdp",
            )
        return placement, 1
    available = cards if device == "cuda" else None
    count = asked or available or LOGICAL_DEVICES
    if available is not None and count > available:
        raise BadValue(f"--device-count {count}: this machine has {available} CUDA devices")
    if count < 2:
        raise BadValue(f"--placement {placement} needs two devices or more", "use --placement single")
    return placement, count
