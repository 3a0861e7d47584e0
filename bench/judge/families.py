"""Families of conditions: the names that ``--allow`` takes, and those that it never can.

Runs stand side by side only where they agree in every condition that breaks a comparison
(``bench.judge.checks``). Each such condition belongs to one family of this list, so that a person need
not type "effective dtype" to say that a difference in it is meant. ``parse_allowed(texts)`` reads what was
typed.

An allowed difference is printed at every figure. A family with ``never`` cannot be allowed: figures of runs
that differ there are of other work, or of other quantities, whatever is printed beside them.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from bench.errors import BadValue, nearest


@dataclass(frozen=True)
class Family:
    """Conditions that are allowed together or not at all."""

    name: str
    meaning: str
    """What is the same for runs that agree in it."""
    never: str | None = None
    """Why runs that differ in it can never stand side by side; None: a person may allow it."""
    instead: str | None = None
    """What else helps than to allow it."""
    repeatable: bool = False
    """Whether runs of one backend that differ in it may be repeats of one another once it is allowed. Of
    the others each is a line of its own: nothing is averaged over two cards or two dtypes."""


FAMILIES: tuple[Family, ...] = (
    Family(
        "data",
        "token ids, labels and masks, the file, the workload and the seed that they come from",
        never="runs on other tokens did other work",
    ),
    Family(
        "lora",
        "shapes, scale and initial values of the adapters",
        never="other adapters, or adapters that begin elsewhere, are another training",
    ),
    Family(
        "model",
        "the model, its layers, and its weights, real or synthetic",
        never="another model, or one with other weights, is other work",
    ),
    Family(
        "measure",
        "a CPU or a card",
        never="on a CPU memory is what the process holds and on a card what the allocator reserved, and "
        "these are two quantities",
    ),
    Family(
        "dtype",
        "the dtype that was computed in, of layers and adapters",
        instead="ask for a dtype that every backend honours (--dtype)",
    ),
    Family("attention", "the attention kernel that ran"),
    Family("checkpointing", "whether and how activations are recomputed"),
    Family("optimizer", "the settings of AdamW and of clipping"),
    Family("stress", "the layers that --stress rescales"),
    Family(
        "trace",
        "whether every operation was watched, and whether step times have the reading of the probes in them",
    ),
    Family("placement", "how a step is spread over devices, processes and micro-batches"),
    Family(
        "device",
        "the name and number of the devices, their power limit, the processor and its threads, the settings "
        "of the allocator",
    ),
    Family(
        "sharing",
        "whether other runs of the same command were on the same machine at the same time",
        instead="run them again with as many at once, or one at a time (--executor local)",
    ),
    Family(
        "versions",
        "the environment, Python, CUDA, the driver, and every library that both runs used",
        instead="run all of them again with what is installed now (--force)",
        repeatable=True,
    ),
    Family(
        "commit",
        "the commit and the version of this harness",
        instead="run the recorded ones again (--force)",
        repeatable=True,
    ),
)
BY_NAME = {family.name: family for family in FAMILIES}
ALLOWABLE = tuple(family.name for family in FAMILIES if family.never is None)


def parse_allowed(texts: Iterable[str]) -> frozenset[str]:
    """The families named in ``texts``, each a name or several with commas between them.

    Raises BadValue for a name that does not exist, with the nearest, and for a family that can never be
    allowed, with the reason.
    """
    return frozenset(_allowed(part.strip()) for text in texts for part in text.split(","))


def _allowed(name: str) -> str:
    family = BY_NAME.get(name)
    if family is None:
        near = nearest(name, BY_NAME)
        hint = f"did you mean '{near}'?" if near else f"valid: {', '.join(ALLOWABLE)}"
        raise BadValue(f"unknown difference '{name}' in --allow", hint)
    if family.never is not None:
        raise BadValue(
            f"--allow {name} is not possible: {family.never}", f"what can be allowed: {', '.join(ALLOWABLE)}"
        )
    return name
