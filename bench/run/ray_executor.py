"""The runs of a sweep as tasks of a Ray cluster: one that is there, or one started for this command.

    with RayExecutor("10.0.0.1:6379", Needs(gpus=1)) as executor:
        for record in executor.run(jobs): ...

Ray places every run on a node with room for it and starts it again elsewhere when its node dies. The command
itself keeps as many runs under way as the cluster has room for, hears their events through a queue, and alone
saves records. ``bench.run.ray_task`` is what happens on a node.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from bench.ask.plan import RunRequest
from bench.errors import UserError
from bench.record.schema import Record
from bench.run.cluster import connect, first_line, no_room_message, resources_of, room_for
from bench.run.executors import Job, Needs
from bench.run.listening import Listener
from bench.run.neighbours import Neighbours
from bench.run.ray_task import Home, Outcome, interrupted, run_there
from bench.run.sweep import not_started

MOST_RETRIES = 3
"""A run whose node died is started again so often. What kills a fourth node is likely the run itself."""
LOOK_SECONDS = 0.5
"""Between two looks at the messages."""
ROOMLESS_SECONDS = 120.0
"""So long is waited for a node with room for a run, once the last such node is gone."""
CANCEL_SECONDS = 30.0
"""For tasks to end their workers: asked to end, a worker has 5 s until it is killed."""


class RayExecutor:
    """See the module. Nothing is reached for before it is entered."""

    examines_cards = True

    def __init__(self, address: str | None, needs: Needs, *, preflight: bool = True) -> None:
        """``address``: HOST:PORT or "auto"; None: a cluster of this machine alone is started."""
        self._address = address
        self._needs = needs
        self._preflight = preflight
        self._queue: Any = None
        self._listeners: dict[str, Listener] = {}
        self._neighbours = Neighbours()
        self._interrupted: dict[str, Record] = {}
        self._seen: dict[str, str] = {}
        """Preflights as JSON, by the cards they are of."""
        self._roomless_since: float | None = None

    def __enter__(self) -> Self:
        """Raises UserError where there is no cluster."""
        import ray
        from ray.util.queue import Queue
        from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

        connect(self._address)
        # On this node, for it must not die with another.
        here = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        self._queue = Queue(actor_options={"num_cpus": 0, "scheduling_strategy": here})
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        import ray

        ray.shutdown()

    def refuse(self, requests: Iterable[RunRequest]) -> None:
        """See ``bench.run.executors.Executor.refuse``."""
        nodes = _nodes()
        for request in requests:
            needed = resources_of(request, self._needs)
            if not room_for(needed, nodes):
                raise UserError(no_room_message(needed, nodes), "take less with --cpus-per-run and the like")

    def run(self, jobs: Iterator[Job | Record]) -> Iterator[Record]:
        """See ``bench.run.executors.Executor.run``."""
        import ray

        under_way: dict[Any, Job] = {}
        room = 1
        try:
            while True:
                while len(under_way) < room and (job := next(jobs, None)) is not None:
                    if isinstance(job, Record):
                        yield job
                        continue
                    room = self._room_for(job.request)
                    under_way[self._start(job)] = job
                if not under_way:
                    return
                done, _ = ray.wait(list(under_way), timeout=LOOK_SECONDS)
                self._hear()
                for task in done:
                    yield self._ended(under_way.pop(task), task)
                if under_way:
                    room = self._room_for(next(iter(under_way.values())).request)
                    yield from self._given_up(under_way)
        except KeyboardInterrupt:
            stopped = dict(under_way)
            under_way.clear()  # a second Ctrl-C does not wait again
            raise KeyboardInterrupt(*self._cancel(stopped)) from None
        finally:
            self._cancel(under_way)

    # ---- one run -------------------------------------------------------------------------------------

    def _start(self, job: Job) -> Any:
        import ray

        request = job.request
        resources = resources_of(request, self._needs)
        task = ray.remote(run_there).options(
            num_cpus=resources["CPU"],
            num_gpus=resources["GPU"],
            memory=resources["memory"] or None,
            max_retries=MOST_RETRIES,
            scheduling_strategy="SPREAD",
            name=request.key,
        )
        home = Home(
            folder=Path.cwd(),
            omp_num_threads=os.environ.get("OMP_NUM_THREADS"),
            preflight=self._preflight,
        )
        order = job.order()
        self._listeners[request.key] = job.listener()
        return task.remote(order.model_dump_json(), home.model_dump_json(), self._queue, dict(self._seen))

    def _ended(self, job: Job, task: Any) -> Record:
        """The record of a task that is over, whatever became of it."""
        self._listeners.pop(job.request.key, None)
        return self._beside(job, self._returned(task, job.request))

    def _returned(self, task: Any, request: RunRequest) -> Record:
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            outcome = Outcome.model_validate_json(ray.get(task))
        except RayTaskError as error:
            why = _last_line(error)
            return not_started(request, "error", f"the task of the run failed on its node: {why}")
        except RayError as error:
            why = f"the node of the run died, or Ray's process on it, {MOST_RETRIES + 1} times"
            return not_started(request, "crashed", f"{why}: {first_line(error)}")
        if outcome.record.preflight is not None:
            self._seen[outcome.cards] = outcome.record.preflight.model_dump_json()
        return outcome.record

    def _hear(self) -> None:
        """Take the messages of the runs."""
        from ray.exceptions import RayError
        from ray.util.queue import Empty

        messages: list[Any] = []
        with contextlib.suppress(RayError, Empty):
            count = self._queue.qsize()
            messages = self._queue.get_nowait_batch(count) if count else []
        for key, kind, content in messages:
            if kind == "began":
                self._neighbours.began(key, content)
            elif kind == "interrupted":
                self._interrupted[key] = Record.model_validate_json(content)
            elif key in self._listeners:
                # As in bench.run.listening: what is of another shape ends neither the run nor its display.
                with contextlib.suppress(KeyError, TypeError, ValueError, AttributeError):
                    self._listeners[key](content)

    # ---- room, and the end of it ---------------------------------------------------------------------

    def _room_for(self, request: RunRequest) -> int:
        """How many runs like ``request`` the cluster has room for; 1 at least, which then waits."""
        room = room_for(resources_of(request, self._needs), _nodes())
        if room:
            self._roomless_since = None
        elif self._roomless_since is None:
            self._roomless_since = time.monotonic()
        return max(1, room)

    def _given_up(self, under_way: dict[Any, Job]) -> Iterator[Record]:
        """Records of all runs under way, where no node that could have one has been there for long."""
        since = self._roomless_since
        if since is None or time.monotonic() - since < ROOMLESS_SECONDS:
            return
        lost = dict(under_way)
        under_way.clear()
        self._cancel(lost)
        for job in lost.values():
            yield not_started(job.request, "crashed", "no node with room for the run is left in the cluster")

    def _cancel(self, under_way: Mapping[Any, Job]) -> list[Record]:
        """Have all workers stopped. Returns the records of the runs that had begun."""
        import ray
        from ray.exceptions import RayError

        if not under_way:
            return []
        for task in under_way:
            with contextlib.suppress(RayError):
                ray.cancel(task)
        with contextlib.suppress(RayError):
            ray.wait(list(under_way), num_returns=len(under_way), timeout=CANCEL_SECONDS)
        self._hear()
        found = ((job, self._stopped(job, task)) for task, job in under_way.items())
        return [self._beside(job, record) for job, record in found if record is not None]

    def _stopped(self, job: Job, task: Any) -> Record | None:
        """The record of a run that was stopped, or had just ended; None: it had not begun."""
        import ray
        from ray.exceptions import RayError

        with contextlib.suppress(RayError):  # it was cancelled, or is not over
            return Outcome.model_validate_json(ray.get(task, timeout=0)).record
        if (told := self._interrupted.get(job.request.key)) is not None:
            return told
        return interrupted(job.order()) if self._neighbours.has_begun(job.request.key) else None

    def _beside(self, job: Job, record: Record) -> Record:
        """The record of a run that is over, with those that ran beside it."""
        return record.model_copy(update={"shared_machine_with": self._neighbours.ended(job.request.key)})


def _nodes() -> list[Mapping[str, float]]:
    """What every node of the cluster has."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def _last_line(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()[-1:]), type(error).__name__)
