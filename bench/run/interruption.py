"""Ctrl-C, held back while something must not be torn.

    with held_back() as hold:
        record = ...            # whole, whatever is pressed meanwhile
    # here it arrives, if it was pressed: KeyboardInterrupt
"""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import FrameType


@dataclass
class Hold:
    """What was pressed while it was held back."""

    pressed: bool = False
    carried: tuple[object, ...] = ()
    """Arguments of the KeyboardInterrupt that is raised in the end."""


@contextmanager
def held_back() -> Iterator[Hold]:
    """Let the block end before a Ctrl-C does what it otherwise does at once; not for anything that may wait.

    Python hears signals in the main thread alone, and where they are ignored already (after the first Ctrl-C)
    they stay so: then there is nothing to hold back.
    """
    hold = Hold()
    before = signal.getsignal(signal.SIGINT)
    if threading.current_thread() is not threading.main_thread() or not callable(before):
        yield hold
        return

    def note(number: int, frame: FrameType | None) -> None:
        hold.pressed = True

    signal.signal(signal.SIGINT, note)
    try:
        yield hold
    finally:
        signal.signal(signal.SIGINT, before)
    if hold.pressed:
        try:
            before(signal.SIGINT, None)
        except KeyboardInterrupt:
            raise KeyboardInterrupt(*hold.carried) from None
