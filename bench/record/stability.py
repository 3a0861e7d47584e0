"""The parts of a record that say how the gradients fared: the probe, the first failure, the replay, the
fidelity to a reference, and the dial.

Absolute maxima are those of the values as the device held them, non-finite ones included: a layer whose
output held an infinity reads "Infinity" there. Headroom in bits is derived from them and from the compute
dtype (``bench.judge.headroom``), never stored.
"""

from __future__ import annotations

from typing import Literal

from bench.record.recorded import KeptOnce, Recorded

FailureKind = Literal[
    "forward_overflow",
    "forward_invalid",
    "backward_overflow",
    "backward_invalid",
    "broken_weights",
    "bad_batch",
    "poisoned_weights",
    "optimizer_step",
]
"""``overflow``: a finite input gave an infinity; ``invalid``: it gave a NaN straight away (a softmax over a
row that is masked altogether, 0/0). ``broken_weights``: the frozen weights or their scales were not finite
before anything was computed. ``poisoned_weights``: the trainable weights were not, before the step."""

FailurePhase = Literal["forward", "backward", "optimizer"]


class StepProbe(Recorded):
    """What the probe saw in one step. Layers stand in their order, tensors in that of `LoraFacts.names`."""

    activation_abs_max: tuple[float | None, ...]
    """Per decoder layer, forward, over all micro-batches: the largest absolute value among the layer's
    output, the outputs of its linear projections, and what enters o_proj and down_proj."""
    gradient_abs_max: tuple[float | None, ...]
    """Per decoder layer, backward: of the gradient at the layer's output, the loss scale included, as the
    compute dtype had to hold it. Null: no gradient passed there."""
    tensor_norms: tuple[float | None, ...]
    """L2 norm of each LoRA tensor's gradient, unscaled, before clipping, in float32."""
    non_finite_values: KeptOnce[tuple[int | None, ...]]
    """Values of each LoRA tensor's gradient that are NaN or infinite."""
    zero_values: KeptOnce[tuple[int | None, ...]]
    """Values that are exactly zero. All of an A's are while its B is zero: that is no alarm."""


class FirstFailure(Recorded):
    """Where something that is not finite was seen first in a run, and the evidence."""

    kind: FailureKind
    """What kind of value it was, and where it came from."""
    step: int
    """Index of the optimizer step, from 0."""
    micro_batch: int | None
    """Null in the optimizer phase, which has none."""
    phase: FailurePhase
    module: str | None
    """Full path of the module; null where the failure belongs to none (a batch)."""
    tensor: str
    """Which of its tensors: "output", "input", "gradient of the output", a weight or a LoRA tensor."""
    device: str
    """On which it was seen."""
    rank: int | None = None
    """Of the process that saw it in its own values, where a run has several; micro-batches are then counted
    as in `Step.losses`."""
    value: float | None
    """NaN or an infinity; null where the fault is no number (an id outside the vocabulary)."""
    last_finite_abs_max: float | None
    """The largest absolute value at that place in the last micro-batch before in which it was finite."""
    history_abs_max: tuple[float, ...] = ()
    """At that place, one value a micro-batch, oldest first, up to the failure: at most 64."""
    dtype_max: float | None
    """Largest finite number of the tensor's dtype there."""
    loss: float | None
    """Raw loss of the micro-batch."""
    loss_scale: float | None = None
    """Of the float16 scaler in this step; null: there was none."""
    skipped_by_scaler: bool = False
    """The float16 scaler passed the update over, so the trained weights were spared."""
    evidence: str
    """In one sentence."""

    @property
    def growth(self) -> float | None:
        """Last over first of the finite maxima before the failure; None: fewer than two were seen."""
        if len(self.history_abs_max) < 2 or not self.history_abs_max[0]:
            return None
        return self.history_abs_max[-1] / self.history_abs_max[0]


class Remedy(Recorded):
    """The failing micro-batch once more with one thing changed."""

    change: Literal["float32_adapters", "attention", "bfloat16", "float32"]
    """What was changed."""
    detail: str
    """What exactly was changed to what."""
    heals: bool | None
    """Whether loss and gradients are finite now. Null: it could not be tried, see ``error``."""
    loss: float | None = None
    """Of the micro-batch with it."""
    gradient_norm: float | None = None
    """Global L2 norm over the gradients of the micro-batch, unscaled."""
    abs_max_there: float | None = None
    """The largest absolute value at the place of the failure under this change."""
    error: str | None = None
    """Why it could not be tried."""


class Replay(Recorded):
    """The first failing micro-batch again, from the same weights and random state, watched closely."""

    reproduced: bool
    """Whether the same kind of value appeared again."""
    phase: FailurePhase | None = None
    module: str | None = None
    """Full path of the module."""
    operation: str | None = None
    """The operation whose inputs were finite and whose output was not, as torch names it."""
    description: str | None = None
    """The same in words."""
    value: float | None = None
    """What appeared: NaN or an infinity."""
    input_abs_max: float | None = None
    """Largest absolute value among the operation's inputs."""
    remedies: tuple[Remedy, ...] = ()
    """In the order in which they were tried."""
    error: str | None = None
    """Why the replay did not come to its end."""


class LayerFidelity(Recorded):
    """The LoRA gradient of one decoder layer (or of all) beside the reference's."""

    cosine: float | None
    """Null where a norm is zero."""
    norm_ratio: float | None
    """Norm over the reference's norm."""
    relative_error: float | None
    """Norm of the difference over the reference's norm."""


class WeightError(Recorded):
    """How far the weights of one kind of projection are from the dense ones, over all layers."""

    projection: str
    """The last part of the layers' names."""
    relative_error: float
    """Frobenius norm of the difference over that of the dense weights (LoftQ, arXiv 2310.08659)."""
    worst_module: str
    """The layer that is furthest off."""
    worst_relative_error: float
    """Its error."""


class Fidelity(Recorded):
    """The LoRA gradient on one fixed batch, from fixed adapters with a non-zero B, beside a reference's."""

    reference_dtype: str | None = None
    """Dtype of the unquantized reference; null: there was none, see ``note``."""
    batch_digest: str | None = None
    """SHA-256 over the ids, labels and masks of the batch."""
    loss: float | None = None
    """Of this backend on it."""
    reference_loss: float | None = None
    """Of the reference."""
    overall: LayerFidelity | None = None
    """Over all layers."""
    layers: tuple[LayerFidelity, ...] = ()
    """In order."""
    weight_errors: tuple[WeightError, ...] = ()
    """One for each kind of projection."""
    note: str | None = None
    """What could not be compared, and why."""


class StressedPair(Recorded):
    """Two linear layers of which one was multiplied by a factor and the other divided by it."""

    scaled: str
    """Full name of the layer that was multiplied."""
    compensated: str
    """Full name of the one that was divided."""
    factor: float
    """By which."""
    float32_difference: float | None
    """Largest difference, in float32, of what the pair's decoder layer computes on random input with and
    without the factor, relative to the largest value that it adds: the proof that the function is the same.
    Of the dense weights: scales that a backend stores in float16, or clamps, may lose what the factor needs.
    Null: the checkpoint is published quantized, and there are no dense weights to prove it on."""
