"""Where a run happened: machine, devices, libraries and the harness itself.

Part of the record (``bench.record.schema``).
"""

from __future__ import annotations

from collections.abc import Mapping

from bench.record.recorded import Bytes, Recorded


class Device(Recorded):
    """One device of the run. On a CPU run: the processor and the machine's memory."""

    device: str
    """As torch names it: cuda:0, cpu."""
    name: str
    total_memory_bytes: Bytes | None
    """Null where the driver tells none."""
    compute_capability: str | None = None
    """CUDA: such as 8.9."""
    driver: str | None = None
    power_limit_watts: float | None = None


class Environment(Recorded):
    """Where the run happened."""

    platform: str
    """Operating system, kernel and C library."""
    python: str
    cpu: str
    """Name of the processor."""
    cpu_cores: int
    """Cores that the process may use."""
    cpu_threads: int
    """Threads torch used, in each process."""
    total_memory_bytes: Bytes
    """Of the machine."""
    cuda: str | None
    """Version that torch was built for; null: no card was used."""
    devices: tuple[Device, ...]
    """In order."""
    versions: Mapping[str, str | None]
    """Every library in play; null: not installed."""
    lock_digest: str | None = None
    """SHA-256 of the lock that the interpreter's packages were installed from, and of how; null: it is the
    current environment's, or was made elsewhere."""
    quantization_libraries_imported: tuple[str, ...]
    """Quantization libraries in the worker's memory when the training began."""
    allocator_settings: str | None
    """PYTORCH_ALLOC_CONF as torch saw it."""
    changed_variables: Mapping[str, str | None]
    """Environment variables that a library changed while it was imported, with the value it wanted
    (null: removed).    The harness puts the allocator's settings back."""
    commit: str | None
    """Commit of the harness, null outside a checkout."""
    dirty: bool | None
    """Whether the checkout had changes that were not committed; null outside a checkout."""
