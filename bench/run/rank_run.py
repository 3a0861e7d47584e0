"""The stages of a run in one of several processes: those of one process, and what the ranks do together.

Started by torchrun, through ``bench.run.worker`` and its parent's ``bench.run.torchrun``. Each rank tells
what it sees; the parent makes one record of it (``bench.run.ranks``).
"""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.record.stability import Fidelity
from bench.run.depths import DepthRun
from bench.run.events import Channel
from bench.run.ranks import LINGER_SECONDS
from bench.run.torchrun import pipe_of, threads_of

if TYPE_CHECKING:
    from bench.load.lora import Adapters
    from bench.probe.memory import MemoryProbe
    from bench.run.building import Builder
    from bench.run.distributed import Tie
    from bench.run.loading import Loaded
    from bench.run.training import Trainer

NOT_COMPARED = "not compared: gradients are compared with a reference's in runs of one process"


class RankChannel(Channel):
    """The writing end of a rank's named pipe. Outcomes carry the time, so that the first can be told."""

    def __init__(self, folder: Path) -> None:
        path = pipe_of(folder, int(os.environ["RANK"]))
        # Without O_NONBLOCK this would wait for ever for a parent that is gone already.
        descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        os.set_blocking(descriptor, True)
        super().__init__(descriptor)
        self.send("rank", pid=os.getpid())

    def send(self, event: str, **content: Any) -> None:
        """As `Channel`."""
        if event == "outcome":
            content["at"] = time.monotonic()
        super().send(event, **content)


class RankRun(DepthRun):
    """One rank's part of a run."""

    def _import_libraries(self) -> None:
        super()._import_libraries()
        import torch

        from bench.run.distributed import Rank

        self.rank = Rank.of_environment()
        torch.set_num_threads(threads_of(self.request.cpu_threads, self.rank.count))

    def _load(self, builder: Builder, probe: MemoryProbe, import_seconds: float) -> Loaded:
        self.telling.communication = self.rank.join(self.request)
        loaded = super()._load(builder, probe, import_seconds)
        self.telling.cut = getattr(builder, "cut", None)
        self._prove_gathered()
        return loaded

    def _prove_gathered(self) -> None:
        """Of a model that is cut: what its layers compute with is what was cut. Every rank must ask."""
        if self.telling.cut is not None:
            self.telling.prove(gathered=self.telling.cut.damaged())

    def _builder(self) -> Builder:
        from bench.run.sharding import ShardingBuilder

        if self.request.placement == "fsdp":
            return ShardingBuilder(self.order, self.channel, self.watched)
        return super()._builder()

    def tie(self, adapters: Adapters) -> Tie:
        """What averages the gradients."""
        from bench.run.distributed import tie

        return tie(adapters, self.request)

    def take_leave(self, trainer: Trainer) -> bool:
        """The ranks part. A failure is not replayed, and nothing is compared with a reference: both are made
        for a model in one process."""
        from bench.load.lora import tensors_digest

        self._prove_gathered()
        self.channel.send(
            "share",
            workload_digest=trainer.reader.share_digest,
            adapters_digest=tensors_digest(trainer.adapters.tensors),
        )
        if self.request.fidelity:
            self.channel.section("fidelity", Fidelity(note=NOT_COMPARED))
        self.rank.leave()
        self.channel.send("outcome", status="completed", message=None)
        return True


def end_after_error() -> None:
    """End this process without the libraries' farewells, which may wait for ranks that will never come."""
    # By then its parent has heard of the error, and whatever ends because of it ends later.
    time.sleep(LINGER_SECONDS)
    os._exit(1)
