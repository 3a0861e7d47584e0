"""Memory: what the devices hold at the end of each phase, and the exact bytes by kind.

CUDA has the caching allocator's figures and NVML's; a CPU has the process's resident memory, whose peak
Linux lets a process reset for itself, so that each phase has a peak of its own.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil
import torch
from torch import nn

from bench.load.contract import Backend
from bench.load.heap import trim_heap
from bench.load.layout import Layout, Place
from bench.load.model import BuiltModel
from bench.load.proof import StorageCount, held
from bench.probe.cards import memory_of
from bench.record.memory import BytesByKind, MemoryReading, Phase

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class MemoryProbe:
    """Reads memory at phase ends, and remembers the highest resident memory over all resets."""

    def __init__(self, devices: Sequence[torch.device]) -> None:
        self.devices = tuple(devices)
        self._highest_resident: int | None = None

    def start_phase(self) -> None:
        """Begin a phase: peaks count from here on."""
        self.process_peak_bytes()
        _reset_resident_peak()
        for device in self.devices:
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats(device)

    def read(self, phase: Phase) -> list[MemoryReading]:
        """One reading for each device at the end of ``phase``."""
        return [
            self._read_cuda(phase, device) if device.type == "cuda" else self._read_cpu(phase, device)
            for device in self.devices
        ]

    def process_peak_bytes(self) -> int | None:
        """The process's highest resident memory since it began, over all resets; None where unknown."""
        peak = _status_bytes("VmHWM")
        if peak is not None:
            self._highest_resident = max(peak, self._highest_resident or 0)
        return self._highest_resident

    def _read_cpu(self, phase: Phase, device: torch.device) -> MemoryReading:
        return MemoryReading(
            phase=phase,
            device=str(device),
            resident_bytes=resident_bytes(),
            peak_resident_bytes=_status_bytes("VmHWM"),
        )

    def _read_cuda(self, phase: Phase, device: torch.device) -> MemoryReading:
        return MemoryReading(
            phase=phase,
            device=str(device),
            allocated_bytes=torch.cuda.memory_allocated(device),
            peak_allocated_bytes=torch.cuda.max_memory_allocated(device),
            reserved_bytes=torch.cuda.memory_reserved(device),
            peak_reserved_bytes=torch.cuda.max_memory_reserved(device),
            nvml_used_bytes=_nvml_used_bytes(device),
            resident_bytes=resident_bytes(),
        )


def release_unused(devices: Sequence[torch.device]) -> None:
    """Give memory that nothing uses back to the system: cycles, CUDA's cached blocks, glibc's free heap.

    Called once after the load. What a loader's temporaries left in an allocator would otherwise count in
    every later phase, and rank backends by their loaders' habits.
    """
    gc.collect()
    if any(device.type == "cuda" for device in devices):
        torch.cuda.empty_cache()
    trim_heap()


def resident_bytes() -> int:
    """Resident memory of this process now."""
    return int(psutil.Process().memory_info().rss)


def peak_reserved_bytes(devices: Sequence[torch.device]) -> int | None:
    """Highest reserved memory over the CUDA devices since the last reset; None without CUDA."""
    peaks = [torch.cuda.max_memory_reserved(device) for device in devices if device.type == "cuda"]
    return max(peaks, default=None)


def bytes_by_kind(
    built: BuiltModel,
    backend: Backend,
    lora: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    gradient_bytes: Mapping[str, int],
) -> list[BytesByKind]:
    """Exact bytes of every tensor, by place and kind. Biases of quantized layers count as unquantized.

    ``gradient_bytes``: by place, counted by `count_gradients` while the gradients existed.
    """
    return [
        _bytes_at(place, built, backend, lora, optimizer, gradient_bytes.get(place.label))
        for place in built.layout.places
    ]


def count_gradients(lora: Mapping[str, nn.Parameter], layout: Layout) -> dict[str, int]:
    """Bytes of the gradients that exist now, by the label of their place."""
    counted: dict[str, int] = {}
    for name, parameter in lora.items():
        if parameter.grad is not None:
            label = layout.place_of(name).label
            counted[label] = counted.get(label, 0) + parameter.grad.untyped_storage().nbytes()
    return counted


def _bytes_at(
    place: Place,
    built: BuiltModel,
    backend: Backend,
    lora: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    gradients: int | None,
) -> BytesByKind:
    def here(name: str) -> bool:
        return built.layout.place_of(name) == place

    count = StorageCount()
    for name, layer in built.quantized():
        # PEFT put its own module in the layer's place and keeps the layer inside.
        if here(name):
            count.add(getattr(layer, "base_layer", layer), backend.codes)
    own = {name: parameter for name, parameter in lora.items() if here(name)}
    adapters = {id(parameter) for parameter in lora.values()}
    rest = _nbytes(
        part
        for name, tensor in [*built.model.named_parameters(), *built.model.named_buffers()]
        if here(name)
        and id(tensor) not in adapters
        and (str(tensor.device), (part := held(tensor)).untyped_storage().data_ptr()) not in count.seen
    )
    state = (
        value
        for parameter in own.values()
        for value in optimizer.state.get(parameter, {}).values()
        if isinstance(value, torch.Tensor)
    )
    return BytesByKind(
        device=place.label,
        quantized_weights=count.codes,
        quantization_metadata=count.metadata,
        unquantized_weights=rest + count.biases,
        lora=_nbytes(own.values()),
        gradients=gradients,
        optimizer_state=_nbytes(state),
    )


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    storages = {
        (str(t.device), t.untyped_storage().data_ptr()): t.untyped_storage().nbytes() for t in tensors
    }
    return sum(storages.values())


def _status_bytes(field: str) -> int | None:
    """A field of /proc/self/status in bytes; None where there is no such file."""
    try:
        for line in STATUS.read_text().splitlines():
            if line.startswith(f"{field}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        return None
    return None


def _reset_resident_peak() -> None:
    """Writing 5 makes VmHWM start again from the present (man 5 proc). Containers may forbid it; then
    every peak is since the process began, which is still a true upper bound."""
    with contextlib.suppress(OSError):
        CLEAR_REFS.write_text("5")


def _nvml_used_bytes(device: torch.device) -> int | None:
    import pynvml

    try:
        pynvml.nvmlInit()
        handle = pynvml.nvmlDeviceGetHandleByUUID(f"GPU-{torch.cuda.get_device_properties(device).uuid}")
    except pynvml.NVMLError:
        return None
    found = memory_of(handle, pynvml)
    return None if found is None else int(found.used)
