"""What was found about the cards before the runs: one line for the terminal, and facts for the page."""

from __future__ import annotations

from collections.abc import Iterator

from bench.record.preflight import CardFindings, CardState, CopyCheck, PairFindings, Preflight
from bench.show.columns import gib


def describe_preflight(preflight: Preflight) -> str:
    """How it ended, in one line."""
    if preflight.status == "skipped":
        return f"cards not looked at ({preflight.message})"
    if preflight.status == "failed":
        return f"looking at the cards failed: {preflight.message}"
    corrupt = preflight.corrupt_pairs
    checked = len([*_checks(preflight)])
    words = f"{len(corrupt)} of {checked} ways arrive changed" if corrupt else "arrive unchanged to the bit"
    what = "between them and with the host" if preflight.pairs else "to the host and back"
    return (
        f"cards: {', '.join(f'{card.device} {card.name}' for card in preflight.cards)}; copies {what}: "
        f"{words} ({preflight.seconds:.0f} s)"
    )


def preflight_facts(preflight: Preflight | None) -> Iterator[tuple[str, str]]:
    """Name and value of every fact; none where there was no preflight."""
    if preflight is None:
        return
    yield "cards before the runs", describe_preflight(preflight)
    for card in preflight.cards:
        yield f"{card.device} before the runs", _card(card)
        if card.host_copies:
            yield f"copies from the host to {card.device} and back", _copies([card.host_copies], None)
    links: dict[str, list[str]] = {}
    for pair in preflight.pairs:
        if pair.source < pair.target or not _reversed(pair, preflight):
            links.setdefault(_link(pair), []).append(f"{pair.source} and {pair.target}")
    if links:
        yield "links between cards", "; ".join(f"{link}: {', '.join(ends)}" for link, ends in links.items())
    checks = [pair.copies for pair in preflight.pairs if pair.copies]
    if preflight.pairs:
        yield "copies between cards", _copies(checks, len(preflight.pairs))
    for number, warning in enumerate(preflight.warnings, 1):
        yield f"warning {number} about the cards", warning


def _card(card: CardFindings) -> str:
    if card.processes is None:
        processes = "foreign processes unknown"
    elif card.processes:
        processes = "used by " + ", ".join(
            f"pid {process.pid}" + (f" {process.name}" if process.name else "") for process in card.processes
        )
    else:
        processes = "no foreign process seen"
    sizes = [card.free_bytes, card.total_bytes]
    free = None if None in sizes else f"{gib(card.free_bytes)} of {gib(card.total_bytes)} GiB free"
    limits = None
    if card.power_limit_watts is not None:
        limits = f"limited to {card.power_limit_watts:g} W"
        if card.default_power_limit_watts is not None:
            limits += f" ({card.default_power_limit_watts:g} W by default)"
    parts = [free, processes, limits, _pcie(card), _state("idle", card.idle), _state("at work", card.busy)]
    return ", ".join(part for part in parts if part)


def _pcie(card: CardFindings) -> str | None:
    state = card.busy or card.idle
    if state.pcie_generation is None or state.pcie_width is None:
        return None
    best = ""
    if card.pcie_max_generation is not None and card.pcie_max_width is not None:
        best = f" of {card.pcie_max_generation} x{card.pcie_max_width}"
    when = "" if card.busy else " (idle)"
    return f"PCIe {state.pcie_generation} x{state.pcie_width}{best}{when}"


def _state(when: str, state: CardState | None) -> str | None:
    if state is None:
        return None
    parts = [
        None if state.temperature_celsius is None else f"{state.temperature_celsius} °C",
        None if state.sm_clock_mhz is None else f"{state.sm_clock_mhz} MHz",
        None if not state.throttle_reasons else f"clocks held by: {', '.join(state.throttle_reasons)}",
    ]
    told = [part for part in parts if part]
    return f"{when} {' '.join(told)}" if told else None


def _link(pair: PairFindings) -> str:
    access = {True: "peer access", False: "no peer access", None: "peer access unknown"}[pair.peer_access]
    return f"{pair.link or 'unknown'} ({access})"


def _reversed(pair: PairFindings, preflight: Preflight) -> bool:
    """Whether the other direction says the same of the link."""
    return any(
        (other.source, other.target, _link(other)) == (pair.target, pair.source, _link(pair))
        for other in preflight.pairs
    )


def _copies(checks: list[CopyCheck], expected: int | None) -> str:
    if not checks:
        return "none checked"
    idle, loaded = sum(c.rounds for c in checks), sum(c.rounds_under_load for c in checks)
    changed = sum(c.mismatching_bytes + c.staged_mismatching_bytes for c in checks)
    pairs = "" if expected is None else f"{len(checks)} of {expected} ordered pairs checked: "
    words = f"{changed} bytes arrived changed" if changed else "every byte as it should be"
    parts = [f"{pairs}{idle} copies at rest and {loaded} under load of up to "
             f"{max(c.largest_copy_bytes for c in checks) / 2**20:.0f} MiB, {words}"]  # fmt: skip
    direct = [c.gigabytes_per_second for c in checks if c.gigabytes_per_second is not None]
    staged = [c.staged_gigabytes_per_second for c in checks if c.staged_gigabytes_per_second is not None]
    parts += [f"{_span(direct)} GB/s direct"] if direct else []
    parts += [f"{_span(staged)} GB/s over the host"] if staged else []
    return ", ".join(parts)


def _span(values: list[float]) -> str:
    low, high = f"{min(values):.3g}", f"{max(values):.3g}"
    return low if low == high else f"{low} to {high}"


def _checks(preflight: Preflight) -> Iterator[CopyCheck]:
    yield from (card.host_copies for card in preflight.cards if card.host_copies)
    yield from (pair.copies for pair in preflight.pairs if pair.copies)
