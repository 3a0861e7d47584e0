"""The machine as the parent sees it, without torch: cards, memory, cores, and the harness's commit."""

from __future__ import annotations

import functools
import os
import platform
import re
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import psutil

from bench.record.environment import Device

REPOSITORY = Path(__file__).resolve().parents[2]
LEADING_NUMBER = re.compile(r"\+?\d+")
"""CUDA reads a number as strtoul does: what follows it is ignored."""


def usable_cores() -> int:
    """Cores this process may use (containers and taskset restrict them)."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


@functools.cache
def cuda_devices() -> tuple[Device, ...]:
    """Every CUDA card that a worker will see, in its order; empty without a driver.

    CUDA_VISIBLE_DEVICES hides and reorders cards. Workers number cards by PCI address, as NVML does.
    """
    import pynvml

    try:
        pynvml.nvmlInit()
        handles = [pynvml.nvmlDeviceGetHandleByIndex(i) for i in range(pynvml.nvmlDeviceGetCount())]
        uuids = [str(pynvml.nvmlDeviceGetUUID(handle)) for handle in handles]
    except pynvml.NVMLError:
        return ()
    names = visible_cards(os.environ.get("CUDA_VISIBLE_DEVICES"), uuids)
    found = []
    for place, name in enumerate(names):
        label = f"cuda:{place}"
        found.append(cuda_device(name, label) or Device(device=label, name=name, total_memory_bytes=None))
    return tuple(found)


def device_memory_bytes(device: str) -> int | None:
    """Memory of the largest card (``cuda``; None: the driver tells none), or of the machine (``cpu``)."""
    if device == "cuda":
        return max((card.total_memory_bytes or 0 for card in cuda_devices()), default=0) or None
    return int(psutil.virtual_memory().total)


def cuda_device(uuid: str, device: str) -> Device | None:
    """The card or MIG slice of this UUID, named ``device`` as torch names it; None where NVML has none."""
    import pynvml

    def told(call: Callable[..., Any], *arguments: Any) -> Any:
        try:
            return call(*arguments)
        except pynvml.NVMLError:
            return None

    told(pynvml.nvmlInit)
    handle = told(pynvml.nvmlDeviceGetHandleByUUID, uuid)
    if handle is None:
        return None
    memory = told(pynvml.nvmlDeviceGetMemoryInfo, handle)
    capability = told(pynvml.nvmlDeviceGetCudaComputeCapability, handle)
    driver = told(pynvml.nvmlSystemGetDriverVersion)
    milliwatts = told(pynvml.nvmlDeviceGetPowerManagementLimit, handle)
    return Device(
        device=device,
        name=str(told(pynvml.nvmlDeviceGetName, handle) or uuid),
        total_memory_bytes=None if memory is None else int(memory.total),
        compute_capability=None if capability is None else ".".join(map(str, capability)),
        driver=None if driver is None else str(driver),
        power_limit_watts=None if milliwatts is None else milliwatts / 1000,
    )


def visible_cards(setting: str | None, uuids: Sequence[str]) -> list[str]:
    """UUIDs of the cards that CUDA_VISIBLE_DEVICES leaves visible, in CUDA's order.

    ``uuids``: of all cards in PCI order. As CUDA reads the variable (CUDA C++ Programming Guide, environment
    variables; torch.cuda counts alike): numbers, or UUIDs that may be cut short; what stands behind the first
    invalid entry is hidden; an entry named twice hides all. Names of MIG slices are left as they are.
    """
    if setting is None:
        return list(uuids)
    entries = [entry.strip() for entry in setting.split(",")]
    kind = next((prefix for prefix in ("GPU-", "MIG-") if entries[0].startswith(prefix)), "")
    found: list[str] = []
    for entry in entries:
        name = entry if kind == "MIG-" and entry.startswith(kind) else _card_of(entry, kind, uuids)
        if name is None:
            break
        if name in found:
            return []
        found.append(name)
    return found


def _card_of(entry: str, kind: str, uuids: Sequence[str]) -> str | None:
    """The UUID of the card that one entry names, None for an invalid or ambiguous one."""
    if kind:
        matching = [uuid for uuid in uuids if entry.startswith(kind) and uuid.startswith(entry)]
        return matching[0] if len(matching) == 1 else None
    number = LEADING_NUMBER.match(entry)
    return uuids[int(number[0])] if number and int(number[0]) < len(uuids) else None


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
