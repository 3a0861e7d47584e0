"""What the findings of a preflight mean, in words, each with what to do about it."""

from __future__ import annotations

from collections.abc import Iterator

from bench.record.preflight import HOST, CardFindings, CopyCheck, Preflight
from bench.record.surroundings import SLOWING_REASONS

GIB = 2**30
UNEXPLAINED_BYTES = GIB // 2
"""Memory in use that is warned about where no process is seen with it: about what one CUDA context takes."""
REPAIR = (
    "Turn the IOMMU off or pass it through (iommu=pt on the kernel's command line), switch off ACS in the "
    "BIOS, update the driver or take the peer-to-peer patch out of it, and check bridges and slots"
)
"""What healed it in pytorch/pytorch#84803, NVIDIA/nccl#199 and NVIDIA/open-gpu-kernel-modules#1257."""


def concerns(preflight: Preflight) -> tuple[str, ...]:
    """Every warning: what is corrupt first, then card by card."""
    return (
        *(f"{_corruption(*way)}. {REPAIR}." for way in preflight.corrupt()),
        *(text for card in preflight.cards for text in _of_a_card(card)),
        *_of_the_checks(preflight),
    )


def stop_message(preflight: Preflight, *, across_processes_only: bool, nccl_avoids_peers: bool) -> str | None:
    """Why no run may be started, and what to do; None where nothing is corrupt that the runs use.

    ``across_processes_only``: every run has one card a process (ddp, fsdp), so that only NCCL crosses.
    ``nccl_avoids_peers``: NCCL_P2P_DISABLE is set. Together they leave no copy from card to card.
    """
    corrupt = list(preflight.corrupt())
    if not any(source == HOST for source, _, _ in corrupt) and across_processes_only and nccl_avoids_peers:
        return None
    if not corrupt:
        return None
    others = len(corrupt) - 1
    more = f" So {'does 1 other pair' if others == 1 else f'do {others} other pairs'}." if others else ""
    if corrupt[0][0] == HOST:
        aid = "Until then hide that card with CUDA_VISIBLE_DEVICES"
    else:
        aid = (
            "Until then use one card (--placement single), or hide one of the two with CUDA_VISIBLE_DEVICES; "
            "NCCL_P2P_DISABLE=1 helps the placements ddp and fsdp only"
        )
    return (
        f"{_corruption(*corrupt[0])}.{more} A training on it would look like a bad backend, so nothing was "
        f"run. {REPAIR}. {aid}"
    )


def _corruption(source: str, target: str, copies: CopyCheck) -> str:
    """What arrived changed, as one sentence without its end."""
    way = f"A copy from {source} to {target}"
    if source == HOST:
        way += " and back"
    if not copies.mismatching_bytes:
        return (
            f"{way} arrives changed: {copies.staged_mismatching_bytes} bytes, on the part from the card to "
            "the host"
        )
    when = ""
    if copies.mismatching_bytes == copies.mismatching_bytes_under_load:
        when = ", and only under load"
    first = copies.first_mismatch
    where = first and (
        f" (the first at offset {first.offset_bytes} of {first.copy_bytes}, pattern {first.pattern}, by the "
        f"{first.way}: {first.found:#04x} instead of {first.expected:#04x})"
    )
    changed = f"{copies.mismatching_bytes} of {copies.checked_bytes} bytes"
    return f"{way} arrives changed: {changed}{when}{where or ''}"


def _of_a_card(card: CardFindings) -> Iterator[str]:
    name = f"{card.device} ({card.name})"
    yield from _of_its_memory(name, card)
    limit, default = card.power_limit_watts, card.default_power_limit_watts
    if limit is not None and default is not None and limit < default:
        yield (
            f"{name} is limited to {limit:g} W and has {default:g} W by default: step times are those of the "
            f"limited card. Where it is not meant to be, nvidia-smi -i {card.nvml_index} -pl {default:g} "
            "raises the limit."
        )
    if card.uncorrected_ecc_errors:
        yield (
            f"{name} has counted {card.uncorrected_ecc_errors} memory errors that it could not correct since "
            "the driver was loaded. Reset it, and replace it where they come back."
        )
    busy = card.busy
    if busy is None:
        return
    if busy.pcie_width and card.pcie_max_width and busy.pcie_width < card.pcie_max_width:
        yield (
            f"{name} uses {busy.pcie_width} of {card.pcie_max_width} PCIe lanes under load: copies to and "
            "from it are slower than they could be. Check its slot and riser."
        )
    generation, best = busy.pcie_generation, card.pcie_max_generation
    if generation and best and generation < best:
        yield (
            f"{name} runs PCIe generation {generation} of {best} under load: copies to and from it are "
            "slower than they could be. Check its riser and the BIOS."
        )
    slowing = [reason for reason in busy.throttle_reasons or () if reason.startswith(SLOWING_REASONS)]
    if slowing:
        at = "" if busy.temperature_celsius is None else f" at {busy.temperature_celsius} °C"
        yield (
            f"{name} was slowed down under load{at} ({', '.join(slowing)}): step times are "
            "those of a card that is too warm or short of power. Check its cooling and supply."
        )


def _of_its_memory(name: str, card: CardFindings) -> Iterator[str]:
    used = None if card.used_bytes is None else f"{card.used_bytes / GIB:.2f} GiB"
    if card.processes:
        listed = ", ".join(
            f"pid {process.pid}"
            + (f" {process.name}" if process.name else "")
            + ("" if process.used_bytes is None else f" with {process.used_bytes / GIB:.2f} GiB")
            for process in card.processes
        )
        whole = "" if used is None else f"; {used} were in use in all"
        yield (
            f"{name} was used by others before anything of ours ran ({listed}{whole}): step times and memory "
            "may be disturbed. End them, or take another card with CUDA_VISIBLE_DEVICES."
        )
    elif card.used_bytes is not None and card.used_bytes >= UNEXPLAINED_BYTES:
        yield (
            f"{name} had {used} in use before anything of ours ran, by no process that can be seen from here "
            "(a container does not show those outside): step times and memory may be disturbed. Look with "
            "nvidia-smi on the host."
        )


def _of_the_checks(preflight: Preflight) -> Iterator[str]:
    if preflight.status == "skipped":
        yield (
            "The cards were not looked at before the runs (--no-preflight): foreign processes, and copies "
            "that arrive changed, would not have been noticed. Run without it once."
        )
    elif preflight.status == "failed":
        yield (
            f"The check of the cards before the runs was not finished ({preflight.message}), so nothing "
            "says that copies between them arrive unchanged. Where it stopped at a copy between cards, try "
            "one card (--placement single)."
        )
    named = [(HOST, card.device, card.host_copies) for card in preflight.cards]
    named += [(pair.source, pair.target, pair.copies) for pair in preflight.pairs]
    for source, target, copies in named:
        if copies and copies.note:
            yield f"Copies from {source} to {target} were checked with less than was meant: {copies.note}."
