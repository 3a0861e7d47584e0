"""The command line in this process: what every ending of it promises, held for one input after another.

`Front` runs the real command with its own handling of errors. It starts no worker: a command that is accepted
ends where it would begin to run.
"""

from __future__ import annotations

import io
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from bench import cli
from bench.errors import LONGEST_LINE
from bench.record.store import Store

CONTROL = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""What must never reach a terminal: all control characters but the line feed, and what turns text around."""


class AboutToRunError(BaseException):
    """The command was accepted and would begin to run now."""


@dataclass(frozen=True)
class Ended:
    """How a command ended."""

    code: int
    out: str
    err: str


@dataclass
class Front:
    """The command line in this process, and how many inputs it was given."""

    inputs: int = 0
    refusals: int = 0
    codes: dict[int, int] = field(default_factory=dict)

    def run(self, *arguments: str) -> Ended:
        """One command, through the handling of errors that the real one has. Every other exception is a bug
        and leaves as it is."""
        # As in a terminal: what cannot be encoded is an error on stdout.
        out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="strict", newline="")
        err = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", errors="backslashreplace", newline="")
        given, sys.argv = sys.argv, ["qlora-bench", *arguments]
        code: Any = 0
        self.inputs += 1
        try:
            with redirect_stdout(out), redirect_stderr(err):
                cli.main()
        except SystemExit as end:
            code = end.code
        except AboutToRunError:
            pass
        finally:
            sys.argv = given
        self.codes[code] = self.codes.get(code, 0) + 1
        return Ended(code, _written(out), _written(err))

    def holds(self, arguments: Sequence[str], *names: str) -> Ended:
        """Run a command and hold its ending against the promise: it is done, or refused in one line that has
        one of ``names`` in it."""
        ended = self.run(*arguments)
        shown = f"{[a[:200] for a in arguments]} ended with {ended.code}: {ended.err[:2000]}"
        assert ended.code in (0, 1, 2), shown
        assert not CONTROL.search(ended.out), f"{shown}: {CONTROL.search(ended.out)} in {ended.out[:2000]!r}"
        assert not CONTROL.search(ended.err), f"{shown}: {CONTROL.search(ended.err)}"
        if ended.code == 2:
            self.refusals += 1
            assert ended.out == "", shown
            assert ended.err.startswith("qlora-bench: "), shown
            assert ended.err.endswith("\n"), shown
            assert ended.err.count("\n") == 1, shown
            assert len(ended.err) <= LONGEST_LINE + 20, shown
            assert not names or any(name in ended.err for name in names), f"{shown} names none of {names}"
        return ended


def _written(stream: io.TextIOWrapper) -> str:
    stream.flush()
    return stream.buffer.getvalue().decode("utf-8")  # type: ignore[attr-defined]


@pytest.fixture
def front(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Front]:
    """The front door, in a folder of its own, without a network and without workers."""

    @contextmanager
    def opened(store: Store) -> Iterator[None]:
        with prove(store):
            raise AboutToRunError
        yield

    def unreachable(*_: Any, **__: Any) -> None:
        raise OSError("no network in this test")

    def start(*_: Any, **__: Any) -> None:
        raise AboutToRunError

    prove = Store.open_for_writing
    monkeypatch.setattr(Store, "open_for_writing", opened)
    monkeypatch.setattr("bench.run.sweep.run_sweep", start)
    # Where every worker starts, whatever command wants it.
    monkeypatch.setattr("bench.run.launch._work", start)
    monkeypatch.setattr("bench.run.torchrun.work_together", start)
    # The package's attribute of that name is the command.
    monkeypatch.setattr(sys.modules["bench.cli.watch"], "_pause", start)
    monkeypatch.setattr("click.launch", start)
    monkeypatch.setattr("socket.create_connection", unreachable)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    monkeypatch.setenv("QLORA_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("COLUMNS", "160")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.chdir(tmp_path)
    yield Front()
