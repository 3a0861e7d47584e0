"""The stability margin, measured: which runs there are, and the bisection over the factor.

``arrange_margin`` checks what was asked; ``measure_margins`` runs one probe after another, each an ordinary
run with two steps and ``--stress MODULE=2**k``. What the records say is derived in ``bench.judge.margin``.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bench.ask.plan import RunRequest
from bench.ask.shapes import decoder_layers
from bench.ask.stress import resolve_stress
from bench.errors import BadValue
from bench.run.arrange import arrange
from bench.run.asked import Asked
from bench.run.one_by_one import OneByOne, changed
from bench.run.sweep import Sweep

DEFAULT_DTYPES = ("float16", "bfloat16")
DEFAULT_STEPS = 2
DEFAULT_MAX_BITS = 24
LARGEST_MAX_BITS = 126
"""2**127 and its reciprocal are the last powers of two that float32 holds without loss on both sides."""
DEPTH_DIVISOR = 3
"""The pair that is scaled by default is in the layer a third of the way up."""

NextExponent = Callable[[Mapping[int, bool | None], int], int | None]
"""Exponent -> whether training was finite, and the largest exponent; gives the next one to try, or None."""


@dataclass(frozen=True)
class MarginPlan:
    """What a margin is measured on."""

    sweep: Sweep
    """Its requests are the unstressed controls, one a backend and dtype."""
    module: str
    max_bits: int
    headline: str


def arrange_margin(asked: Asked, *, dtypes: Sequence[str], module: str | None, max_bits: int) -> MarginPlan:
    """Everything that can fail because of what was asked, before anything is written.

    ``dtypes``: empty for the default ones. ``module``: None for the up_proj of the layer a third of the way
    up. Raises UserError for all that is wrong with it.
    """
    if not 1 <= max_bits <= LARGEST_MAX_BITS:
        raise BadValue(f"--max-bits {max_bits} is not between 1 and {LARGEST_MAX_BITS}")
    steps = DEFAULT_STEPS if asked.steps is None else asked.steps
    # First, so that --set can say otherwise.
    settings = (f"workload.warmup_steps={min(1, max(steps - 1, 0))}", "fidelity=off", *asked.settings)
    asked = replace(asked, steps=steps, settings=settings, repeats=1)
    arranged = [arrange(replace(asked, dtype=dtype)) for dtype in dict.fromkeys(dtypes or DEFAULT_DTYPES)]
    sweep = arranged[0].sweep
    model = sweep.model.request
    chosen = module or default_module(model.architecture, model.layers)
    try:
        resolve_stress({chosen: 2.0}, model.architecture, model.layers)
    except BadValue as error:
        raise BadValue(error.message.replace("--stress", "--module"), error.hint) from None
    why = "" if module else " (chosen: the layer a third of the way up)"
    requests = [request for one in arranged for request in one.sweep.requests]
    headline = (
        f"scaling {chosen}{why} by 2^0 to 2^{max_bits}: {model.name}, {model.weights} weights, on "
        f"{requests[0].device}; {len(requests)} bisections with runs of {steps} steps"
    )
    return MarginPlan(replace(sweep, requests=requests), chosen, max_bits, headline)


def default_module(architecture: Mapping[str, Any], layers: int | None) -> str:
    """The up_proj of the layer a third of the way up. ``layers``: how many are kept; None: all."""
    total = decoder_layers(architecture)
    return f"model.layers.{min(total, layers or total) // DEPTH_DIVISOR}.mlp.up_proj"


def measure_margins(plan: MarginPlan, runner: OneByOne, next_exponent: NextExponent) -> None:
    """Bisect for every backend and dtype of ``plan``; the records are ``runner.records`` afterwards.

    Raises KeyboardInterrupt after the interrupted run's record has been saved.
    """
    for control in plan.sweep.requests:
        known: dict[int, bool | None] = {}
        while (exponent := next_exponent(known, plan.max_bits)) is not None:
            title = f"{control.backend} {control.dtype}, factor 2^{exponent}"
            _, evidence = runner.run(stressed(control, plan.module, exponent), title)
            known[exponent] = evidence.finite


def stressed(control: RunRequest, module: str, exponent: int) -> RunRequest:
    """The control with ``module`` scaled by 2**exponent; exponent 0 is the control itself."""
    return changed(control, {"stress": {module: 2.0**exponent}}) if exponent else control
