"""Cards as a person names them: ``7x24GB``, ``1x80GB``, ``24GB``, or exactly: ``2x79.1GiB``.

`parse_cards` reads one ``--cards`` value into `Cards`. GB is the size on the box, of which CUDA sees a
little less; GiB is what CUDA reports, to the byte.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from bench.errors import BadValue

GIB = 2**30
VISIBLE_SHARE = 23.55 / 24
"""Of a card sold as so many (binary) gigabytes, what CUDA reports as its total memory. torch's
out-of-memory messages in public threads name 23.55 GiB (RTX 4090, huggingface/lora-fast#1), 23.64 GiB (RTX
4090, eosphoros-ai/DB-GPT-Hub#248), 23.70 GiB (RTX 3090, GaoLii/DSP#10), 39.50 GiB (A100 40 GB,
TianheWu/CoSeR#10) and 79.10 GiB (H100 80 GB, huggingface/trl#3172); the lowest share is taken. Cards that
keep error-correcting codes in their memory (A10, L4) show less: name those in GiB."""
MOST_CARDS = 1024
MOST_GIB = 4096
PATTERN = re.compile(r"(?:(?P<count>\d{1,9})\s*x\s*)?(?P<size>\d+(?:\.\d+)?)\s*(?P<unit>GB|GiB|G)", re.I)
EXAMPLE = "for example --cards 7x24GB, --cards 80GB or, exactly as CUDA reports it, --cards 2x79.1GiB"


@dataclass(frozen=True)
class Cards:
    """Equal cards in one machine."""

    count: int
    label: str
    """As a person reads it: 7x24GB."""
    capacity_bytes: int
    """Of one card: the total memory that CUDA reports."""


def parse_cards(text: str) -> Cards:
    """One ``--cards`` value. Raises BadValue, with an example, for anything else than [N x] SIZE GB|GiB."""
    found = PATTERN.fullmatch(text.strip())
    if found is None:
        raise BadValue(f"--cards '{text}' is not a number of cards and their memory", EXAMPLE)
    count = int(found["count"] or 1)
    size, exact = float(found["size"]), found["unit"].lower() == "gib"
    if not 1 <= count <= MOST_CARDS:
        raise BadValue(f"--cards '{text}': between 1 and {MOST_CARDS} cards can be planned for", EXAMPLE)
    if not 0 < size <= MOST_GIB:
        raise BadValue(f"--cards '{text}': a card has between 0 and {MOST_GIB} GiB", EXAMPLE)
    label = f"{count}x{size:g}{'GiB' if exact else 'GB'}"
    return Cards(count, label, int(size * GIB * (1 if exact else VISIBLE_SHARE)))


def cards_here(memory_bytes: Iterable[int | None]) -> list[Cards]:
    """The cards of this machine, equal ones together, the largest first.

    ``memory_bytes``: of each card, as its driver reports it, of which CUDA sees the same share as of the
    size on the box; None, unknown, is left out.
    """
    counted = Counter(size for size in memory_bytes if size is not None)
    return [
        Cards(count, f"{count}x{size / GIB:.1f}GiB", int(size * VISIBLE_SHARE))
        for size, count in sorted(counted.items(), reverse=True)
    ]
