"""The environment of one run, as seen from inside its worker process."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import psutil
import torch

from bench.ask.versions import STAMP
from bench.probe.machine import commit_and_dirty, cuda_device, processor_name, usable_cores
from bench.record.environment import Device, Environment

ALLOCATOR_VARIABLE = "PYTORCH_ALLOC_CONF"


def describe_environment(
    devices: Sequence[torch.device],
    versions: Mapping[str, str | None],
    quantization_libraries: Sequence[str],
    changed_variables: Mapping[str, str | None],
) -> Environment:
    """Everything about the machine and the process that a figure may depend on."""
    commit, dirty = commit_and_dirty()
    total = int(psutil.virtual_memory().total)
    cards = [card_of(device) for device in devices if device.type == "cuda"]
    processor = Device(device="cpu", name=processor_name(), total_memory_bytes=total)
    return Environment(
        platform=platform.platform(),
        python=platform.python_version(),
        cpu=processor_name(),
        cpu_cores=usable_cores(),
        cpu_threads=torch.get_num_threads(),
        total_memory_bytes=total,
        cuda=torch.version.cuda if cards else None,
        devices=tuple(cards) or (processor,),
        versions=dict(versions),
        lock_digest=lock_digest(Path(sys.prefix)),
        quantization_libraries_imported=tuple(n for n in sorted(quantization_libraries) if n in sys.modules),
        allocator_settings=os.environ.get(ALLOCATOR_VARIABLE),
        changed_variables=dict(changed_variables),
        commit=commit,
        dirty=dirty,
    )


def lock_digest(prefix: Path) -> str | None:
    """What ``make env`` noted in the environment that it built; None: it did not build this one."""
    try:
        return (prefix / STAMP).read_text(encoding="utf-8").strip() or None
    except (OSError, UnicodeDecodeError):
        return None


def card_of(device: torch.device) -> Device:
    """The card behind torch's device: found in NVML by its UUID, because CUDA_VISIBLE_DEVICES may hide and
    reorder cards; as torch describes it where NVML does not know it."""
    properties = torch.cuda.get_device_properties(device)
    for prefix in ("GPU-", "MIG-"):
        card = cuda_device(f"{prefix}{properties.uuid}", str(device))
        if card is not None:
            return card
    return Device(
        device=str(device),
        name=properties.name,
        total_memory_bytes=properties.total_memory,
        compute_capability=f"{properties.major}.{properties.minor}",
    )
