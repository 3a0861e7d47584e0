"""Reads the log of a training that another program ran: three formats, told apart by what is in them.

    trainer_state     transformers' ``trainer_state.json``, in every checkpoint; also a bare ``log_history``
    llama_factory     LLaMA-Factory's ``trainer_log.jsonl``: one JSON object a line
    console           what a Trainer printed, with anything between

``read_training_log(path)`` gives a ``TrainingLog``. A file that holds several runs (a log appended to) gives
the last one and says so. NaN and infinities are read as numbers; what is absent is None.
"""

from __future__ import annotations

import codecs
import itertools
import json
import stat
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from bench.errors import BrokenFile
from bench.record.logs.console_log import Findings, scan, with_counted_steps
from bench.record.logs.logged_values import LoggedWindow, number, shortened, window_of

LogKind = Literal["trainer_state", "llama_factory", "console"]

LARGEST_DOCUMENT_BYTES = 256 * 2**20
"""A trainer_state.json is parsed as a whole; a million steps logged one by one are about 200 MB. Lines are
streamed and have no such limit."""
LONGEST_LINE = 2**20
"""Characters; longer lines are read in pieces."""
LOOKED_AT = 2**16
"""Bytes at the start of a file that say what it is."""
EXPECTED = "give a trainer_state.json, LLaMA-Factory's trainer_log.jsonl, or the console output of a Trainer"

_BYTE_ORDER_MARKS = {  # what PowerShell's `>` writes
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}


@dataclass(frozen=True, slots=True)
class TrainingLog:
    """The windows of one training run, oldest first, and what the file says of its settings."""

    path: Path
    kind: LogKind
    windows: tuple[LoggedWindow, ...]
    """At least one."""
    logging_steps: int | None = None
    """As the file states it. None: it does not."""
    accumulation: int | None = None
    """Micro-batches per optimizer step, as the file states it. None: it does not."""
    max_steps: int | None = None
    train_loss: float | None = None
    """The mean over the whole run that a Trainer prints at the end."""
    train_loss_at: tuple[str, str] | None = None
    """Where and as what it stands."""
    notes: tuple[str, ...] = ()
    """What a reader should know of how the file was read."""


def read_training_log(path: Path) -> TrainingLog:
    """Read a log. Raises BrokenFile, in one line, for everything that is not one."""
    try:
        _refuse_what_is_no_file(path)
        with path.open("rb") as file:
            head = file.read(LOOKED_AT)
        if not head.strip():
            raise BrokenFile(f"'{path}' is empty", EXPECTED)
        encoding = next((name for mark, name in _BYTE_ORDER_MARKS.items() if head.startswith(mark)), "utf-8")
        start = head.decode(encoding, errors="replace")
        if "\0" in start:
            raise BrokenFile(f"'{path}' is a binary file", EXPECTED)
        document = _document(path, start, encoding)
        return _from_text(path, encoding) if document is None else _from_document(path, document)
    except OSError as error:
        raise BrokenFile(f"'{path}' cannot be read: {error.strerror or error}") from None


def _refuse_what_is_no_file(path: Path) -> None:
    try:
        mode = path.stat().st_mode
    except ValueError as error:  # a NUL in the name
        raise BrokenFile(f"{str(path)!r} is no file name: {error}") from None
    if stat.S_ISDIR(mode):
        inside = [name for name in ("trainer_state.json", "trainer_log.jsonl") if (path / name).is_file()]
        hint = f"did you mean '{path / inside[0]}'?" if inside else EXPECTED
        raise BrokenFile(f"'{path}' is a folder", hint)
    if not stat.S_ISREG(mode):
        raise BrokenFile(f"'{path}' is not a file", EXPECTED)


# ---- one JSON document -----------------------------------------------------------------------------


def _document(path: Path, start: str, encoding: str) -> Mapping[str, object] | None:
    """The file as one JSON document that holds a log_history; None: its lines have to be looked through."""
    opening = start.lstrip()[:1]
    if opening not in ("{", "["):
        return None
    meant = '"log_history"' in start
    if path.stat().st_size > LARGEST_DOCUMENT_BYTES:
        if meant:
            limit = f"{LARGEST_DOCUMENT_BYTES // 2**20} MiB"
            raise BrokenFile(f"'{path}' is larger than {limit}, too large for a trainer_state.json")
        return None
    try:
        body = json.loads(path.read_text(encoding=encoding, errors="replace"))
    except RecursionError:
        raise BrokenFile(f"'{path}' is nested too deeply for a training log", EXPECTED) from None
    except json.JSONDecodeError as error:
        if not meant:
            return None
        place = f"line {error.lineno}, column {error.colno}"
        raise BrokenFile(f"'{path}' is not valid JSON ({error.msg} at {place}): cut short?") from None
    except ValueError as error:
        raise BrokenFile(f"'{path}' is not valid JSON: {error}") from None
    if isinstance(body, list):
        return {"log_history": body}
    if isinstance(body, dict) and "log_history" in body:
        return body
    # One line of a trainer_log.jsonl is a JSON document, too.
    return None


def _from_document(path: Path, body: Mapping[str, object]) -> TrainingLog:
    history = body["log_history"]
    if not isinstance(history, list):
        raise BrokenFile(f"'{path}': log_history is no list", EXPECTED)
    windows = []
    final: tuple[float, tuple[str, str]] | None = None
    for place, entry in enumerate(history):
        where = f"log_history[{place}]"
        if not isinstance(entry, dict):
            raise BrokenFile(f"'{path}': {where} is no entry of a training log", EXPECTED)
        if (window := window_of(entry, where, _spelt(entry))) is not None:
            windows.append(window)
        elif (train_loss := number(entry.get("train_loss"))) is not None:
            final = train_loss, (where, shortened(_spelt(entry)))
    run, notes = _last_run(path, tuple(windows))
    return TrainingLog(
        path=path,
        kind="trainer_state",
        windows=run,
        logging_steps=_count(body.get("logging_steps")),
        max_steps=_count(body.get("max_steps")),
        train_loss=final[0] if final else None,
        train_loss_at=final[1] if final else None,
        notes=notes,
    )


def _spelt(entry: Mapping[str, object]) -> str:
    """An entry as evidence. Only flat values: what is nested says nothing of the loss."""
    flat = {key: value for key, value in entry.items() if not isinstance(value, dict | list)}
    return json.dumps(flat, ensure_ascii=False)


def _count(value: object) -> int | None:
    found = number(value)
    return int(found) if found is not None and 1 <= found <= 10**12 and found == int(found) else None


# ---- lines -----------------------------------------------------------------------------------------


def _from_text(path: Path, encoding: str) -> TrainingLog:
    found: Findings = scan(_lines(path, encoding))
    windows, notes = _last_run(path, tuple(found.windows))
    return TrainingLog(
        path=path,
        kind="llama_factory" if found.counted else "console",
        windows=with_counted_steps(windows, found),
        accumulation=found.accumulation,
        max_steps=found.max_steps,
        train_loss=found.train_loss,
        train_loss_at=found.train_loss_at,
        notes=notes,
    )


def _lines(path: Path, encoding: str) -> Iterator[str]:
    # newline="\n": a carriage return ends no line, so that line numbers are those of an editor.
    with path.open(encoding=encoding, errors="replace", newline="\n") as file:
        while line := file.readline(LONGEST_LINE):
            yield line


def _last_run(
    path: Path, windows: tuple[LoggedWindow, ...]
) -> tuple[tuple[LoggedWindow, ...], tuple[str, ...]]:
    """The windows since the last time that steps or epochs went back, which is where a run began."""
    if not windows:
        raise BrokenFile(f"'{path}' holds no training loss in a format that is known", EXPECTED)
    starts = [0]
    for place, (before, after) in enumerate(itertools.pairwise(windows), start=1):
        if before.step is not None and after.step is not None:
            back = after.step <= before.step
        else:
            back = before.epoch is not None and after.epoch is not None and after.epoch < before.epoch
        if back:
            starts.append(place)
    run = windows[starts[-1] :]
    if len(starts) == 1:
        return run, ()
    note = f"the file holds {len(starts)} runs; this is the last one, from {run[0].where} on"
    return run, (note,)
