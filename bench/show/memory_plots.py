"""Figures of memory: by phase, and by what the tensors hold. ``bench.show.plots`` draws them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bench.judge.rows import TRAINING_PHASES, Row
from bench.show.columns import GIB, gib, words
from bench.show.drawing import INK, Plot, box, finish, legend_below, name_lines, new_figure, shading
from bench.show.owners import owner_id
from bench.show.styles import Style
from bench.show.wording import ended, extremes

PHASES = {"loaded": 0.25, "attached": 0.4, "forward": 0.6, "backward": 0.8, "optimizer_step": 1.0}
"""Phase -> opacity of its bar."""
KINDS = {
    "quantized_weights": ("quantized weights", 0.85, ""),
    "quantization_metadata": ("scales and other metadata", 0.55, ""),
    "unquantized_weights": ("unquantized weights", 0.25, ""),
    "lora": ("LoRA weights", 0.0, "////"),
    "gradients": ("gradients", 0.0, "\\\\\\\\"),
    "optimizer_state": ("optimizer state", 0.0, "xxxx"),
}


def memory_by_phase(rows: Sequence[Row], styles: Mapping[str, Style]) -> Plot | None:
    """Peak memory of the fullest device in each phase, grouped by backend."""
    peaks = {row: found for row in _first_runs(rows) if (found := _phase_peaks(row))}
    if not peaks:
        return None
    with new_figure(0.9 + 0.62 * len(peaks)) as (figure, axes):
        for place, (row, found) in enumerate(peaks.items()):
            whose = owner_id(row.label)
            for offset, (phase, shade) in enumerate(PHASES.items()):
                if phase in found:
                    y, width = place + 0.15 * (offset - 2), found[phase] / GIB
                    color = styles[row.label].color
                    axes.barh(y, width, height=0.13, color=color, alpha=shade, gid=whose)
            top = max(found.values())
            at: Any = {"textcoords": "offset points", "va": "center", "gid": whose}
            axes.annotate(gib(top), (top / GIB, place), (5, 0), **at)
        name_lines(axes, [ended(row.label, row) for row in peaks], [row.label for row in peaks])
        axes.set_xlabel("peak memory of the fullest device (GiB)")
        axes.set_xlim(0, 1.12 * max(max(found.values()) for found in peaks.values()) / GIB)
        legend_below(figure, {words(phase): box(color=INK, alpha=shade) for phase, shade in PHASES.items()})
        training = {
            ended(row.label, row): max(reached)
            for row, found in peaks.items()
            if (reached := [found[phase] for phase in TRAINING_PHASES if phase in found])
        }
        text = "Peak memory by phase. " + extremes(training, gib, "GiB in training")
        return finish(figure, "memory-by-phase", "Peak memory by phase", text)


def _phase_peaks(row: Row) -> dict[str, int]:
    readings = row.record.memory.readings
    on_card = any(reading.peak_reserved_bytes is not None for reading in readings)
    found: dict[str, int] = {}
    for reading in readings:
        peak = reading.peak_reserved_bytes if on_card else reading.peak_resident_bytes
        if peak is not None:
            found[reading.phase] = max(peak, found.get(reading.phase, 0))
    return found


def bytes_by_kind(rows: Sequence[Row]) -> Plot | None:
    """What the tensors themselves occupy, stacked by kind, summed over the devices."""
    shown = {
        row: {kind: size or 0 for kind, size in row.tensor_bytes.items()}
        for row in _first_runs(rows)
        if row.record.memory.bytes_by_kind
    }
    if not shown:
        return None
    with new_figure(1.1 + 0.36 * len(shown)) as (figure, axes):
        for place, (row, sizes) in enumerate(shown.items()):
            left, whose = 0.0, owner_id(row.label)
            for kind, (_, shade, hatch) in KINDS.items():
                if sizes[kind]:
                    axes.barh(place, sizes[kind] / GIB, 0.62, left, gid=whose, **shading(shade, hatch))
                    left += sizes[kind] / GIB
        name_lines(axes, [ended(row.label, row) for row in shown], [row.label for row in shown])
        axes.set_xlabel("bytes of the tensors, all devices (GiB)")
        legend_below(figure, {label: box(**shading(shade, hatch)) for label, shade, hatch in KINDS.values()})
        sums = {ended(row.label, row): sum(sizes.values()) for row, sizes in shown.items()}
        text = "Exact tensor bytes by kind. " + extremes(sums, gib, "GiB in all")
        return finish(figure, "bytes-by-kind", "What the tensors occupy", text)


def _first_runs(rows: Sequence[Row]) -> list[Row]:
    """One run a label: memory repeats to the byte on a card, and twenty bars a backend hide it."""
    first: dict[str, Row] = {}
    for row in sorted(rows, key=lambda row: not row.completed):
        first.setdefault(row.label, row)
    return [row for row in rows if first[row.label] is row]
