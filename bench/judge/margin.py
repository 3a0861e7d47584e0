"""The stability margin: by how many bits one pair of layers can be rescaled while training stays finite.

Derived from records alone, so that it can be shown again from a folder: `find_margins` picks the runs that
differ in nothing but the factor of one ``--stress`` pattern, the unstressed run among them. What "finite"
means is said in ``bench.judge.finiteness``. `next_exponent` is the bisection that ``qlora-bench margin``
follows.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Literal

from bench.judge.finiteness import STATUSES, Finiteness, judge_finiteness
from bench.judge.rows import make_rows
from bench.record.schema import Record


@dataclass(frozen=True)
class Probe:
    """One factor that was tried."""

    factor: float
    """1: the unstressed control."""
    verdict: str
    """`Finiteness.name`."""
    module: str | None
    """Where it failed first, if the record tells."""
    finite: bool | None
    key: str
    """Of the record that decides this factor."""


@dataclass(frozen=True)
class Margin:
    """How far one pattern could be rescaled on one backend in one dtype."""

    backend: str
    label: str
    """The backend, told apart where one backend ran with different settings."""
    requested_dtype: str
    effective_dtype: str | None
    """None: no run got as far as telling."""
    module: str
    """The pattern of ``--stress``."""
    weights: Literal["real", "synthetic"]
    device: Literal["cpu", "cuda"]
    seed: int
    largest_finite_factor: float | None
    """Below every failing factor; None: not even the control was finite, or no finite factor was tried."""
    smallest_failing_factor: float | None
    bits: float | None
    """log2 of the largest finite factor: a lower bound of the margin, short of it by less than
    log2(smallest failing / largest finite), which is 1 after a whole bisection."""
    censored: bool
    """No factor failed: the margin is at least ``bits``."""
    ended_by: str | None
    """Why nothing was found out above the largest finite factor: the status of a run that did not complete,
    or "unsettled"; None: nothing stood in the way."""
    probes: tuple[Probe, ...]
    """By factor, smallest first."""

    @property
    def exact(self) -> bool:
        """Whether the next power of two is known to fail."""
        largest, smallest = self.largest_finite_factor, self.smallest_failing_factor
        return largest is not None and smallest is not None and smallest <= 2 * largest


def find_margins(records: Sequence[Record], pattern: str | None = None) -> tuple[Margin, ...]:
    """Every margin that ``records`` hold, in the order in which its first run stands there.

    Runs belong together that differ only in the factor of one single pattern; a run without any stress is
    the control of every pattern. Steps, repeat number and what is merely watched may differ too: the longest
    run that decides a factor speaks for it. Factors below 1 and runs with several patterns are left out, and
    so is a pattern of which only one factor is known, the control included; of ``pattern`` a single factor is
    enough, for it was asked for and its bisection may have ended at the control.
    """
    piles = _piles(records, pattern)
    found = []
    for (_, module), pile in piles.items():
        deciding = _deciding(pile)
        if len(deciding) > 1 or module == pattern:
            found.append(_margin(module, deciding))
    return _labelled(found, [record for pile in piles.values() for record in pile])


def next_exponent(known: Mapping[int, bool | None], max_bits: int) -> int | None:
    """The exponent to try next, so that the largest finite one is bracketed; None: nothing is left to try.

    ``known``: exponent -> whether training was finite; None ends the search, as nothing can be concluded.
    First the control (0), then ``max_bits``, then halves; what fails is taken to go on failing above.
    """
    if any(finite is None for finite in known.values()):
        return None
    if 0 not in known:
        return 0
    if not known[0]:
        return None
    if max_bits not in known:
        return max_bits
    failing = min((exponent for exponent, finite in known.items() if not finite), default=None)
    if failing is None:
        return None
    finite = max(exponent for exponent, fine in known.items() if fine and exponent < failing)
    return None if failing - finite == 1 else (finite + failing) // 2


# ---- which runs belong together ------------------------------------------------------------------

NOT_THE_TRAINING: dict[str, object] = {
    "stress": True,
    "preset": True,
    "timeout_seconds": True,
    "trace": True,
    "fidelity": True,
    "repeat": True,
    "model": {"note"},
    "workload": {"steps", "warmup_steps"},
}
"""Parts of a request in which the runs of one margin may differ."""


def _piles(records: Sequence[Record], pattern: str | None) -> dict[tuple[str, str], list[Record]]:
    """(Everything but the factor, pattern) -> its records, each with the controls that fit."""
    piles: dict[tuple[str, str], list[Record]] = {}
    controls: dict[str, list[Record]] = {}
    for record in records:
        alike = _alike(record)
        match list(record.request.stress.items()):
            case []:
                controls.setdefault(alike, []).append(record)
                if pattern is not None:
                    piles.setdefault((alike, pattern), [])
            case [(module, factor)] if factor >= 1:
                piles.setdefault((alike, module), []).append(record)
    for (alike, _), pile in piles.items():
        pile[:0] = controls.get(alike, [])
    return piles


def _alike(record: Record) -> str:
    body = record.request.model_dump(mode="json", exclude=NOT_THE_TRAINING)  # type: ignore[arg-type]
    return json.dumps(body, sort_keys=True)


def _factor(record: Record) -> float:
    return next(iter(record.request.stress.values()), 1.0)


def _deciding(pile: Iterable[Record]) -> dict[float, tuple[Record, Finiteness]]:
    """Factor -> the record that speaks for it: one that decides before one that does not, then the longest,
    then the latest."""
    best: dict[float, tuple[Record, Finiteness]] = {}
    for record in pile:
        factor, judged = _factor(record), judge_finiteness(record)
        if factor not in best or _weight(record, judged) >= _weight(*best[factor]):
            best[factor] = record, judged
    return dict(sorted(best.items()))


def _weight(record: Record, judged: Finiteness) -> tuple[bool, int, str]:
    return judged.finite is not None, len(record.steps), record.started_at


# ---- what they say -------------------------------------------------------------------------------


def _margin(module: str, deciding: Mapping[float, tuple[Record, Finiteness]]) -> Margin:
    probes = tuple(
        Probe(factor, judged.name, judged.module, judged.finite, record.key)
        for factor, (record, judged) in deciding.items()
    )
    smallest = min((probe.factor for probe in probes if probe.finite is False), default=None)
    below = [probe.factor for probe in probes if probe.finite and probe.factor < (smallest or math.inf)]
    largest = max(below, default=None)
    records = [record for record, _ in deciding.values()]
    effective = (record.quantization.effective_dtype for record in records if record.quantization)
    request = records[0].request
    return Margin(
        backend=request.backend,
        label=request.backend,
        requested_dtype=request.dtype,
        effective_dtype=next(effective, None),
        module=module,
        weights=request.model.weights,
        device=request.device,
        seed=request.seed,
        largest_finite_factor=largest,
        smallest_failing_factor=smallest,
        bits=None if largest is None else math.log2(largest),
        censored=smallest is None and largest is not None,
        ended_by=_ended_by(probes, largest, smallest),
        probes=probes,
    )


def _ended_by(probes: Sequence[Probe], largest: float | None, smallest: float | None) -> str | None:
    """What stood in the way between the largest finite and the smallest failing factor."""
    between = [
        probe
        for probe in probes
        if probe.finite is None and (largest or 0) < probe.factor < (smallest or math.inf)
    ]
    # A run that did not complete is the graver reason.
    between.sort(key=lambda probe: probe.verdict not in STATUSES)
    return between[0].verdict if between else None


def _labelled(margins: Sequence[Margin], records: Sequence[Record]) -> tuple[Margin, ...]:
    """Labels that tell apart the margins of one backend that share dtype and pattern."""
    by_key = {record.key: record for record in records}
    labels = [margin.label for margin in margins]
    for kind in dict.fromkeys((m.requested_dtype, m.module) for m in margins):
        places = [n for n, m in enumerate(margins) if (m.requested_dtype, m.module) == kind]
        # Without their factors, which are what a margin is made of and tell no margins apart.
        bare = [_bare(by_key[margins[place].probes[0].key]) for place in places]
        for place, row in zip(places, make_rows(bare), strict=True):
            labels[place] = row.label
    alike = Counter((m.requested_dtype, m.module, label) for m, label in zip(margins, labels, strict=True))
    return tuple(
        replace(
            margin,
            label=f"{label}, seed {margin.seed}"
            if alike[margin.requested_dtype, margin.module, label] > 1
            else label,
        )
        for margin, label in zip(margins, labels, strict=True)
    )


def _bare(record: Record) -> Record:
    """The record as if it had not been stressed, and as long as any other."""
    request = record.request.model_copy(update={"stress": {}, "trace": False, "fidelity": False})
    return record.model_copy(update={"request": request})
