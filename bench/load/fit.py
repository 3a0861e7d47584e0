"""Whether a training fits on cards, and up to which sequence length: ``qlora-bench plan``, without torch.

`outlooks` takes requests as ``bench.run.arrange`` plans them and answers for each backend and each set of
cards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

from bench.ask.cards import VISIBLE_SHARE, Cards
from bench.ask.footprint import TIGHT_SHARE, Outlook
from bench.ask.plan import RunRequest
from bench.ask.shapes import Decoder, decoder_of
from bench.load.activations import Work
from bench.load.allowance import ALLOCATOR_SHARE, CONTEXT_BYTES, CUBLAS_BYTES
from bench.load.contract import Backend, PackedBackend
from bench.load.footprint import Plan
from bench.load.registry import find_backends
from bench.load.sized import SizedModel, layer_shapes

LENGTH_STEP = 64
"""Lengths are searched in multiples of this: kernels and allocators round to powers of two anyway."""
LONGEST = 1_048_576
"""Tokens that are tried where a model names no limit of its own: the most that a workload can ask for."""
ASSUMPTIONS = (
    "Computed, not measured: nothing was loaded or run.",
    "One process; decoder layers are split over the cards by the bytes of each card's peak, the embedding on "
    "the first card, the head and the logits on the last. One card works at a time.",
    "A step from the second on, when the optimizer's state exists. Loading holds one linear layer more at a "
    "time, dense and with its quantizer's temporaries, which is not counted.",
    f"The allowance is {CONTEXT_BYTES / 2**30:.2f} GiB for the CUDA context, {CUBLAS_BYTES / 2**20:.0f} MiB "
    f"for cuBLAS and {100 * ALLOCATOR_SHARE:.1f} % for what the allocator cannot use, from "
    f"out-of-memory messages; tight: fits with less than {100 * TIGHT_SHARE:.0f} % to spare, which "
    "fragmentation took in one of them. Until a card is full, nvidia-smi shows more than this.",
    f"GB is the size on the box, of which CUDA sees {100 * VISIBLE_SHARE:.0f} %; GiB is what CUDA reports.",
)
"""What stands beside every plan."""
PADDED = (
    "gptq, awq: as packed here; a published checkpoint may pad its layers and hold more (Qwen2-72B's: 29696 "
    "for 29568 channels, +0.4 %)."
)


def outlooks(requests: Iterable[RunRequest], cards: Sequence[Cards]) -> list[Outlook]:
    """For each set of cards, each request's backend. Raises UserError for a model of unknown shape."""
    requests = list(requests)
    return [_outlook(request, each) for each in cards for request in requests]


def assumptions(requests: Iterable[RunRequest]) -> tuple[str, ...]:
    """What the plan of these requests assumes, one sentence or two each."""
    entries = find_backends()
    packed = any(issubclass(entries[request.backend].backend, PackedBackend) for request in requests)
    return (*ASSUMPTIONS, PADDED) if packed else ASSUMPTIONS


def work_of(request: RunRequest, backend: Backend, width: int, length: int) -> Work:
    """The work of a request at another sequence length. ``width``: bytes of the compute dtype."""
    return Work(
        rows=request.workload.micro_batch_size,
        length=length,
        width=width,
        attention=request.attention,
        masked=request.workload.padding != "packed",
        lora=request.lora,
        casts_input=backend.adapter_casts_input,
        checkpointed=request.checkpointing != "none",
        accumulated=request.workload.gradient_accumulation_steps > 1,
    )


def longest_fitting(fits: Callable[[int], bool], length: int, limit: int) -> int | None:
    """The largest multiple of LENGTH_STEP up to ``limit`` that fits, by bisection; None: not even the first.

    ``length``: what was asked about, where the search begins, so that its answer agrees with this one even if
    a kernel needs less for longer rows (as AWQ's does from 1025 tokens on).
    """
    steps = limit // LENGTH_STEP
    low, high = (length // LENGTH_STEP, steps) if fits(length) else (0, min(length // LENGTH_STEP, steps))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle * LENGTH_STEP) else (low, middle - 1)
    return low * LENGTH_STEP or None


def _outlook(request: RunRequest, cards: Cards) -> Outlook:
    decoder, length = decoder_of(request.model.architecture), request.workload.sequence_length
    limit = max(decoder.context or LONGEST, length, LENGTH_STEP) // LENGTH_STEP * LENGTH_STEP
    try:
        backend = _fitted(request, decoder)
    except ValueError as error:
        return Outlook(request.backend, cards, request.dtype, length, reason=str(error))
    model = SizedModel.of(decoder, backend)

    def plan(tokens: int) -> Plan:
        return Plan(model, work_of(request, backend, model.width, tokens))

    longest = longest_fitting(
        lambda tokens: plan(tokens).fits(cards.count, cards.capacity_bytes), length, limit
    )
    return Outlook(
        request.backend,
        cards,
        backend.dtype,
        length,
        footprint=plan(length).split(cards.count),
        longest=longest,
        longest_is_limit=longest == limit,
        notes=tuple(backend.notes),
    )


def _fitted(request: RunRequest, decoder: Decoder) -> Backend:
    """The backend as it would train on a card. Its libraries need not be installed here."""
    entry = find_backends()[request.backend]
    backend = entry.backend(entry.options(request.options), "cuda", request.dtype)
    backend.fit(list(layer_shapes(decoder).values()))
    return backend
