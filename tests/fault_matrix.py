"""The fault matrix: what is broken, how, and what must stand in the record at the end of it.

``tests/test_faults.py`` plants every row with a real command and real workers; ``docs/faults.md`` is this
table, written by ``python -m tests.fault_matrix`` and held to it by a test.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

DOCUMENT = Path(__file__).resolve().parents[1] / "docs" / "faults.md"
MEMORY, WORKER, DISK, PLACE, MODEL, LIBRARY, HUB, HAND = (
    "Memory", "Worker", "Disk and folder", "Clock, locale and paths", "Checkpoint", "Library", "Hub",
    "Output and Ctrl-C",
)  # fmt: skip


@dataclass(frozen=True)
class Fault:
    """One row."""

    name: str
    family: str
    planted: str
    """How, in words."""
    says: tuple[str, ...]
    """Words of the record's message, or of the one line where there is no record."""
    status: str | None = None
    """Of the record. None: nothing may run, so that there is none."""
    stage: str | None = None
    exit_code: int = 1
    """Of the command."""
    worker_exit: int | None = None
    """``exit_code`` of the record; None: not held."""
    backend: str | None = None
    """The backend that breaks so, in a sweep with others. None: a scene of its own in ``tests/fault_scenes``."""
    quick: bool = False
    """Whether ``make test`` plants it too; ``make soak`` plants all."""


def _worker(name: str, backend: str, planted: str, status: str, stage: str, *says: str, **more: object) -> Fault:
    values: dict[str, object] = {"family": WORKER, "backend": backend, **more}
    return Fault(name, planted=planted, status=status, stage=stage, says=says, **values)  # type: ignore[arg-type]


def _refused(name: str, family: str, planted: str, *says: str, quick: bool = False) -> Fault:
    return Fault(name, family, planted, says, exit_code=2, quick=quick)


ALLOCATOR = "DefaultCPUAllocator: can't allocate memory"
MATRIX: tuple[Fault, ...] = (
    # ---- memory
    _worker("memory: loading", "late-load-memory", "a layer asks the allocator for 64 TiB while it is quantized",
            "out_of_memory", "load", ALLOCATOR, family=MEMORY),
    _worker("memory: forward", "late-forward-memory", "so in the first forward",
            "out_of_memory", "train", ALLOCATOR, "in the forward of step 0", family=MEMORY),
    _worker("memory: backward", "late-backward-memory", "so in the first backward",
            "out_of_memory", "train", ALLOCATOR, "in the backward of step 0", family=MEMORY),
    _worker("memory: optimizer", "late-optimizer-memory", "so in the first step of the optimizer",
            "out_of_memory", "train", ALLOCATOR, "in the optimizer step of step 0", family=MEMORY),
    _worker("memory: card", "bad-out-of-memory", "torch's CUDA allocator raises while loading",
            "out_of_memory", "load", "20.00 GiB", family=MEMORY),
    Fault("memory: command", MEMORY, "the command may use 1.5 GiB and its worker tells it 3 GiB",
          ("the command itself, not the worker, ran out of memory",), "error", "launch"),
    Fault("memory: a full card", MEMORY, "NVML shows a card with 23 of 24 GiB in the hands of another process",
          (), "error", "load"),
    # ---- worker
    _worker("worker: killed", "bad-killed", "SIGKILL while loading, as the system does when memory is short",
            "crashed", "load", "SIGKILL", "may have run out of memory", worker_exit=-9),
    _worker("worker: killed at once", "early-killed", "SIGKILL before torch is imported",
            "crashed", "launch", "SIGKILL", worker_exit=-9),
    _worker("worker: aborted", "bad-aborts", "abort() while loading", "crashed", "load", "SIGABRT", worker_exit=-6),
    _worker("worker: segfault", "early-segfaults", "reads address 0",
            "crashed", "launch", "SIGSEGV", worker_exit=-11, quick=True),
    _worker("worker: raises", "bad-raises", "an error of two lines while loading",
            "error", "load", "RuntimeError: planted failure in two lines"),
    _worker("worker: silent end", "early-exits", "ends with 0 and tells nothing",
            "crashed", "launch", "ended with code 0 and told no outcome", worker_exit=0),
    _worker("worker: sys.exit", "early-leaves", "a library calls sys.exit(3)",
            "error", "launch", "does not import: 3", quick=True),
    _worker("worker: shouts", "early-shouts", "prints five megabytes and ends with 1",
            "crashed", "launch", "ended with code 1", worker_exit=1),
    _worker("worker: half an event", "early-half-event", "is killed in the middle of an event",
            "crashed", "train", "SIGKILL", worker_exit=-9, quick=True),
    _worker("worker: alien events", "early-alien-events", "tells events of other shapes, bytes that are no text, "
            "JSON 50,000 brackets deep", "crashed", "launch", "ended with code 0"),
    _worker("worker: alien section", "early-alien-section", "tells a part of the record that is none, then a good "
            "one and an error", "error", "train", "planted", quick=True),
    _worker("worker: claims completion", "early-claims-complete", "tells that it has completed, and nothing else",
            "crashed", "launch", "said that the run was complete after 0 of 4 steps", quick=True),
    _worker("worker: unknown outcome", "early-claims-nonsense", "tells a stage and an outcome that do not exist",
            "crashed", "launch", "told an outcome that is none: 'great'", quick=True),
    _worker("worker: lies about the record", "early-lies-about-itself", "tells another key, status and request",
            "crashed", "launch", "ended with code 0", quick=True),
    _worker("worker: endless line", "early-endless-line", "tells a line of 200 MiB without an end",
            "crashed", "launch", "SIGKILL"),
    _worker("worker: leaves a child", "early-leaves-a-child", "ends, and a process it has started keeps its pipe open",
            "crashed", "launch", "ended with code 0"),
    _worker("worker: message that is no text", "early-not-text", "tells an error with bytes that are no UTF-8",
            "error", "launch", "no such file"),
    _worker("worker: secretly dense", "bad-secretly-dense", "does not quantize and says that it does",
            "error", "load", "holds 16.000 bits per weight, the arithmetic says 4.500"),
    _worker("worker: cut graph", "bad-cuts-the-graph", "detaches its output, so that no gradient comes through",
            "error", "train"),
    *(
        Fault(f"worker: {name}", WORKER, f"{how}; the limit is 4 s", ("no result within 4 s",), "timeout", "launch",
              backend=f"early-{backend}")
        for name, backend, how in (
            ("hangs", "hangs", "sleeps"),
            ("hangs and does not listen", "deaf", "sleeps and ignores SIGTERM"),
            ("stopped", "stops", "SIGSTOP"),
            ("floods", "floods", "tells events without end"),
        )
    ),
    # ---- disk and folder
    _refused("disk: full before", DISK, "the results are on a disk of 256 KiB", "cannot write records to",
             "No space left on device", "--out", quick=True),
    _refused("disk: full meanwhile", DISK, "the disk is filled while the run goes on: its record is kept elsewhere",
             "No space left on device", "it is kept as", quick=True),
    _refused("disk: read-only before", DISK, "the results are on a read-only disk", "cannot write records to",
             "Read-only file system", quick=True),
    _refused("disk: read-only meanwhile", DISK, "the disk is made read-only while the run goes on",
             "Read-only file system", "it is kept as"),
    Fault("folder: removed meanwhile", DISK, "the second of two runs removes the folder with the first one's record",
          ("planted",), "error", "launch"),
    Fault("files: no descriptors left", DISK, "the command may open 8 files: no worker can be started",
          ("could not be started", "Too many open files"), "error", "launch"),
    _refused("record: truncated", DISK, "half of the run's record was there before", "is not a record"),
    _refused("record: alien", DISK, "a record of schema 99 was there before", "has record schema 99", quick=True),
    _refused("folder: two commands", DISK, "a second command while the first runs", "another command is writing to",
             quick=True),
    Fault("power cut: before the rename", DISK, "the command is killed when its first record is written and not "
          "yet renamed", ("planted",), "error", "launch"),
    Fault("power cut: after the rename", DISK, "so just after the rename", ("planted",), "error", "launch"),
    Fault("power cut: at random moments", DISK, "kill -9 of the command at 200 random moments of sweeps (10 in "
          "make test): no record is lost or half-written, and the next command does exactly what is missing",
          ("planted",), "error", "launch", quick=True),
    # ---- clock, locale, paths
    Fault("clock: set back", PLACE, "time.time goes back an hour at each look", (), "completed", None, exit_code=0),
    Fault("locale: C", PLACE, "LC_ALL=C without UTF-8 mode, standard output in ASCII, folders with blanks, Japanese "
          "and Turkish letters", ("planted",), "error", "launch"),
    Fault("locale: Turkish", PLACE, "LC_ALL=tr_TR.UTF-8, where i and I are no pair", (), "completed", None,
          exit_code=0),
    Fault("paths: not ASCII", PLACE, "results, cache, temporary files and data in folders with blanks and letters of "
          "several alphabets", (), "completed", None, exit_code=0),
    Fault("paths: not text", PLACE, "a results folder whose name is no UTF-8", ("planted",), "error", "launch"),
    # ---- checkpoint
    _refused("checkpoint: truncated", MODEL, "the last 100 bytes are missing", "is truncated", quick=True),
    _refused("checkpoint: empty", MODEL, "the weight file has no byte", "truncated or no safetensors file"),
    _refused("checkpoint: corrupt", MODEL, "the header is noise", "is no safetensors file"),
    _refused("checkpoint: no weights", MODEL, "a folder with a configuration only", "holds no *.safetensors"),
    _refused("checkpoint: no configuration", MODEL, "a folder with weights only", "holds no config.json"),
    _refused("checkpoint: configuration is no JSON", MODEL, "half of config.json", "is not readable JSON"),
    _refused("checkpoint: shard missing", MODEL, "the index names a file that is not there", "is missing", quick=True),
    Fault("checkpoint: unknown kind of model", MODEL, "a model_type that nobody knows", ("unheard_of",), "error",
          "load"),
    Fault("checkpoint: configuration of another model", MODEL, "twice the hidden size", ("has shape",), "error",
          "load"),
    Fault("checkpoint: NaN", MODEL, "one weight is NaN: the run completes, and its verdict names the tensor", (),
          "completed", None, exit_code=0),
    # ---- library
    _worker("library: missing", "bad-library", "a backend needs a library that nobody has",
            "unavailable", "launch", "surely_not_installed", family=LIBRARY),
    _worker("library: raises", "hqq", "its import raises an error", "error", "load",
            "RuntimeError: compiled for another CUDA", family=LIBRARY),
    _worker("library: does not load", "bnb-nf4", "its import raises ImportError, as an undefined symbol does",
            "unavailable", "load", "undefined symbol", family=LIBRARY),
    _worker("library: kills", "gptq", "its import reads address 0", "crashed", "prepare", "SIGSEGV", family=LIBRARY,
            worker_exit=-11),
    Fault("library: wrong version", LIBRARY, "bitsandbytes 0.1, which has no layers: its version is in the record",
          ("No module named 'bitsandbytes.functional'",), "unavailable", "load"),
    _refused("library: broken entry point", LIBRARY, "a third party's backends call sys.exit when imported",
             "entry point 'broken'", "does not import", quick=True),
    # ---- hub
    _refused("hub: refuses", HUB, "nobody listens", "the Hub cannot be reached from here", quick=True),
    _refused("hub: hangs", HUB, "takes the request and says nothing; ends within the Hub's own time limits",
             "could not be fetched", "timed out"),
    _refused("hub: redirects", HUB, "to itself, without end", "could not be fetched", "redirects", quick=True),
    _refused("hub: redirects into nowhere", HUB, "to an address where nobody listens", "could not be fetched"),
    _refused("hub: fails", HUB, "answers 500", "could not be fetched", "500"),
    _refused("hub: forbids", HUB, "answers 401", "could not be fetched", "401"),
    _refused("hub: is no hub", HUB, "answers with a page to log in", "could not be fetched"),
    _refused("hub: hangs in a file", HUB, "tells which files there are, and does not send them",
             "could not be fetched", "timed out"),
    # ---- output and signals
    Fault("output: closed", HAND, "standard input, output and error are closed (>&-)", ("planted",), "error", "launch"),
    Fault("output: reader gone", HAND, "| head -1", ("planted",), "error", "launch"),
    Fault("Ctrl-C", HAND, "once, while the worker sleeps", ("stopped by the user",), "interrupted", "launch",
          exit_code=130),
    Fault("Ctrl-C twice", HAND, "the second while the first is being answered: the worker does not listen to SIGTERM",
          ("stopped by the user",), "interrupted", "launch", exit_code=130),
    Fault("Ctrl-C while repeating", HAND, "with --force, in the second run of what is recorded: the first record "
          "stays", ("planted",), "error", "launch", exit_code=130),
    Fault("command killed", HAND, "kill -9 of the command: its worker ends too", (), None, exit_code=-9),
)  # fmt: skip


def in_a_sweep(*, quick: bool) -> list[Fault]:
    """Rows with a backend of their own that breaks by itself."""
    return [fault for fault in MATRIX if fault.backend and (fault.quick or not quick)]


def scenes(*, quick: bool) -> list[Fault]:
    """Rows that need more than a backend."""
    return [fault for fault in MATRIX if not fault.backend and fault.quick is quick]


def document() -> Iterator[str]:
    """``docs/faults.md``, line by line."""
    yield from (
        "# What breaks, and what stands in the record then",
        "",
        f"{len(MATRIX)} faults, each planted with the real command and real workers: all by `make soak`, and those",
        "with a yes in the last column by `make test` too. Where a run was possible there is a record at its end;",
        "where nothing may run there is one line and exit code 2. None ends in a traceback of the command, and none",
        "costs another run its record.",
        "",
        "This table is written by `python -m tests.fault_matrix` out of `tests/fault_matrix.py`.",
    )
    for family in dict.fromkeys(fault.family for fault in MATRIX):
        yield from ("", f"## {family}", "")
        yield "| fault | how it is planted | record | what it says | exit code | quick |"
        yield "| --- | --- | --- | --- | --- | --- |"
        for fault in MATRIX:
            if fault.family == family:
                record = "none" if fault.status is None else f"`{fault.status}`"
                record += f" in {fault.stage}" if fault.stage else ""
                says = "; ".join(fault.says) or "-"
                quick = "yes" if fault.quick else "-"
                cells = (fault.name, fault.planted, record, says, str(fault.exit_code), quick)
                yield f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in cells)} |"


if __name__ == "__main__":
    DOCUMENT.write_text("\n".join(document()) + "\n", encoding="utf-8")
