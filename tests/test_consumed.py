"""The ids that a model's embedding received have the digest that the reader told, or it shows."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from bench.run.consumed import Consumed
from bench.run.workload import Batch


class Toy(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, 4)

    def get_input_embeddings(self) -> nn.Module:
        return self.embedding

    def forward(self, ids: torch.Tensor) -> torch.Tensor:
        return self.embedding(ids).sum()


def batches(count: int) -> Iterator[Batch]:
    for index in range(count):
        ids = (torch.arange(24, dtype=torch.int64) * (index + 3) % 50).reshape(2, 12)
        yield Batch(ids, ids.clone(), torch.ones_like(ids))


def digest(work: list[Batch]) -> str:
    told = hashlib.sha256()
    for batch in work:
        batch.add_to(told)
    return told.hexdigest()


def seen(change: Callable[[Toy, list[Batch]], None] = lambda toy, work: None) -> tuple[str, str]:
    """Two steps of two micro-batches, after a look that belongs to no step. Told and received."""
    toy, work = Toy(), list(batches(4))
    consumed = Consumed(toy)
    change(toy, work)
    told = digest(list(batches(4)))
    for step in (work[:2], work[2:]):
        toy(work[0].input_ids)
        consumed.begin()
        for batch in step:
            toy(batch.input_ids)
        consumed.count(step)
    consumed.remove()
    toy(work[0].input_ids)
    return told, consumed.digest


def test_what_reached_the_model_is_what_was_told() -> None:
    told, received = seen()
    assert told == received


def _other_batch(toy: Toy, work: list[Batch]) -> None:
    work[1] = work[0]


def _other_labels(toy: Toy, work: list[Batch]) -> None:
    work[3].labels[0, 0] += 1


def _other_mask(toy: Toy, work: list[Batch]) -> None:
    work[3].attention_mask[1, 11] = 0


def _fewer(toy: Toy, work: list[Batch]) -> None:
    forward = toy.forward
    toy.forward = lambda ids: forward(ids) if int(ids[0, 1]) != 4 else ids.sum()  # type: ignore[method-assign]


@pytest.mark.parametrize("change", [_other_batch, _other_labels, _other_mask, _fewer])
def test_one_micro_batch_is_enough_to_show(change: Callable[[Toy, list[Batch]], None]) -> None:
    told, received = seen(change)
    assert told != received


def test_ids_that_change_on_their_way_show() -> None:
    toy, (batch,) = Toy(), batches(1)
    handle = nn.modules.module.register_module_forward_pre_hook(
        lambda module, inputs: (inputs[0].flip(1),) if isinstance(module, nn.Embedding) else None
    )
    try:
        consumed = Consumed(toy)
        consumed.begin()
        toy(batch.input_ids)
        consumed.count([batch])
    finally:
        handle.remove()
    assert consumed.digest != digest([batch])
    assert consumed.digest == digest([Batch(batch.input_ids.flip(1), batch.labels, batch.attention_mask)])
