"""The record: one run, everything asked for and everything observed, as one JSON file.

Written by ``bench.record.store``, read by ``bench.judge``. Field names carry their units. Raw values of
each step are kept and statistics are derived, never stored. A value that was not observed is null;
a number that is not finite is the string "NaN", "Infinity" or "-Infinity".

Schema history
    1   first version; fields added since have a null or empty default, which older records get:
        the probe of each step, names of the LoRA tensors, first failure, replay, fidelity, the dial,
        the placement over several devices and ranks, the cache of quantized models, the preflight,
        the proof that the data which was told is the data that was trained on,
        the surroundings of the measured steps, the allocator's retries,
        the environment that a run took place in (older ones: the current), and the digest of its lock,
        the runs that shared the machine, the time for reading the probes
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final, Literal

from bench.ask.plan import RunRequest
from bench.record.environment import Environment
from bench.record.memory import Memory
from bench.record.placement import PlacementFacts
from bench.record.preflight import Preflight
from bench.record.recorded import Bytes, KeptOnce, Recorded, Seconds
from bench.record.stability import Fidelity, FirstFailure, Replay, StepProbe, StressedPair
from bench.record.surroundings import Surroundings

SCHEMA_VERSION: Final = 1

Status = Literal[
    "completed", "out_of_memory", "timeout", "crashed", "error", "unavailable", "interrupted", "skipped"
]
"""``skipped``: not run, because a run that needs no more had run out of memory (``bench.run.skipping``)."""
Stage = Literal["launch", "prepare", "load", "attach", "train", "save"]
class Quantization(Recorded):
    """What the backend really did, seen on the loaded model."""

    kernel: str
    """Class or kernel that computes in training."""
    layers: int
    """Quantized linear layers."""
    weights: int
    """Weights in them."""
    requested_dtype: str
    """Compute dtype that was asked for."""
    effective_dtype: str
    """Compute dtype that the layers really use."""
    storage_bits_per_weight: float
    """Counted from the tensors that the layers hold; biases excluded."""
    expected_bits_per_weight: float
    """By the adapter's arithmetic."""
    options: Mapping[str, Any]
    """Effective options (a group size that does not divide has been replaced)."""
    calibration: str | None = None
    """How a pre-quantized checkpoint was made: "rtn", a calibration method, "published" or "random"."""
    notes: tuple[str, ...] = ()
    """Departures from what was asked, one sentence each."""


class Load(Recorded):
    """The way from nothing to a model ready to train."""

    import_seconds: Seconds
    """Importing torch, transformers and the backend's libraries."""
    prepare_seconds: Seconds | None = None
    """Making a pre-quantized checkpoint, where one was made for this run; not part of the load."""
    kernel_seconds: Seconds | None = None
    """Compiling the backend's kernels, or loading what was compiled before; not part of the load. Null: it
    has none that are made ready ahead."""
    load_seconds: Seconds
    """Reading or drawing, quantizing and placing all weights; without quantizing them where they came from
    the cache."""
    from_cache: bool | None = None
    """Whether the quantized layers were loaded from the cache; null: none was asked for (``--cache``)."""
    quantize_seconds: Seconds | None = None
    """With a cache, the load that quantized: this run's, or that of the run that filled the cache."""
    reload_seconds: Seconds | None = None
    """The load of this run, where it came from the cache."""
    cache_write_seconds: Seconds | None = None
    """Spent on filling the cache, or on a broken one; not part of the load."""
    cache_bytes: Bytes | None = None
    """Of the quantized layers as they are in the cache."""
    attach_seconds: Seconds | None = None
    """Putting the adapters on."""
    host_peak_bytes: Bytes | None
    """Peak resident memory of the process up to the end of the load, filling the cache included."""
    weights_digest: str
    """SHA-256 over the unquantized parameters as placed: equal for every backend, except that AWQ's
    calibration folds its scales into the norms before the layers it scales."""


class LoraFacts(Recorded):
    """The adapters as attached."""

    parameters: int
    """Trainable values in all."""
    tensors: int
    """How many they are."""
    names: KeptOnce[tuple[str, ...]] = ()
    """Of every tensor, in the order in which the steps' probes tell of them."""
    dtype: str
    """Of the adapters' weights."""
    initial_digest: str
    """SHA-256 over names and float32 values of all initial LoRA tensors."""
    shapes_digest: str
    """SHA-256 over names and shapes of all LoRA tensors."""


class WorkloadFacts(Recorded):
    """The work as consumed."""

    source: str
    """Where the text came from."""
    tokenizer: str
    """What made token ids of it."""
    examples: int
    """Conversations that were read."""
    digest: str | None
    """SHA-256 over the ids, labels and masks in the order in which the loop consumed them; of several
    processes, in the order of the stream that they share."""
    tokens: int
    """Non-padding tokens consumed."""
    loss_tokens: int
    """Those that the loss is taken of: the answers."""
    batches_without_targets: int | None = None
    """Micro-batches that held no answer token: passed over, or trained on with ``workload.without_targets``
    "train". Null in records made before they were counted."""
    attention: str
    """Of the model, by the name under which it is asked for."""
    autocast_dtype: str | None
    """Null: the training ran without autocast."""


class Step(Recorded):
    """One optimizer step."""

    index: int
    """From 0."""
    warmup: bool
    """Whether the timing statistics leave the step out."""
    losses: tuple[float, ...]
    """Mean loss per loss token of each micro-batch, raw; those of all processes, in the stream's order."""
    gradient_norm: float
    """Global L2 norm over all LoRA gradients, averaged over the processes, unscaled, before clipping,
    accumulated in float32."""
    learning_rate: float
    seconds: Seconds
    """From before the forward to after the update, without ``watching_seconds``; of the slowest process."""
    watching_seconds: Seconds | None = None
    """For reading the probes, between the backward and the update; their hooks in forward and backward are
    part of ``seconds``. Null in older records, whose ``seconds`` have this in them too."""
    tokens: int
    """Non-padding tokens of all processes."""
    loss_tokens: int
    """Tokens that the loss is a mean over."""
    applied: bool
    """False where the float16 scaler skipped the update."""
    loss_scale: float | None = None
    """Of the float16 scaler in this step; null: there was none."""
    peak_reserved_bytes: Bytes | None = None
    """CUDA: highest over the devices, since the step began."""
    resident_bytes: Bytes | None = None
    """Of the process when the step ended."""
    probe: StepProbe | None = None
    """Null in records made before there was one."""


class Proof(Recorded):
    """What the harness proved on the loaded model before it trained."""

    quantized: bool | None = None
    """Storage bits per weight of every layer within 1 % of the arithmetic."""
    placed: bool | None = None
    """Every parameter and buffer on the device that the placement gives it."""
    gathered: bool | None = None
    """Cut over several processes (``fsdp``): what every layer computes with was the same to the bit when it
    was gathered again as before it was cut."""
    ranks_agree: bool | None = None
    """Of several processes: digests, gradient norms, skipped updates and trained adapters are the same."""
    base_frozen: bool | None = None
    """Whether no parameter but the adapters' can be trained."""
    gradients_reach_adapters: bool | None = None
    """After the first backward every adapter tensor has a gradient, and no B's is zero everywhere (A's is
    zero while B is)."""
    data_consumed: bool | None = None
    """In every step the model's embedding received the token ids whose digest is recorded, and the loop used
    the labels and masks that belong to them. Null in records made before this was proven."""
    first_gradients_finite: bool | None = None
    """Whether those gradients are finite. Not a breach where they are not: it is the run's result."""
    weights_finite: bool | None = None
    """Whether every frozen weight, scale and table was finite as loaded. Not a breach where one was not."""
    non_finite_weights: tuple[str, ...] = ()
    """Those that were not: module, tensor and number of values, one sentence each."""
    breaches: tuple[str, ...] = ()
    """What did not hold, a sentence each."""


class Record(Recorded):
    """One run."""

    schema_version: Literal[1] = SCHEMA_VERSION
    """Of the record's format."""
    key: str
    """Name of the run and of its file: readable, and unique for what the result depends on."""
    command: str
    """The command line that repeats this run."""
    request: RunRequest
    """What was asked for."""
    status: Status
    """How the run ended."""
    stage: Stage | None
    """Where a run that is not completed ended; null for one that was skipped."""
    message: str | None
    """Why, in one line."""
    stderr_tail: str | None = None
    """The last that the worker wrote to its standard error; null where the run completed."""
    exit_code: int | None = None
    """Negative: the number of the signal that ended the worker."""
    started_at: str
    """UTC, ISO 8601."""
    wall_seconds: Seconds
    """Of the whole run, the start of its process included."""
    preflight: Preflight | None = None
    """What was found about the cards before the command's first run; null where it was not on CUDA, and in
    records made before there was one."""
    environment: Environment | None = None
    placement: PlacementFacts | None = None
    """Null in records made before there was a choice: one device."""
    quantization: Quantization | None = None
    load: Load | None = None
    lora: LoraFacts | None = None
    workload: WorkloadFacts | None = None
    memory: Memory = Memory()
    surroundings: Surroundings | None = None
    """Null where no measured step ended, and in records made before anybody looked."""
    shared_machine_with: tuple[str, ...] = ()
    """Keys of the runs of the same command that were on the same machine at the same time; empty: none was,
    as in every command that runs one after another."""
    proof: Proof = Proof()
    steps: tuple[Step, ...] = ()
    trainable_weights_finite: bool | None = None
    """After the last step."""
    first_failure: FirstFailure | None = None
    replay: Replay | None = None
    fidelity: Fidelity | None = None
    stress: tuple[StressedPair, ...] = ()
    """The pairs that ``--stress`` rescaled."""

    @property
    def watching_in_step_seconds(self) -> bool:
        """Whether the time of its steps has the reading of the probes in it, as before it was told apart."""
        return any(step.watching_seconds is None for step in self.steps)

    @property
    def shared_machine(self) -> bool:
        """Whether another run of the same command ran beside it."""
        return bool(self.shared_machine_with)
