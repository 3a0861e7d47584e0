"""What a forecast is measured on: which runs there are, each an ordinary run with ``--layers N``.

``arrange_forecast`` checks what was asked; ``bench.run.forecast`` measures it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from pathlib import Path

from bench.ask.plan import RunRequest
from bench.ask.shapes import decoder_layers
from bench.errors import BadValue
from bench.record.store import Store
from bench.run.arrange import DEFAULT_OUT, arrange
from bench.run.asked import Asked
from bench.run.order import Order
from bench.run.sweep import Sweep

DEFAULT_STEPS = 3
WARMUP_STEPS = 2
"""Memory by phase is read in the last warm-up step: in the second, the optimizer's state exists."""
DEFAULT_ROUNDS = 8
DEFAULT_WARMUP_ROUNDS = 2
SLICES_FOLDER = "slices"
EXAMPLE = "for example --slices 2,4"
RETURN_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(2**20)}
"""For glibc: from 1 MiB on, what is freed goes back to the system at once. Left to itself it raises the limit
to 32 MiB, and the heap keeps what a loader's temporaries left: 0.5 GiB at the 24 layers of the proxy in NF4,
and at a few layers now more, now less of it, which a line to 24 layers multiplies by ten."""
RETURN_NOTE = "freed memory was given back at once (glibc's mmap threshold at 1 MiB), so that peaks repeat"


class ReturningSweep(Sweep):
    """A sweep whose runs on a CPU give freed memory back at once, and say so. Step times are not taken from
    them: giving back costs time."""

    @classmethod
    def of(cls, sweep: Sweep, folder: Path) -> ReturningSweep:
        """The same sweep, with its records in ``folder``."""
        values = {one.name: getattr(sweep, one.name) for one in fields(sweep)}
        return cls(**(values | {"store": Store(folder)}))

    def order(self, request: RunRequest) -> Order:
        """The job, with the allocator's setting."""
        order = super().order(request)
        if request.device != "cpu":
            return order
        note = RETURN_NOTE if order.note is None else f"{order.note}; {RETURN_NOTE}"
        return order.model_copy(update={"variables": RETURN_MEMORY, "note": note})


@dataclass(frozen=True)
class ForecastPlan:
    """What a forecast is measured on."""

    sweep: Sweep
    """Of the slices, in a folder of their own. Its requests are not used."""
    full: Sweep
    """Of the full depth; its requests are one a backend and repeat."""
    slices: tuple[int, ...]
    full_layers: int
    by_depth: dict[tuple[str, int, int], RunRequest]
    """Backend, repeat and number of layers -> the run; the full depth among them."""
    verify: bool
    rounds: int
    warmup_rounds: int
    headline: str

    @property
    def backends(self) -> tuple[str, ...]:
        """In the order in which they run."""
        return tuple(dict.fromkeys(request.backend for request in self.full.requests))

    @property
    def repeats(self) -> tuple[int, ...]:
        """Their numbers."""
        return tuple(dict.fromkeys(request.repeat for request in self.full.requests))

    @property
    def depths(self) -> tuple[int, ...]:
        """Every depth that is run, rising."""
        return (*self.slices, self.full_layers) if self.verify else self.slices

    @property
    def folder(self) -> Path:
        """Where the forecast is written."""
        return self.full.store.folder


def arrange_forecast(
    asked: Asked, *, slices: str, verify: bool, rounds: int, warmup_rounds: int
) -> ForecastPlan:
    """Everything that can fail because of what was asked, before anything is written.

    Raises UserError for all that is wrong with it.
    """
    if rounds < 1:
        raise BadValue(f"--rounds {rounds}: at least one round must be measured")
    if warmup_rounds < 0:
        raise BadValue(f"--warmup-rounds {warmup_rounds} is negative")
    depths = parse_depths(slices, "--slices")
    steps = DEFAULT_STEPS if asked.steps is None else asked.steps
    # First, so that --set can say otherwise.
    settings = (
        f"workload.warmup_steps={min(WARMUP_STEPS, max(steps - 1, 0))}",
        "fidelity=off",
        *asked.settings,
    )
    asked = replace(asked, steps=steps, settings=settings, layers=None)
    whole = arrange(asked)
    if asked.calibration == "auto" and any(r.calibration == "calibrated" for r in whole.sweep.requests):
        # A model that is cut is never calibrated, so the whole one is not either: they must be packed alike.
        asked = replace(asked, calibration="rtn")
        whole = arrange(asked)
    first = whole.sweep.requests[0]
    if first.placement != "single":
        raise BadValue(f"placement {first.placement}: a forecast is measured on one device", "leave it out")
    full_layers = decoder_layers(first.model.architecture)
    if depths[-1] >= full_layers:
        why = f"the model has {full_layers} decoder layers and a slice must have fewer"
        raise BadValue(f"--slices {slices}: {why}", EXAMPLE)
    folder = asked.out or DEFAULT_OUT / f"forecast-{Path(first.preset).stem}"
    by_depth = {(r.backend, r.repeat, full_layers): r for r in whole.sweep.requests}
    sliced = [arrange(replace(asked, layers=depth)) for depth in depths]
    for depth, one in zip(depths, sliced, strict=True):
        by_depth |= {(r.backend, r.repeat, depth): r for r in one.sweep.requests}
    runs = len(by_depth) if verify else len(by_depth) - len(whole.sweep.requests)
    headline = (
        f"forecast of {first.model.name} at {full_layers} layers from {', '.join(map(str, depths))}: "
        f"{first.model.weights} weights, on {first.device}; {runs} runs of {steps} steps, and for each "
        f"backend and repeat {warmup_rounds} + {rounds} rounds of steps in turns"
    )
    return ForecastPlan(
        sweep=ReturningSweep.of(whole.sweep, folder / SLICES_FOLDER),
        full=ReturningSweep.of(whole.sweep, folder),
        slices=depths,
        full_layers=full_layers,
        by_depth=by_depth,
        verify=verify,
        rounds=rounds,
        warmup_rounds=warmup_rounds,
        headline=headline,
    )


def parse_depths(text: str, flag: str) -> tuple[int, ...]:
    """A list of layer counts that rise, two or more. Raises BadValue for anything else."""
    try:
        depths = tuple(int(part) for part in text.split(","))
    except ValueError:
        raise BadValue(f"{flag} '{text}' is not a list of layer counts", EXAMPLE) from None
    if min(depths) < 1:
        raise BadValue(f"{flag} {text}: a slice has at least one layer", EXAMPLE)
    if len(depths) < 2:
        raise BadValue(f"{flag} {text}: a line needs two slices or more", EXAMPLE)
    if list(depths) != sorted(set(depths)):
        raise BadValue(f"{flag} {text}: layer counts must rise, each once", EXAMPLE)
    return depths


def parse_subsets(
    texts: Sequence[str], slices: Sequence[int], *, verify: bool
) -> tuple[tuple[int, ...], ...]:
    """The sets of slices from which the forecast is checked: those of ``--pairs``, else all slices and, where
    there are more than two, every pair. Empty without ``--verify``. Raises BadValue for a set of others."""
    if not verify:
        if texts:
            raise BadValue(
                "--pairs says which forecasts are checked", "add --verify, which runs the full depth"
            )
        return ()
    if not texts:
        pairs = [(one, other) for place, one in enumerate(slices) for other in slices[place + 1 :]]
        return tuple(dict.fromkeys([*pairs, tuple(slices)]))
    found = [parse_depths(text, "--pairs") for text in texts]
    for text, depths in zip(texts, found, strict=True):
        if missing := [depth for depth in depths if depth not in slices]:
            known = ",".join(map(str, slices))
            raise BadValue(f"--pairs {text}: {missing[0]} is not among --slices {known}")
    return tuple(dict.fromkeys(found))
