"""Python's garbage collector, out of the way of thousands of records.

Records and what is derived from them have no cycles, so that there is nothing for it to find; and it would
look through all that are held again and again, which takes half the time of reading 5,000.
"""

from __future__ import annotations

import gc
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def collector_paused() -> Iterator[None]:
    """Within it, nothing is searched for cycles; afterwards as before."""
    was_on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_on:
            gc.enable()
