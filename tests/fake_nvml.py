"""A stand-in for the driver's library: the cards that a test describes, seen through pynvml's own names.

    nvml = FakeNvml([FakeCard("GPU-aaaa"), FakeCard("GPU-bbbb", used_bytes=GIB)])
    monkeypatch.setitem(sys.modules, "pynvml", nvml)

A function that is not described here answers as a driver that does not support it. Names, constants and
numbers of arguments are those of the real module, so that a call which could not work there fails here too.
"""

from __future__ import annotations

import inspect
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pynvml as real

GIB = 2**30


@dataclass
class FakeCard:
    """One card. None: the driver will not tell."""

    uuid: str
    name: str = "NVIDIA GeForce RTX 3090"
    total_bytes: int = 24 * GIB
    used_bytes: int = 0
    reserved_bytes: int = 300 * 2**20
    bus_id: str = "00000000:01:00.0"
    processes: Sequence[tuple[int, int | None]] | None = ()
    """Pid and bytes of compute processes."""
    process_names: dict[int, str] | None = None
    power_watts: float | None = 350.0
    default_power_watts: float | None = 350.0
    reasons: int = 0
    pcie: tuple[int, int] = (4, 16)
    nvlinks: Sequence[str] = ()
    """Bus ids at the other ends; "switch": an NVSwitch."""


class FakeNvml(types.ModuleType):
    """Takes the place of the module ``pynvml``."""

    def __init__(self, cards: Sequence[FakeCard], topology: int = 30, driver: bool = True) -> None:
        super().__init__("pynvml")
        self.cards = list(cards)
        self.topology = topology
        self.driver = driver
        self.NVMLError = real.NVMLError

    def __getattr__(self, name: str) -> Any:
        theirs = getattr(real, name)  # AttributeError: pynvml has no such thing
        if not callable(theirs) or not name.startswith("nvml"):
            return theirs
        answer: Callable[..., Any] | None = getattr(type(self), f"_{name}", None)

        def call(*arguments: Any) -> Any:
            inspect.signature(theirs).bind(*arguments)
            if name == "nvmlInit" and not self.driver:
                raise self.NVMLError(real.NVML_ERROR_LIBRARY_NOT_FOUND)
            if answer is None:
                raise self.NVMLError(real.NVML_ERROR_NOT_SUPPORTED)
            found = answer(self, *arguments)
            if found is None and name not in ("nvmlInit", "nvmlShutdown"):
                raise self.NVMLError(real.NVML_ERROR_NOT_SUPPORTED)
            return found

        return call

    def _nvmlInit(self) -> None:
        pass

    def _nvmlShutdown(self) -> None:
        pass

    def _nvmlSystemGetDriverVersion(self) -> str:
        return "580.142"

    def _nvmlDeviceGetCount(self) -> int:
        return len(self.cards)

    def _nvmlDeviceGetHandleByIndex(self, index: int) -> FakeCard:
        return self.cards[index]

    def _nvmlDeviceGetHandleByUUID(self, uuid: str) -> FakeCard:
        for card in self.cards:
            if card.uuid == uuid:
                return card
        raise self.NVMLError(real.NVML_ERROR_NOT_FOUND)

    def _nvmlDeviceGetUUID(self, card: FakeCard) -> str:
        return card.uuid

    def _nvmlDeviceGetName(self, card: FakeCard) -> str:
        return card.name

    def _nvmlDeviceGetCudaComputeCapability(self, card: FakeCard) -> tuple[int, int]:
        return 8, 6

    def _nvmlDeviceGetMemoryInfo(self, card: FakeCard, version: int | None = None) -> SimpleNamespace:
        free = card.total_bytes - card.used_bytes - card.reserved_bytes
        # The first version counts the driver's own share as used.
        used = card.used_bytes if version == real.nvmlMemory_v2 else card.used_bytes + card.reserved_bytes
        return SimpleNamespace(total=card.total_bytes, free=free, used=used)

    def _nvmlDeviceGetComputeRunningProcesses_v3(self, card: FakeCard) -> list[SimpleNamespace] | None:
        if card.processes is None:
            return None
        return [SimpleNamespace(pid=pid, usedGpuMemory=used) for pid, used in card.processes]

    def _nvmlSystemGetProcessName(self, pid: int) -> str | None:
        return next((c.process_names[pid] for c in self.cards if pid in (c.process_names or {})), None)

    def _nvmlDeviceGetPowerManagementLimit(self, card: FakeCard) -> int | None:
        return None if card.power_watts is None else int(card.power_watts * 1000)

    def _nvmlDeviceGetPowerManagementDefaultLimit(self, card: FakeCard) -> int | None:
        return None if card.default_power_watts is None else int(card.default_power_watts * 1000)

    def _nvmlDeviceGetCurrentClocksThrottleReasons(self, card: FakeCard) -> int:
        return card.reasons

    def _nvmlDeviceGetCurrPcieLinkGeneration(self, card: FakeCard) -> int:
        return card.pcie[0]

    def _nvmlDeviceGetCurrPcieLinkWidth(self, card: FakeCard) -> int:
        return card.pcie[1]

    def _nvmlDeviceGetMaxPcieLinkGeneration(self, card: FakeCard) -> int:
        return 4

    def _nvmlDeviceGetMaxPcieLinkWidth(self, card: FakeCard) -> int:
        return 16

    def _nvmlDeviceGetPciInfo_v3(self, card: FakeCard) -> SimpleNamespace:
        return SimpleNamespace(busId=card.bus_id)

    def _nvmlDeviceGetTopologyCommonAncestor(self, one: FakeCard, other: FakeCard) -> int:
        return self.topology

    def _nvmlDeviceGetNvLinkState(self, card: FakeCard, link: int) -> int:
        return int(link < len(card.nvlinks))

    def _nvmlDeviceGetNvLinkRemotePciInfo(self, card: FakeCard, link: int) -> SimpleNamespace:
        return SimpleNamespace(busId=card.nvlinks[link])

    def _nvmlDeviceGetNvLinkRemoteDeviceType(self, card: FakeCard, link: int) -> int:
        return 2 if card.nvlinks[link] == "switch" else 0
