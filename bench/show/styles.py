"""How a backend looks in every figure: one colour, one marker and one kind of line.

``assign_styles(labels)`` gives a style for each kind of run.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace


@dataclass(frozen=True)
class Style:
    """How one backend is drawn everywhere: a colour, and a marker and line for who sees no colour."""

    color: str
    marker: str
    line: str | tuple[int, tuple[int, ...]]


# Derived from the Okabe-Ito set; each has a contrast of 3 or more on the light and on the dark page.
STYLES: Mapping[str, Style] = {
    "bf16": Style("#7d858e", "o", "-"),
    "bnb-nf4": Style("#1f78b8", "s", "-"),
    "bnb-nf4-dq": Style("#3898d4", "D", "--"),
    "bnb-int8": Style("#8a72d8", "^", "-."),
    "hqq": Style("#d55e00", "v", "-"),
    "gptq": Style("#0a9470", "P", "--"),
    "awq": Style("#c5609a", "X", "-."),
    "eetq": Style("#a8850f", "d", ":"),
}


def assign_styles(labels: Sequence[str]) -> dict[str, Style]:
    """A style for each label: a known backend has its own, others take what is free, in order.

    Where one backend has several labels, the first has its style. Where there are more labels than styles,
    all of one backend share its colour.
    """
    own_label = dict.fromkeys(labels)
    if len(own_label) > len(STYLES):
        return _styles_by_backend(list(own_label))
    styles: dict[str, Style] = {}
    for label in labels:
        own = STYLES.get(label.partition(" (")[0])
        if own is not None and own not in styles.values():
            styles[label] = own
    free = [style for style in STYLES.values() if style not in styles.values()] or list(STYLES.values())
    others = [label for label in dict.fromkeys(labels) if label not in styles]
    return styles | {label: free[place % len(free)] for place, label in enumerate(others)}


def _styles_by_backend(labels: Sequence[str]) -> dict[str, Style]:
    """The colour of the backend, and a marker and line that tell its labels apart."""
    backends = list(dict.fromkeys(label.partition(" (")[0] for label in labels))
    # One style for more backends than there are: the last ones share theirs.
    own = assign_styles(backends[: len(STYLES)])
    looks, used, found = list(STYLES.values()), Counter[str](), {}
    for label in labels:
        backend = label.partition(" (")[0]
        style = own.get(backend) or looks[backends.index(backend) % len(looks)]
        look = looks[(looks.index(style) + used[backend]) % len(looks)]
        found[label] = replace(style, marker=look.marker, line=look.line)
        used[backend] += 1
    return found
