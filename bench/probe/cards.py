"""The cards as NVML describes them, without torch: memory, foreign processes, power, clocks, PCIe, links.

    with Nvml() as nvml:
        for uuid in nvml.uuids: nvml.findings(uuid, "cuda:0")
        nvml.link("GPU-...", "GPU-...")

Each value is asked for on its own, and what the driver would not tell is None. Cards are named by their UUID,
because CUDA's order is not NVML's (huggingface/optimum-benchmark#136).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, TypeVar

from bench.record.preflight import CardFindings, CardState, ForeignProcess

T = TypeVar("T")

THROTTLE_REASONS = {
    0x001: "idle",
    0x002: "clocks set by an application",
    0x004: "power limit",
    0x008: "hardware slowdown",
    0x010: "held back by another card (sync boost)",
    0x020: "temperature (software)",
    0x040: "temperature (hardware)",
    0x080: "power brake (hardware)",
    0x100: "clocks set for the display",
}
"""Bits of nvmlDeviceGetCurrentClocksEventReasons (nvml.h)."""
TOPOLOGY = {
    0: "PCIe, on one board",
    10: "PCIe, through one switch",
    20: "PCIe, through several switches",
    30: "PCIe, through one host bridge",
    40: "PCIe, across host bridges of one NUMA node",
    50: "PCIe, across NUMA nodes",
}
"""nvmlGpuTopologyLevel_t, which nvidia-smi calls PIX, PXB, PHB, NODE and SYS from the second on."""
NVLINK_SWITCH = 2
"""nvmlIntNvLinkDeviceType_t: what is at the other end of a link is an NVSwitch."""


@dataclass(frozen=True)
class Link:
    """The way between two cards."""

    nvlinks: int | None
    words: str | None


class Nvml:
    """A session with NVML. Without a driver there are no cards, and nothing raises."""

    def __init__(self) -> None:
        self._handles: dict[str, Any] = {}
        self._index: dict[str, int] = {}

    def __enter__(self) -> Nvml:
        import pynvml

        self._nvml = pynvml
        with suppress(pynvml.NVMLError):
            pynvml.nvmlInit()
            for index in range(pynvml.nvmlDeviceGetCount()):
                handle = _told(pynvml.nvmlDeviceGetHandleByIndex, index)
                uuid = None if handle is None else _told(pynvml.nvmlDeviceGetUUID, handle)
                if uuid is not None:
                    self._handles[str(uuid)], self._index[str(uuid)] = handle, index
        return self

    def __exit__(self, *exception: object) -> None:
        with suppress(self._nvml.NVMLError):
            self._nvml.nvmlShutdown()

    @property
    def uuids(self) -> tuple[str, ...]:
        """Of every card that NVML knows, in its (PCI) order."""
        return tuple(self._handles)

    @property
    def driver(self) -> str | None:
        """The driver's version."""
        found = _told(self._nvml.nvmlSystemGetDriverVersion)
        return None if found is None else str(found)

    def findings(self, uuid: str, device: str) -> CardFindings | None:
        """Everything about a card as it is now; None where NVML does not know it, as for a MIG slice.

        ``device``: what torch calls it.
        """
        if uuid not in self._handles:
            return None
        nvml, handle = self._nvml, self._handles[uuid]
        constraints = _told(nvml.nvmlDeviceGetPowerManagementLimitConstraints, handle)
        ecc = _told(nvml.nvmlDeviceGetEccMode, handle)
        # 1: uncorrected, 0: since the driver was loaded (nvmlMemoryErrorType_t, nvmlEccCounterType_t)
        errors = _told(nvml.nvmlDeviceGetTotalEccErrors, handle, 1, 0)
        pci = _told(nvml.nvmlDeviceGetPciInfo_v3, handle)
        return CardFindings(
            device=device,
            name=str(_told(nvml.nvmlDeviceGetName, handle) or "unnamed"),
            uuid=uuid,
            nvml_index=self._index[uuid],
            pci_bus_id=None if pci is None else str(pci.busId),
            **self._memory(handle),
            processes=self._processes(handle),
            power_limit_watts=_watts(_told(nvml.nvmlDeviceGetPowerManagementLimit, handle)),
            default_power_limit_watts=_watts(_told(nvml.nvmlDeviceGetPowerManagementDefaultLimit, handle)),
            max_power_limit_watts=None if constraints is None else _watts(constraints[1]),
            pcie_max_generation=_told(nvml.nvmlDeviceGetMaxPcieLinkGeneration, handle),
            pcie_max_width=_told(nvml.nvmlDeviceGetMaxPcieLinkWidth, handle),
            ecc=None if ecc is None else bool(ecc[0]),
            uncorrected_ecc_errors=errors if ecc and ecc[0] else None,
            idle=self.state(uuid) or CardState(),
        )

    def compute_processes(self, uuid: str) -> int | None:
        """How many processes compute on a card now; None where the driver does not tell."""
        call = self._nvml.nvmlDeviceGetComputeRunningProcesses_v3
        found = _told(call, self._handles[uuid]) if uuid in self._handles else None
        return None if found is None else len(found)

    def state(self, uuid: str) -> CardState | None:
        """Temperature, power, clocks and PCIe link of a card now; None where NVML does not know it."""
        if uuid not in self._handles:
            return None
        nvml, handle = self._nvml, self._handles[uuid]
        reasons = _told(nvml.nvmlDeviceGetCurrentClocksEventReasons, handle)
        if reasons is None:  # drivers before 535 know it by its old name
            reasons = _told(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
        return CardState(
            temperature_celsius=_told(nvml.nvmlDeviceGetTemperature, handle, 0),  # 0: the chip
            power_watts=_watts(_told(nvml.nvmlDeviceGetPowerUsage, handle)),
            sm_clock_mhz=_told(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
            memory_clock_mhz=_told(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
            pcie_generation=_told(nvml.nvmlDeviceGetCurrPcieLinkGeneration, handle),
            pcie_width=_told(nvml.nvmlDeviceGetCurrPcieLinkWidth, handle),
            throttle_reasons=None if reasons is None else reasons_in_words(int(reasons)),
        )

    def link(self, one: str, other: str) -> Link:
        """The way between two cards, by their UUIDs."""
        if one not in self._handles or other not in self._handles:
            return Link(None, None)
        nvml, ends = self._nvml, (self._handles[one], self._handles[other])
        nvlinks, switched = self._nvlinks(*ends)
        if nvlinks:
            return Link(nvlinks, f"NVLink, {nvlinks} {'connection' if nvlinks == 1 else 'connections'}")
        if switched:
            return Link(switched, f"NVLink through NVSwitch, {switched} connections")
        level = _told(nvml.nvmlDeviceGetTopologyCommonAncestor, *ends)
        return Link(nvlinks, None if level is None else TOPOLOGY.get(int(level), f"topology level {level}"))

    def _memory(self, handle: Any) -> dict[str, int | None]:
        found = memory_of(handle, self._nvml)
        return {
            f"{name}_bytes": None if found is None else int(getattr(found, name))
            for name in ("total", "free", "used")
        }

    def _processes(self, handle: Any) -> tuple[ForeignProcess, ...] | None:
        nvml = self._nvml
        calls = {
            "compute": nvml.nvmlDeviceGetComputeRunningProcesses_v3,
            "graphics": nvml.nvmlDeviceGetGraphicsRunningProcesses_v3,
        }
        answers = {kind: _told(call, handle) for kind, call in calls.items()}
        if all(answer is None for answer in answers.values()):
            return None
        found: dict[int, ForeignProcess] = {}
        for kind, answer in answers.items():
            for process in answer or ():
                pid = int(process.pid)
                name = _told(nvml.nvmlSystemGetProcessName, pid)
                if pid not in found:
                    found[pid] = ForeignProcess.model_validate({
                        "pid": pid,
                        "kind": kind,
                        # In a container the driver tells 0 bytes for processes outside (open-gpu#614).
                        "used_bytes": process.usedGpuMemory or None,
                        "name": None if not name else str(name),
                    })  # fmt: skip
        return tuple(found.values())

    def _nvlinks(self, one: Any, other: Any) -> tuple[int | None, int]:
        """Links from one card to the other, None where their ends cannot be told; and those over a switch
        that both have."""
        nvml = self._nvml
        pci = _told(nvml.nvmlDeviceGetPciInfo_v3, other)
        between, told = 0, True
        for link in self._active(one):
            remote = _told(nvml.nvmlDeviceGetNvLinkRemotePciInfo, one, link)
            if remote is None or pci is None:
                told = False
            elif str(remote.busId).lower() == str(pci.busId).lower():
                between += 1
        switched = min(self._switched(one), self._switched(other))
        return (between if told else None), switched

    def _switched(self, handle: Any) -> int:
        remote = self._nvml.nvmlDeviceGetNvLinkRemoteDeviceType
        return sum(_told(remote, handle, link) == NVLINK_SWITCH for link in self._active(handle))

    def _active(self, handle: Any) -> Iterator[int]:
        for link in range(self._nvml.NVML_NVLINK_MAX_LINKS):
            if _told(self._nvml.nvmlDeviceGetNvLinkState, handle, link):
                yield link


def memory_of(handle: Any, nvml: Any) -> Any | None:
    """``total``, ``free`` and ``used`` bytes of a card by its handle; None where NVML tells none.

    The second version of the call keeps apart what the driver holds for itself (0.47 GiB of an H100 with
    driver 580), which CUDA does not see either; the first, all that older drivers know, counts it as used.
    """
    found = _told(nvml.nvmlDeviceGetMemoryInfo, handle, nvml.nvmlMemory_v2)
    return _told(nvml.nvmlDeviceGetMemoryInfo, handle) if found is None else found


def reasons_in_words(bits: int) -> tuple[str, ...]:
    """Why the clocks are not higher. A bit that is not known keeps its number."""
    found = [words for bit, words in THROTTLE_REASONS.items() if bits & bit]
    rest = bits & ~sum(THROTTLE_REASONS)
    return (*found, *([f"reason {rest:#x}"] if rest else []))


def _told(call: Callable[..., T], *arguments: Any) -> T | None:
    """What NVML answers, None where it will not, or not in text that can be read."""
    import pynvml

    try:
        return call(*arguments)
    except (pynvml.NVMLError, UnicodeDecodeError):
        return None


def _watts(milliwatts: int | None) -> float | None:
    return None if milliwatts is None else milliwatts / 1000
