"""What the parent hands to a worker: the run, and where on this machine its files are.

Paths are kept apart from the `RunRequest`, which goes into the record and must say the same on any machine.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from pydantic import Field

from bench.ask.experiment import Frozen
from bench.ask.plan import RunRequest
from bench.record.depths import Turns


class Order(Frozen):
    """One worker's job."""

    request: RunRequest
    model_folder: Path | None
    """Folder of the real weights, None for synthetic ones."""
    packed_folder: Path | None = None
    """Where a packed checkpoint is, or is to be made; None for backends that quantize on load."""
    packing_request: RunRequest | None = None
    """The run that makes it, where that is another backend's; None: this run's own."""
    reference_file: Path | None = None
    """Where the unquantized reference's gradients are, or are to be made; None: no comparison with it."""
    reference_request: RunRequest | None = None
    """The run that makes them."""
    reference_note: str | None = None
    """Why there is none."""
    replay: bool = True
    """Whether a failure is replayed after the training; it costs a second load of the model."""
    note: str | None = None
    """A departure from the ordinary run that the harness chose (how a checkpoint was packed, how freed memory
    is returned), told in the record."""
    variables: Mapping[str, str] = Field(default_factory=dict)
    """Environment variables of the worker, besides those of its parent."""
    turns: Turns | None = None
    """The depths whose steps are timed (``bench.run.depths``); None: an ordinary run."""
