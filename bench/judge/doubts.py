"""What must be said beside the figures: what so many runs allow to conclude, and every warning in words."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from bench.judge.conditions import Condition
from bench.judge.groups import Group
from bench.judge.growth import find_leak
from bench.judge.rows import Row
from bench.judge.session_doubts import modes_of, of_a_run, of_the_session
from bench.judge.unlike import split_in_words

FEW_STEPS = 5
"""Fewer measured steps than this are warned about."""
LOW_HEADROOM_BITS = 2.0
"""Less headroom than this, a factor of four, is warned about. This project's own: SmolLM2-135M keeps 1.5 bits
in float16 on ordinary English text and trains, while other models that came as near overflowed or not by the
rounding of their quantization (Kimi-Dev-72B, turboderp-org/exllamav3#52)."""
UNSTEADY_FACTOR = 1.5
"""Slowest over fastest measured step: above this, something else may have used the machine."""
SHAPE_BESIDE_THE_MLP = ("model_type", "hidden_size", "num_hidden_layers", "num_attention_heads", "vocab_size")

ONE_RUN = (
    "Each backend ran once, and one run gives no interval: small differences cannot be ranked, and a mark "
    "means the lowest or highest value measured, no more. Use --repeats 5 to see the spread and to rank."
)
SOME_ONE_RUN = (
    "Some backends ran only once, and one run gives no interval: they have no rank, and could be anywhere "
    "among the others. Use --repeats 5 for every backend."
)
REPEATED = (
    "Figures are medians over the runs of a backend, with the lowest and highest run beside them. Ratios are "
    "taken repeat by repeat; where their intervals overlap, backends tie."
)
TOO_FEW_REPEATS = (
    "Two runs give intervals so wide that little can be told apart: use --repeats 5 before anything is "
    "concluded from a tie."
)
NOTHING_COMPLETED = "No run completed, so there is nothing to compare."


def caveat(groups: Sequence[Group]) -> str:
    """What may and may not be concluded from so many runs."""
    runs = [len(summary.rows) for group in groups for summary in group.summaries]
    if not runs:
        return NOTHING_COMPLETED
    if max(runs) == 1:
        return ONE_RUN
    parts = (REPEATED, max(runs) == 2 and TOO_FEW_REPEATS, min(runs) == 1 and SOME_ONE_RUN)
    return " ".join(part for part in parts if part)


def warnings(
    rows: Sequence[Row], groups: Sequence[Group], conditions: Sequence[Condition]
) -> tuple[str, ...]:
    """Every doubt, with what to do about it: of the whole set first, then of single runs."""
    completed = [row for row in rows if row.completed]
    found = [
        *split_in_words(groups, conditions),
        *_of_padding(completed),
        *_of_the_setting(rows),
        *_few_steps(completed),
        *of_the_session(groups, completed),
        *(f"{row.name}: {text}" for row in completed for text in _of_a_run(row)),
        *(f"{row.name}: {leak.sentence}" for row in rows if (leak := find_leak(row.record))),
        *(f"{row.name}: {breach}" for row in rows for breach in row.record.proof.breaches),
        *(f"{row.label}: {note}" for row in rows if row.record.quantization
          for note in row.record.quantization.notes),
    ]  # fmt: skip
    # Repeats of one backend say the same note; once is enough.
    return tuple(dict.fromkeys(found))


def _of_padding(completed: Sequence[Row]) -> Iterator[str]:
    """Published checkpoints whose MLP layers were padded, beside the same shape that was not."""
    shapes: dict[tuple[object, ...], dict[tuple[bool, int], list[str]]] = {}
    for row in completed:
        request = row.record.request
        architecture = request.model.architecture
        width = architecture.get("intermediate_size")
        if isinstance(width, int):
            rest = tuple(architecture.get(name) for name in SHAPE_BESIDE_THE_MLP)
            kind = request.calibration == "published", width
            shapes.setdefault(rest, {}).setdefault(kind, []).append(row.label)
    for kinds in shapes.values():
        for (published, padded), labels in kinds.items():
            narrower = {width: who for (other, width), who in kinds.items() if not other and width < padded}
            for width, plain in narrower.items() if published else ():
                yield (
                    f"{_listed(labels)}: MLP layers and their adapters are {padded} channels wide instead of "
                    f"{width} ({_listed(plain)}): the published checkpoint pads them. That is "
                    f"{100 * (padded / width - 1):.2g} % more of them to hold and to multiply, and adapters "
                    "that begin with other values, so its figures stand in a group of their own."
                )


def _listed(labels: Sequence[str]) -> str:
    return ", ".join(dict.fromkeys(labels))


def _of_the_setting(rows: Sequence[Row]) -> Iterator[str]:
    if any(row.record.request.device == "cpu" for row in rows):
        yield (
            "These are figures of a CPU and not of a GPU: kernels, times and memory are different there. "
            "Run the same command on the card that is meant to train."
        )
    if any(row.record.request.model.weights == "synthetic" for row in rows):
        yield (
            "The weights are synthetic: speed and memory are measured on the exact shape, but losses and "
            "gradients say nothing about the stability of the real model. Use --weights real for that."
        )
    for row in rows:
        # The same for all runs of one command; said once (see `warnings`).
        yield from row.record.preflight.warnings if row.record.preflight else ()
    if any(row.record.environment and row.record.environment.dirty for row in rows):
        yield (
            "The checkout of the harness had uncommitted changes, so its commit does not name the code that "
            "ran: two such runs of one commit may be of different code. Commit and run again before these "
            "figures are published."
        )


def _few_steps(completed: Sequence[Row]) -> Iterator[str]:
    few = [row for row in completed if row.measured_steps < FEW_STEPS]
    if few:
        labels = ", ".join(dict.fromkeys(row.label for row in few))
        steps = max(row.record.request.workload.warmup_steps for row in few) + FEW_STEPS
        yield (
            f"Fewer than {FEW_STEPS} measured steps ({labels}): medians of so few can shift by chance. "
            f"Use --steps {steps} or more."
        )


def _of_a_run(row: Row) -> Iterator[str]:
    yield from of_a_run(row)
    low, high = row.step_seconds_min, row.step_seconds_max
    # Steps of two kinds have been told of already.
    if low and high and high / low > UNSTEADY_FACTOR and modes_of(row) is None:
        yield (
            f"the slowest measured step took {high / low:.2g} times as long as the fastest "
            f"({high:.3g} s against {low:.3g} s). Close other programs, raise --steps, and run again."
        )
    if row.skipped_updates:
        yield (
            f"the loss scaler skipped the update in {row.skipped_updates} of {len(row.record.steps)} steps. "
            "Use --dtype bfloat16 where the backend takes it."
        )
    yield from _of_the_probes(row)
    highest, peak = row.steps_peak_reserved_bytes, row.peak_memory_bytes
    if highest is not None and peak is not None and highest > peak:
        step = next(step for step in row.record.steps if step.peak_reserved_bytes == highest)
        yield (
            f"step {step.index} reserved {highest / 2**30:.2f} GiB, more than the {peak / 2**30:.2f} GiB "
            "of the step whose phases were read, which is the peak that is compared"
            + (" (the load may have left the rest). " if step.index == 0 else ". ")
            + "Leave room for the higher figure."
        )


def _of_the_probes(row: Row) -> Iterator[str]:
    """What the probes of the steps, their cost, and the comparison with a reference leave open."""
    lowest = row.headroom.lowest if row.headroom else None
    if row.headroom and lowest and (lowest.cell.bits or 0.0) < LOW_HEADROOM_BITS:
        what = "activations" if lowest.direction == "forward" else "gradients"
        yield (
            f"only {lowest.cell.bits:.2f} bits of headroom in {row.headroom.dtype} ({what} of layer "
            f"{lowest.layer} at step {lowest.step}, largest value {lowest.cell.abs_max:.5g}): other text or "
            "other weights may overflow there. Use --dtype bfloat16 where the backend takes it."
        )
    if row.record.request.trace:
        yield (
            "every linear, norm and attention was watched (--trace), so step times include the watching. "
            "Compare speeds without it."
        )
    if row.record.fidelity and row.record.fidelity.note:
        yield f"gradients beside the reference's: {row.record.fidelity.note}"
