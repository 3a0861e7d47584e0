"""What surrounds the command: standard streams that may be closed or narrow, and a hand on Ctrl-C.

    prepare()       # first thing in ``bench.cli.main``
"""

from __future__ import annotations

import io
import os
import signal
import sys
from types import FrameType
from typing import NoReturn


def prepare() -> None:
    """Make sure that printing can neither fail nor go astray, and that Ctrl-C ends the command once."""
    _open_streams()
    _take_any_text()
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _interrupt)


def _open_streams() -> None:
    """Open the null device in the place of a standard stream that is closed (``>&-``): the next file that is
    opened would have its number, and what is printed would end up in a record or a worker's pipe."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            opened = os.open(os.devnull, os.O_RDWR)
            if opened != number:
                os.dup2(opened, number)
                os.close(opened)
        if getattr(sys, name) is None:
            mode = "r" if number == 0 else "w"
            # Lives as long as the process.
            setattr(sys, name, open(number, mode, closefd=False, encoding="utf-8"))  # noqa: SIM115


def _take_any_text() -> None:
    """A terminal or a file in ASCII shows other characters as escapes; it does not end the command."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _interrupt(number: int, frame: FrameType | None) -> NoReturn:
    """The first Ctrl-C ends the command in an orderly way, which takes seconds at the most; further ones
    would only cost the record of the interrupted run, or leave its worker behind."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    raise KeyboardInterrupt
