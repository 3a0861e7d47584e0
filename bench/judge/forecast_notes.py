"""What must be said beside a forecast: what it assumes, and what departs from what was asked."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Literal

from bench.judge.forecast_lines import Question
from bench.record.depths import Repeat
from bench.record.forecast import BackendForecast

LOSS_TOLERANCE = 1e-3
"""Relative difference of the first step's loss between a slice's own run and the same depth in the turns from
which on a note says so. On a CPU they agree to the bit; CUDA kernels may add in another order."""


def notes_of(question: Question, repeats: Sequence[Repeat]) -> Iterable[str]:
    """Departures from what was asked, and doubts, a sentence each; some may come twice."""
    records = [record for repeat in repeats for record in repeat.records.values()]
    for record in records:
        yield from record.quantization.notes if record.quantization else ()
    prepared = {
        depth: record.load.prepare_seconds
        for repeat in repeats
        for depth, record in repeat.records.items()
        if record.load and record.load.prepare_seconds is not None
    }
    if prepared:
        each = ", ".join(
            f"{seconds:.0f} s at {_layers(depth)}" for depth, seconds in sorted(prepared.items())
        )
        yield f"making the packed checkpoint is not part of the load: {each}"
    for repeat in repeats:
        for depth in (*question.slices, question.full_layers):
            alone, in_turns = _first_losses(repeat, depth)
            if alone is not None and in_turns is not None:
                off = abs(in_turns - alone)
                if not off <= LOSS_TOLERANCE * abs(alone):
                    yield (
                        f"timed in turns, {_layers(depth)} gave a first loss of {in_turns:.6g}, and alone "
                        f"{alone:.6g}: the step times may not be those of that model"
                    )


def failures_of(repeats: Sequence[Repeat]) -> Iterable[str]:
    """What did not complete, and how it ended."""
    for repeat in repeats:
        for depth, record in repeat.records.items():
            if record.status != "completed":
                status = record.status.replace("_", " ")
                yield f"{_layers(depth)}, repeat {repeat.index}: {status}: {record.message}"
        for times in (repeat.abandoned, repeat.times):
            if times and times.status != "completed":
                depths = ", ".join(map(str, times.turns.depths))
                status = times.status.replace("_", " ")
                yield f"steps at {depths} layers, repeat {repeat.index}: {status}: {times.message}"


def _first_losses(repeat: Repeat, depth: int) -> tuple[float | None, float | None]:
    """Of the first step: in the run of that depth, and in the turns."""
    record, times = repeat.records.get(depth), repeat.times
    losses = record.steps[0].losses if record is not None and record.steps else ()
    if not losses or times is None or not times.losses.get(depth):
        return None, None
    return sum(losses) / len(losses), times.losses[depth][0]


def assumptions(
    backends: Sequence[BackendForecast], weights: Literal["real", "synthetic"], device: Literal["cpu", "cuda"]
) -> tuple[str, ...]:
    """What the answer rests on, a sentence or two each."""
    said = [
        "All decoder layers are alike: every quantity is a fixed part and the same amount for each layer. An "
        "interval comes from the spread of what was measured, and says nothing of a model that is not so.",
        "Step times are those of the device that was measured, without the probes of a run. On another "
        "device they say nothing. A model split over several cards of that kind works on one card at a time, "
        "so the sum stays; copies between the cards come on top.",
        "Load times are those of this disk and processor, and grow once the whole model no longer fits into "
        "the page cache. Making a packed checkpoint is not among them.",
    ]
    if device == "cpu":
        said.append(
            "Peaks are resident memory of a process on the CPU, interpreter and libraries included: they say "
            "what the same training takes on a CPU, and nothing of a card. Freed memory was given back to "
            "the system at once; left to itself, the allocator keeps some of it, now more and now less."
        )
    bases = {outlook.basis for backend in backends for outlook in backend.outlooks}
    if "arithmetic" in bases:
        said.append(
            "On cards: computed as `qlora-bench plan` does, not measured; its assumptions stand there. "
            "Decoder layers are split over the cards of one process."
        )
    if "measured" in bases:
        said.append(
            "On cards: the plan of each card, corrected by what the slices' peaks were above their own plans "
            "as a line over the layers on that card, with the CUDA context and the allocator's share on top. "
            "The longest sequence assumes the same correction in bytes at every length."
        )
    if weights == "synthetic":
        said.append(
            "Weights were drawn at random in the model's shape: sizes and times are real, values not."
        )
    return tuple(said)


def _layers(depth: int) -> str:
    return f"{depth} layer{'s' if depth > 1 else ''}"
