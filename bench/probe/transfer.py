"""How data gets from one card to another with torch, and what keeps cards busy meanwhile.

`TorchTransfer` is the `Transfer` of ``bench.probe.peer_copy``. On places of a CPU it does the same without
streams, which is what the tests run.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence

import psutil
import torch

from bench.load.layout import Place

PRODUCT_SIZE = 2048
"""Rows and columns of the matrices that keep a card busy: three of them take 24 MiB in float16."""
OPPOSING_BYTES = 32 * 2**20
ENQUEUED = 8
"""Products or copies between two waits: enough that a card never runs dry, few enough to stop at once."""
START_SECONDS = 60.0
"""Within this time the load must have begun."""


class TorchTransfer:
    """Copies as a training makes them: ``Tensor.copy_`` between devices."""

    def __init__(self, product_size: int = PRODUCT_SIZE, opposing_bytes: int = OPPOSING_BYTES) -> None:
        self._product_size = product_size
        self._opposing_bytes = opposing_bytes
        self._streams: dict[tuple[str, Place], torch.cuda.Stream] = {}

    def copy(self, data: torch.Tensor, into: torch.Tensor, source: Place, target: Place) -> None:
        """Straight from one to the other, on the present streams of both."""
        into.copy_(data, non_blocking=True)

    def host_memory(self, size: int, source: Place, *, pinned: bool) -> torch.Tensor:
        """uint8 [size], its pages touched."""
        return torch.empty(
            size, dtype=torch.uint8, pin_memory=pinned and source.device.type == "cuda"
        ).zero_()

    def stage(self, data: torch.Tensor, into: torch.Tensor, source: Place) -> None:
        """Waits until it is there."""
        into.copy_(data)

    def place(self, data: torch.Tensor, target: Place) -> torch.Tensor:
        """uint8 [n] on the target, never the same memory."""
        return torch.empty(data.shape, dtype=data.dtype, device=target.device).copy_(data)

    def wait(self, places: Sequence[Place]) -> None:
        """Until the present stream of each place has nothing left to do."""
        for place in places:
            if place.device.type == "cuda":
                torch.cuda.current_stream(place.device).synchronize()

    def free_bytes(self, place: Place) -> int:
        """As the driver tells it, once torch has given back what it kept."""
        if place.device.type == "cuda":
            torch.cuda.empty_cache()
            return torch.cuda.mem_get_info(place.device)[0]
        return int(psutil.virtual_memory().available)

    def streams(self, places: Sequence[Place]) -> contextlib.AbstractContextManager[None]:
        """Streams besides the default ones, once what the present ones do is finished."""
        return self._on("copy", places)

    @contextlib.contextmanager
    def _on(self, purpose: str, places: Sequence[Place]) -> Iterator[None]:
        """One stream a place for each purpose. They are kept, because torch keeps memory for each of them."""
        self.wait(places)
        with contextlib.ExitStack() as stack:
            for place in places:
                if place.device.type == "cuda":
                    if (purpose, place) not in self._streams:
                        self._streams[purpose, place] = _new_stream(place)
                    stack.enter_context(torch.cuda.stream(self._streams[purpose, place]))
            yield
            self.wait(places)

    @contextlib.contextmanager
    def busy(self, places: Sequence[Place]) -> Iterator[list[str]]:
        """Threads that keep every place at work, each on streams of its own, until the block ends."""
        troubles: list[str] = []
        stop = threading.Event()
        works: list[Callable[[Callable[[], None]], None]] = [
            lambda began, place=place: self._multiply(place, stop, began)  # type: ignore[misc]
            for place in places
        ]
        if len(places) > 1:
            works.append(lambda began: self._oppose(places[-1], places[0], stop, began))
        loads = [_Load(work, troubles) for work in works]
        try:
            for load in loads:
                load.start()
            yield troubles
        finally:
            stop.set()
            for load in loads:
                load.join()

    def _multiply(self, place: Place, stop: threading.Event, began: Callable[[], None]) -> None:
        with self._on("multiply", [place]):
            size = self._product_size
            one, other = (torch.randn(size, size, device=place.device).half() for _ in range(2))
            product = torch.empty_like(one)
            while not stop.is_set():
                for _ in range(ENQUEUED):
                    torch.mm(one, other, out=product)
                self.wait([place])
                began()

    def _oppose(self, source: Place, target: Place, stop: threading.Event, began: Callable[[], None]) -> None:
        with self._on("oppose", [source, target]):
            data = torch.zeros(self._opposing_bytes, dtype=torch.uint8, device=source.device)
            into = torch.empty_like(data, device=target.device)
            while not stop.is_set():
                for _ in range(ENQUEUED):
                    self.copy(data, into, source, target)
                self.wait([source, target])
                began()


class _Load:
    """One thread of work. What it raises becomes a sentence, not an end of the check."""

    def __init__(self, work: Callable[[Callable[[], None]], None], troubles: list[str]) -> None:
        self._work, self._troubles = work, troubles
        self._began = threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def start(self) -> None:
        """Begin, and return once the first work is done."""
        self._thread.start()
        if not self._began.wait(START_SECONDS):
            self._troubles.append(f"it did not begin within {START_SECONDS:g} s")

    def join(self) -> None:
        """Wait for the end."""
        self._thread.join(START_SECONDS)

    def _run(self) -> None:
        try:
            self._work(self._began.set)
        except Exception as error:  # noqa: BLE001 - the copies are checked without this load then
            self._troubles.append(" ".join(f"{type(error).__name__}: {error}".split())[:300])
        finally:
            self._began.set()


def _new_stream(place: Place) -> torch.cuda.Stream:
    return torch.cuda.Stream(place.device)  # type: ignore[no-untyped-call]
