"""Where the memory of a run went: readings of each phase, and exact tensor bytes by what they hold.

Part of the record (``bench.record.schema``).
"""

from __future__ import annotations

from typing import Literal

from bench.record.recorded import Bytes, Recorded

Phase = Literal["loaded", "attached", "forward", "backward", "optimizer_step"]


class MemoryReading(Recorded):
    """Memory of one device at the end of one phase. CUDA has allocator figures, CPU has resident ones."""

    phase: Phase
    """At whose end it was read."""
    device: str
    rank: int | None = None
    """Of the process, where a run has several."""
    allocated_bytes: Bytes | None = None
    """CUDA: tensors in torch's allocator."""
    peak_allocated_bytes: Bytes | None = None
    """Highest within the phase."""
    reserved_bytes: Bytes | None = None
    """CUDA: what the allocator holds of the device."""
    peak_reserved_bytes: Bytes | None = None
    """Highest within the phase."""
    nvml_used_bytes: Bytes | None = None
    """CUDA: used on the device by all processes, as the driver says, without what the driver holds for itself
    (records of before 28 November 2026: with it)."""
    resident_bytes: Bytes | None = None
    """Of the process, in the machine's memory."""
    peak_resident_bytes: Bytes | None = None
    """Peak within the phase where the system can reset it, else up to here."""


class BytesByKind(Recorded):
    """Exact tensor bytes of one device, counted on the tensors themselves."""

    device: str
    rank: int | None = None
    """Of the process, where a run has several."""
    quantized_weights: Bytes
    """Packed codes."""
    quantization_metadata: Bytes
    """Scales, zeros, tables."""
    unquantized_weights: Bytes
    """Embedding, head, norms, biases."""
    lora: Bytes
    """Weights of the adapters."""
    gradients: Bytes | None = None
    """Of the adapters."""
    optimizer_state: Bytes | None = None
    """The optimizer's moments."""


class Memory(Recorded):
    """Where the memory went."""

    readings: tuple[MemoryReading, ...] = ()
    """By phase and device."""
    bytes_by_kind: tuple[BytesByKind, ...] = ()
    """By device."""
    phase_step: int | None = None
    """The step whose forward, backward and optimizer phases were read (a warm-up step)."""
    process_peak_resident_bytes: Bytes | None = None
    """Highest resident memory of the worker over its whole life; of several, of the one with the most."""
    allocator_retries: int | None = None
    """CUDA: how often the allocator gave its unused blocks back and asked again, during the measured steps,
    on all devices. Null on a CPU, and in records made before it was counted."""
    allocator_ooms: int | None = None
    """CUDA: how often it was out of memory in spite of that."""
