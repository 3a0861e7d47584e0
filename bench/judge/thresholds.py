"""The thresholds of the verdicts: each with its value, and where it comes from.

``bench.judge.stability`` and the modules beside it judge by them, and the page shows each beside the value
that was held against it (`Evidence`). Where no publication gives a value for runs as short as these, the
source says that the value is this project's own and why it was chosen.
"""

from __future__ import annotations

import math
from dataclasses import dataclass


@dataclass(frozen=True)
class Threshold:
    """A limit that a value may reach but not exceed."""

    short: str
    """What is measured, in a few words."""
    name: str
    """The same in full, with its unit."""
    meaning: str
    """The measure in one sentence, for who has never heard of it."""
    value: float
    source: str
    """Of the measure and of the value."""


@dataclass(frozen=True)
class Evidence:
    """One value of one run beside the threshold it was held against."""

    measure: Threshold
    """What was measured, what it means, and where the threshold comes from."""
    value: float | None
    """None: this run gives none, and ``note`` says why."""
    limit: float
    """The threshold for this run: ``measure.value``, or what follows from it for so many tokens or layers."""
    exceeded: bool
    note: str = ""
    """Where the value stands (a step, a direction), or why there is none."""


def held_against(
    threshold: Threshold, value: float | None, note: str = "", *, limit: float | None = None
) -> Evidence:
    """``value`` beside ``threshold``; ``limit`` replaces its value where that depends on the run.

    A NaN exceeds every threshold: it must never pass for a value within bounds.
    """
    bound = threshold.value if limit is None else limit
    exceeded = value is not None and not value <= bound
    return Evidence(threshold, value, bound, exceeded, note)


WEIGHTS_NOT_FINITE = Threshold(
    "trained weights not finite",
    "trained weights not finite after the last step",
    "A weight that became NaN or infinite is lost, and with it every later output: the adapters are "
    "poisoned.",
    0,
    "none is harmless; every trained tensor is looked at after the last update",
)
"""1 where some are not finite, 0 where all are."""

NOT_FINITE = Threshold(
    "steps not finite",
    "steps whose loss or gradient norm is not finite",
    "NaN (no number) and infinity are what is left when a value left the range of its dtype; updates that "
    "the loss scaler passed over are counted in a line of their own.",
    0,
    "none is harmless: AdamW writes a NaN into every weight that it trains",
)
"""A non-finite loss, or a non-finite norm of an update that was applied."""

NOT_FINITE_INSIDE = Threshold(
    "failure inside",
    "first failure inside the model (1: there was one)",
    "The probe watches the largest absolute value of every decoder layer in both directions, so a NaN or an "
    "infinity is seen where it arises, even if the loss hides it.",
    0,
    "none is harmless unless the loss scaler passed the update over",
)
"""`Record.first_failure`, where no scaler spared the update."""

FROZEN_NOT_FINITE = Threshold(
    "frozen tensors not finite",
    "frozen tensors not finite as loaded",
    "A weight, scale or table of the frozen model that is NaN or infinite before anything is computed: a "
    "broken checkpoint.",
    0,
    "none is harmless; every frozen tensor is looked at after loading",
)
"""`Proof.weights_finite`."""

SKIP_RATE = Threshold(
    "updates skipped",
    "share of measured steps whose update the loss scaler skipped",
    "In float16 the loss is multiplied by a scale so that small gradients do not vanish; when a gradient "
    "overflows, the scaler passes the update over and halves the scale. A few skips are how it finds it.",
    1 / 3,
    "scaler: torch.amp.GradScaler, which starts at 2^16 and halves; the value is this project's own: a run "
    "that loses more than every third update has not been trained as asked",
)
"""Skips while the scale is searched are the scaler at work; so many after the warm-up are not."""

SKIPS_AT_THE_END = Threshold(
    "skipped at the end",
    "updates skipped in a row at the end",
    "Only an update that is applied after a skip shows that the scaler has found a scale that works.",
    0,
    "this project's own: a run that ends while the scaler is still searching has not shown that it trains",
)
"""Counted from the last step backwards, warm-up steps included."""

NORM_RATIO = Threshold(
    "norm over mean before",
    "gradient norm over the mean of the norms before it",
    "The gradient norm is the length of the whole LoRA gradient; this tells how many times longer it became "
    "than it had been on average, in the step where it stands out most. A spike is beyond this and robust z.",
    8,
    "measure: norm-to-history-mean, arXiv 2606.00539; the value is this project's own: while B leaves zero, "
    "ordinary LoRA runs rise and fall by up to 4",
)
"""Simulated runs of 4 to 20 steps whose norms scatter log-normally with sigma 0.3 and drift by up to 4 exceed
both norm thresholds in fewer than 1 of 1000 runs (tests/test_step_spikes.py). Real runs of SmolLM2-135M
scatter with sigma 0.28 or less."""

ROBUST_Z = Threshold(
    "robust z",
    "robust z of the same norm among the others",
    "How far the norm lies above the median of the other steps, in units of their median distance from it "
    "(MAD), scaled so that 1 is a standard deviation of a normal distribution.",
    14,
    "measure: 0.6745 (n - median) / MAD, Iglewicz and Hoaglin 1993, whose 3.5 is meant for large samples; "
    "four times that is this project's own, for the MAD of a handful of steps can be tiny",
)
"""Counts only together with `NORM_RATIO`: with few steps either alone is exceeded by chance."""

LOSS_RISE = Threshold(
    "loss rise (nats)",
    "rise of the loss above its start (nats)",
    "The start is the mean over the first three steps; one nat more means that the right tokens have become "
    "2.7 times less probable.",
    3,
    "this project's own: 3 nats (20 times less probable), plus three standard errors at 3 nats a token for "
    "the number of loss tokens, and no less than half of the start",
)
"""The base; `bench.judge.step_spikes.loss_rise` adds what depends on the number of tokens. Healthy runs of
SmolLM2-135M on rows of 20 loss tokens rise by nearly 3 nats from one row to the next; with a learning rate
of 0.03 the same model rises by more than 15."""

DEAD_TENSORS = Threshold(
    "dead tensors",
    "LoRA tensors that no gradient moves",
    "A gradient of exactly zero in every measured step trains nothing. A's gradient is exactly zero as long "
    "as B is zero, which it is at the start: that is expected and not counted.",
    0,
    "LoRA starts with B = 0 (arXiv 2106.09685), and grad A is B^T times something; once B has moved, neither "
    "has a reason to be exactly zero",
)
"""Zero to the last bit in all values: a cut graph, an underflow, or an adapter that is never reached."""

DEPTH_GROWTH = math.log(2)
"""Trained models reach a few thousand within their first layers and keep it (massive activations, arXiv
2402.17762), so a short stack may grow fast without being ill: hence the floor of 2**16 in all."""

DEPTH_GROWTH_LAYERS = 16
"""Below so many layers the total growth that is allowed stays that of so many layers."""


def _growth(what: str, order: str) -> Threshold:
    return Threshold(
        f"growth by depth, {what}",
        f"growth of {what} by depth (natural logarithm, per layer)",
        f"ln(last absolute maximum / first) / number of layers, {order}; 0.69 means doubling in every layer.",
        DEPTH_GROWTH,
        "measure: growth exponent of OLMo 2, arXiv 2501.00656, there of norms and here of absolute maxima; "
        "the value is this project's own: doubling in every layer, and below 16 layers 2^16 in all",
    )


ACTIVATION_GROWTH = _growth("activations", "from the first layer to the last")
"""Counts only where as much growth again would leave the range of the dtype."""

GRADIENT_GROWTH = _growth("gradients", "from the last layer, where the gradient sets out, to the first")
"""Gradients that double in every layer leave nothing for the last layers once they are clipped."""

MEASURES = (
    WEIGHTS_NOT_FINITE, NOT_FINITE, NOT_FINITE_INSIDE, FROZEN_NOT_FINITE, SKIP_RATE, SKIPS_AT_THE_END,
    DEAD_TENSORS, NORM_RATIO, ROBUST_Z, LOSS_RISE, ACTIVATION_GROWTH, GRADIENT_GROWTH,
)  # fmt: skip
"""All of them, gravest first: the order in which they are shown."""
