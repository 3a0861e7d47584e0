"""The child: one run in one fresh process, telling its parent everything as it happens.

    python -m bench.run.worker ORDER.json DESCRIPTOR [--prepare | --reference | --depths | --bare |
                                                      --preflight]

Started by ``bench.run.launch``. The order of what follows matters: the environment is settled before
torch is imported, unneeded quantization libraries are hidden before transformers and PEFT are.
"""

from __future__ import annotations

import contextlib
import errno
import os
import sys
import threading
import traceback
from collections.abc import Callable
from pathlib import Path

from bench.load.registry import foreign_libraries, get_backend
from bench.run.bare import BareRun
from bench.run.card_checks import examine
from bench.run.depths import DepthRun
from bench.run.events import Channel
from bench.run.isolation import WatchedVariables, apply_settings, hide_packages
from bench.run.order import Order
from bench.run.rank_run import RankChannel, RankRun, end_after_error
from bench.run.telling import Breach

EXHAUSTED = (
    "DefaultCPUAllocator",
    "CUDA error: out of memory",
    "CUDA driver error: out of memory",
    "_STATUS_ALLOC_FAILED",
    "Error [CUDA]: out of memory",
    "Cuda failure 2 'out of memory'",
    "Failed to CUDA calloc",
    "Failed to CUDA malloc",
)
"""How torch, the CUDA runtime and driver, cuBLAS and cuDNN, Triton and NCCL say that memory is exhausted, in
errors of other kinds."""


def main(arguments: list[str]) -> int:
    """Run the order. Returns the process's exit code: 0 whenever the outcome was told. One of several
    processes that has told an error ends with 1, so that their launcher ends the others."""
    order = Order.model_validate_json(Path(arguments[0]).read_text(encoding="utf-8"))
    # A descriptor of the parent's, or under torchrun the folder of the ranks' pipes.
    together = not arguments[1].isdigit()
    channel = RankChannel(Path(arguments[1])) if together else Channel(int(arguments[1]))
    _end_with_parent()
    apply_settings()
    try:
        _work(order, channel, arguments)
    except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever a library raises is this run's outcome
        channel.send("outcome", status=_status_of(error), message=_message_of(error))
        # Last: it goes to a file, and what failed may be that the disk is full.
        with contextlib.suppress(OSError):
            traceback.print_exc()
        if together:
            end_after_error()
    return 0


def _work(order: Order, channel: Channel, arguments: list[str]) -> None:
    """What the arguments ask for. A training tells its outcome itself; whatever else comes to its end is
    complete."""
    watched = WatchedVariables()
    hide_packages(foreign_libraries(get_backend(order.request.backend).backend))
    kind = RankRun if isinstance(channel, RankChannel) else DepthRun
    run = kind(order, channel, watched, scratch=Path(arguments[0]).parent)
    work: dict[str, Callable[[], None]] = {
        "--prepare": run.prepare,
        "--reference": run.make_reference,
        "--depths": run.time,
        "--bare": lambda: BareRun(order, channel, watched, run.scratch).train_by_hand(),
        "--preflight": lambda: examine(channel, order.request.device_count),
    }
    work.get(arguments[-1], run.measure)()
    if arguments[-1] in work:
        channel.send("outcome", status="completed", message=None)


def _status_of(error: BaseException) -> str:
    from bench.errors import MissingLibrary

    # Not imported: where the import of torch itself is what failed, it would only fail again.
    torch = sys.modules.get("torch")
    exhausted = (MemoryError, getattr(getattr(torch, "cuda", None), "OutOfMemoryError", MemoryError))
    no_room = isinstance(error, OSError) and error.errno == errno.ENOMEM
    if no_room or isinstance(error, exhausted) or any(words in str(error) for words in EXHAUSTED):
        return "out_of_memory"
    return "unavailable" if isinstance(error, MissingLibrary | ImportError) else "error"


def _message_of(error: BaseException) -> str:
    """The error in one line, with what was noted on its way (where in which step)."""
    text = " ".join(str(error).split()) or type(error).__name__
    kind = "" if isinstance(error, Breach) else f"{type(error).__name__}: "
    notes = "".join(f" ({note})" for note in getattr(error, "__notes__", ()))
    return (kind + text)[:2000] + notes[:200]


def _end_with_parent() -> None:
    """End this process when the parent's end of stdin closes: no worker outlives its command."""

    def wait() -> None:
        # Unbuffered: a thread inside a buffered read would hold its lock while the interpreter ends.
        os.read(0, 1)
        os._exit(113)

    threading.Thread(target=wait, daemon=True).start()


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
