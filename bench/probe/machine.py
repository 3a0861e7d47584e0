"""The machine as the parent sees it, without torch: cards, memory, cores, and the harness's commit."""

from __future__ import annotations

import functools
import os
import platform
import subprocess
from pathlib import Path

from bench.record.schema import Device

REPOSITORY = Path(__file__).resolve().parents[2]


def usable_cores() -> int:
    """Cores this process may use (containers and taskset restrict them)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def cuda_devices() -> tuple[Device, ...]:
    """Every CUDA card that NVML knows, in its (PCI) order; empty without a driver."""
    import pynvml

    try:
        pynvml.nvmlInit()
        return tuple(_device(index) for index in range(pynvml.nvmlDeviceGetCount()))
    except pynvml.NVMLError:
        return ()


def processor_name() -> str:
    """The processor's model name."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: the portable name below is all there is
    return platform.processor() or platform.machine()


def commit_and_dirty() -> tuple[str | None, bool | None]:
    """The harness's commit and whether its tracked files were changed; None outside a checkout."""
    if not (REPOSITORY / ".git").exists():
        return None, None
    commit = _git("rev-parse", "HEAD")
    changes = _git(
        "status", "--porcelain", "--untracked-files=no", "--", "bench", "backends", "pyproject.toml"
    )
    return commit, None if changes is None else bool(changes)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", "-C", str(REPOSITORY), *arguments], capture_output=True, text=True, timeout=10, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip()


def _device(index: int) -> Device:
    import pynvml

    handle = pynvml.nvmlDeviceGetHandleByIndex(index)
    major, minor = pynvml.nvmlDeviceGetCudaComputeCapability(handle)
    try:
        power = pynvml.nvmlDeviceGetPowerManagementLimit(handle) / 1000
    except pynvml.NVMLError:
        power = None
    return Device(
        device=f"cuda:{index}",
        name=str(pynvml.nvmlDeviceGetName(handle)),
        total_memory_bytes=int(pynvml.nvmlDeviceGetMemoryInfo(handle).total),
        compute_capability=f"{major}.{minor}",
        driver=str(pynvml.nvmlSystemGetDriverVersion()),
        power_limit_watts=power,
    )
