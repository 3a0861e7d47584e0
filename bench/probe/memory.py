"""Memory: what the devices hold at the end of each phase, and the exact bytes by kind.

CUDA has the caching allocator's figures and NVML's; a CPU has the process's resident memory, whose peak
Linux lets a process reset for itself, so that each phase has a peak of its own.
"""

from __future__ import annotations

import contextlib
import ctypes
import gc
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import psutil
import torch
from torch import nn

from bench.load.contract import Backend
from bench.load.model import BuiltModel
from bench.load.proof import StorageCount
from bench.record.schema import BytesByKind, MemoryReading, Phase

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
    every later phase: on a CPU that was 1.1 GB for HQQ on
    the proxy, and ranked backends by their loaders' habits.
    """
    gc.collect()
    if any(device.type == "cuda" for device in devices):
        torch.cuda.empty_cache()
    with contextlib.suppress(OSError, AttributeError):  # not glibc: nothing to trim
        ctypes.CDLL(None).malloc_trim(0)


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
    """Exact bytes of every tensor, by device and kind. Biases of quantized layers count as unquantized.

    ``gradient_bytes``: by device, counted by `count_gradients` while the gradients existed.
    """
    devices = {parameter.device for parameter in lora.values()}
    return [
        _bytes_on(device, built, backend, lora, optimizer, gradient_bytes.get(str(device)))
        for device in sorted(devices, key=str)
    ]


def count_gradients(parameters: Iterable[nn.Parameter]) -> dict[str, int]:
    """Bytes of the gradients that exist now, by device."""
    counted: dict[str, int] = {}
    for parameter in parameters:
        if parameter.grad is not None:
            device = str(parameter.grad.device)
            counted[device] = counted.get(device, 0) + parameter.grad.untyped_storage().nbytes()
    return counted


def _bytes_on(
    device: torch.device,
    built: BuiltModel,
    backend: Backend,
    lora: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    gradients: int | None,
) -> BytesByKind:
    count = StorageCount()
    for _, layer in built.quantized():
        # PEFT put its own module in the layer's place and keeps the layer inside.
        base = getattr(layer, "base_layer", layer)
        if any(tensor.device == device for tensor in [*base.parameters(), *base.buffers()]):
            count.add(base, backend.codes)
    adapters = {id(parameter) for parameter in lora.values()}
    rest = _nbytes(
        tensor
        for tensor in [*built.model.parameters(), *built.model.buffers()]
        if tensor.device == device
        and id(tensor) not in adapters
        and (str(tensor.device), tensor.untyped_storage().data_ptr()) not in count.seen
    )
    state = (
        value
        for per_parameter in optimizer.state.values()
        for value in per_parameter.values()
        if isinstance(value, torch.Tensor) and value.device == device
    )
    return BytesByKind(
        device=str(device),
        quantized_weights=count.codes,
        quantization_metadata=count.metadata,
        unquantized_weights=rest + count.biases,
        lora=_nbytes(parameter for parameter in lora.values() if parameter.device == device),
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
        return int(pynvml.nvmlDeviceGetMemoryInfo(handle).used)
    except pynvml.NVMLError:
        return None
