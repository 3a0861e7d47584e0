"""One of several processes that train one model together: ``--placement ddp`` and ``fsdp``, inside a worker.

    rank = Rank.of_environment()            # as the launcher has set it
    rank.join(request)
    reader = SharedReader(workload, encoder, rank)
    trainer.tie = tie(adapters, request)

What the processes do together equals what one process does alone with as many times the accumulation: of the
same stream of micro-batches each takes its turn, and gradients are averaged over the ranks, as accumulation
averages them over micro-batches (tests/test_ddp.py).
"""

from __future__ import annotations

import hashlib
import os
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import Protocol

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from bench.ask.experiment import Workload
from bench.ask.plan import RunRequest
from bench.load.lora import Adapters
from bench.run.workload import Batch, Encoder, WorkloadReader

LONGEST_WAIT_SECONDS = 1800.0
"""For the others in one collective operation. Loading and quantizing take each rank another while, and the
run's own limit ends what hangs before."""


@dataclass(frozen=True)
class Rank:
    """This process among those of its run."""

    index: int
    count: int
    local: int
    """Number of its device on this machine."""

    @classmethod
    def of_environment(cls) -> Rank:
        """As torchrun has set it."""
        index, count, local = (int(os.environ[name]) for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK"))
        return cls(index, count, local)

    def join(self, request: RunRequest) -> str:
        """Wait for the other ranks, and return what they communicate through: "nccl" or "gloo"."""
        wait = timedelta(seconds=min(request.timeout_seconds, LONGEST_WAIT_SECONDS))
        if request.device == "cuda":
            device = torch.device("cuda", self.local)
            torch.cuda.set_device(device)
            dist.init_process_group("nccl", timeout=wait, device_id=device)
        else:
            dist.init_process_group("gloo", timeout=wait)
        return str(dist.get_backend())

    def leave(self) -> None:
        """Wait until the others are done too, and take leave."""
        dist.barrier()
        dist.destroy_process_group()


class SharedReader(WorkloadReader):
    """Every rank reads the whole stream and trains on every ``count``-th micro-batch of it.

    Its totals and its digest are those of the stream, the same on every rank and in one process alone.
    """

    def __init__(self, workload: Workload, encoder: Encoder, rank: Rank) -> None:
        super().__init__(workload, encoder)
        self._rank = rank
        self._share = hashlib.sha256()

    @property
    def share_digest(self) -> str:
        """SHA-256 over the batches that this rank consumed, as `WorkloadReader.digest` is over all."""
        return self._share.hexdigest()

    def next_batch(self) -> Batch:
        """This rank's micro-batch among the next ``count`` of the stream."""
        drawn = [super(SharedReader, self).next_batch() for _ in range(self._rank.count)]
        own = drawn[self._rank.index]
        own.add_to(self._share)
        return own


class Tie(Protocol):
    """What makes one training of several."""

    model: nn.Module
    """What is called instead of the model."""

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """Around the forward and backward of one micro-batch of an accumulation."""

    def average(self) -> None:
        """After the last backward: every gradient is the mean over the ranks."""


class DataParallel:
    """DDP: gradients are averaged while the last backward computes."""

    def __init__(self, adapters: Adapters) -> None:
        # Every adapter takes part in every forward, so none has to be looked for; static_graph would forbid
        # no_sync. Both modes of checkpointing keep to one backward for each parameter. Frozen weights and
        # initial adapters are the same by construction (the record holds the digests of all ranks to each
        # other), and DDP's own way to see to that would send every frozen byte once over.
        self.model: nn.Module = DistributedDataParallel(
            adapters.model,
            init_sync=False,
            broadcast_buffers=False,
            find_unused_parameters=False,
            static_graph=False,
        )

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """Gradients stay here until the last."""
        ddp: DistributedDataParallel = self.model  # type: ignore[assignment]
        return nullcontext() if last else ddp.no_sync()

    def average(self) -> None:
        """Done by the backward."""


class ShardedParallel:
    """FSDP cuts the frozen weights only (``bench.run.sharding``). The adapters are whole on every rank, since
    they are small and float32 among weights that are not, and their gradients are averaged at once."""

    def __init__(self, adapters: Adapters) -> None:
        self.model = adapters.model
        self._parameters = list(adapters.tensors.values())

    def micro_batch(self, *, last: bool) -> AbstractContextManager[object]:
        """Nothing is exchanged but weights."""
        return nullcontext()

    def average(self) -> None:
        """One all-reduce over all gradients, dtype by dtype."""
        by_dtype: dict[torch.dtype, list[torch.Tensor]] = {}
        for parameter in self._parameters:
            if parameter.grad is not None:
                by_dtype.setdefault(parameter.grad.dtype, []).append(parameter.grad)
        for gradients in by_dtype.values():
            flat = torch.cat([gradient.reshape(-1) for gradient in gradients])
            dist.all_reduce(flat)
            flat /= dist.get_world_size()
            means = torch.split(flat, [gradient.numel() for gradient in gradients])
            for gradient, mean in zip(gradients, means, strict=True):
                gradient.copy_(mean.view_as(gradient))


def tie(adapters: Adapters, request: RunRequest) -> Tie:
    """What ties the ranks of a request together."""
    return ShardedParallel(adapters) if request.placement == "fsdp" else DataParallel(adapters)
