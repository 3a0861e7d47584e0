"""How a run used its devices: what lay where, by device and by process."""

from __future__ import annotations

from bench.ask.experiment import Placement
from bench.record.recorded import Recorded, Seconds


class PlaceFacts(Recorded):
    """One device of one process."""

    device: str
    """cuda:3; cpu:1 is the second logical device of a CPU run, which is one process and one memory."""
    rank: int | None = None
    """Of the process, where there are several."""
    decoder_layers: int
    """Decoder layers on it, whole or as its share of each."""
    step_seconds: tuple[Seconds, ...] = ()
    """Of this process, where there are several; the run's own steps are as long as the slowest's."""
    workload_digest: str | None = None
    """SHA-256 over the batches that this process consumed, where there are several; the run's own is over
    the whole stream, of which each takes its turn."""


class PlacementFacts(Recorded):
    """The devices of a run, in order."""

    kind: Placement
    places: tuple[PlaceFacts, ...]
    """One for each device, or process, in order."""
    launcher: str | None = None
    """What started the processes, where there are several."""
    communication: str | None = None
    """The backend between processes: nccl or gloo."""
    wrapper: str | None = None
    """The class that ties the processes together."""
