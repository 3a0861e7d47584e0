"""What should be the same for all completed runs, and who had which value.

A condition is ``breaking`` where runs that differ in it did not do the same work, and ``declared`` where
the figures may stand side by side as long as the difference is said there. ``CHECKS`` names them all.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from bench.ask.experiment import Lora, Optimizer, Workload
from bench.ask.plan import HARNESS_LIBRARIES
from bench.judge.rows import Row
from bench.record.schema import Device

NOT_RECORDED = "not recorded"

Kind = Literal["breaking", "declared"]


@dataclass(frozen=True)
class ConditionValue:
    """One value of a condition, and the names of the runs that had it."""

    text: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Condition:
    """One thing that should be the same for all completed runs."""

    name: str
    kind: Kind
    values: tuple[ConditionValue, ...]
    differs: bool
    """Some values differ where they must agree; seeded values must agree within a repeat only."""

    @property
    def shown_identical(self) -> bool:
        """Whether the records prove that all runs agree: what none recorded, none shares."""
        recorded = all(value.text != NOT_RECORDED for value in self.values)
        return bool(self.values) and recorded and not self.differs


def _everywhere(row: Row) -> Hashable:
    return None


def _same_repeat(row: Row) -> Hashable:
    """A seed belongs to a repeat, and so does everything that is drawn from it."""
    return row.repeat


def _same_placement(row: Row) -> Hashable:
    """Another dtype has other bytes, and AWQ's calibration scales the norms: digests agree within both."""
    quantization = row.record.quantization
    return row.repeat, row.effective_dtype, quantization.calibration if quantization else None


@dataclass(frozen=True)
class Check:
    """Where one condition stands in a record; within ``scope`` its values must agree."""

    name: str
    kind: Kind
    path: str
    """Dotted, from the record on."""
    scope: Callable[[Row], Hashable] = _everywhere
    null: str = "none"
    """What null means there."""

    def read(self, row: Row) -> str:
        """The value of one run in words; a part that the record lacks is not a null."""
        value: object = row.record
        for name in self.path.split("."):
            if value is None or (isinstance(value, Mapping) and name not in value):
                return NOT_RECORDED
            value = value[name] if isinstance(value, Mapping) else getattr(value, name)
        return self.null if value is None else _text(value)


CHECKS = (
    Check("token ids, labels and masks (digest)", "breaking", "workload.digest", _same_repeat, NOT_RECORDED),
    Check("initial LoRA values (digest)", "breaking", "lora.initial_digest", _same_repeat),
    Check("LoRA shapes (digest)", "breaking", "lora.shapes_digest"),
    Check("unquantized weights (digest)", "breaking", "load.weights_digest", _same_placement),
    Check("seed", "breaking", "request.seed", _same_repeat),
    Check("model fingerprint", "breaking", "request.model.fingerprint"),
    Check("weights", "breaking", "request.model.weights"),
    Check("layers kept", "breaking", "request.model.layers", null="all"),
    # As observed in the run, which may be another than was asked for.
    Check("attention", "breaking", "workload.attention"),
    Check("checkpointing", "breaking", "request.checkpointing"),
    Check("device", "breaking", "request.device"),
    Check("placement", "breaking", "request.placement"),
    Check("devices of a run", "breaking", "request.device_count"),
    Check("device names", "breaking", "environment.devices"),
    Check("CPU threads", "breaking", "environment.cpu_threads"),
    Check("data file (digest)", "breaking", "request.data_digest"),
    *(
        Check(f"{group}.{field}", "breaking", f"request.{group}.{field}")
        for group, model in (("workload", Workload), ("lora", Lora), ("optimizer", Optimizer))
        for field in model.model_fields
    ),
    # The function stays the same, and the numbers on the way, the subject of the comparison, do not.
    Check("layers rescaled by --stress", "breaking", "request.stress"),
    Check("every operation watched (--trace)", "declared", "request.trace"),
    Check("quantized model loaded from cache", "declared", "load.from_cache", null="no cache asked for"),
    Check("requested dtype", "declared", "request.dtype"),
    Check("effective dtype", "declared", "quantization.effective_dtype"),
    Check("harness commit", "declared", "environment.commit"),
    Check("uncommitted changes in the harness", "declared", "environment.dirty"),
    Check("Python version", "declared", "environment.python"),
    Check("CUDA version", "declared", "environment.cuda"),
    # One library a condition, so that a difference names the library.
    *(
        Check(f"{name} version", "declared", f"environment.versions.{name}", null="not installed")
        for name in HARNESS_LIBRARIES
    ),
)


def find_conditions(completed: Sequence[Row]) -> tuple[Condition, ...]:
    """Every condition, with the values that the completed runs had."""
    return tuple(_condition(check, completed) for check in CHECKS)


def _condition(check: Check, rows: Sequence[Row]) -> Condition:
    by_text: dict[str, list[Row]] = {}
    by_scope: dict[Hashable, set[str]] = {}
    for row in rows:
        text = check.read(row)
        by_text.setdefault(text, []).append(row)
        by_scope.setdefault(check.scope(row), set()).add(text)
    values = tuple(ConditionValue(text, _who(members, rows)) for text, members in by_text.items())
    return Condition(check.name, check.kind, values, any(len(texts) > 1 for texts in by_scope.values()))


def _who(members: Sequence[Row], rows: Sequence[Row]) -> tuple[str, ...]:
    """Labels of ``members``; the repeat is named where only some repeats of a label are among them."""
    total = Counter(row.label for row in rows)
    own = Counter(row.label for row in members)
    names = (row.label if own[row.label] == total[row.label] else row.name for row in members)
    return tuple(dict.fromkeys(names))


def _text(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Mapping):
        return ", ".join(f"{name} x {_text(part)}" for name, part in value.items()) or "none"
    if isinstance(value, tuple):
        return counted(part.name if isinstance(part, Device) else str(part) for part in value)
    return str(value)


def counted(parts: Iterable[str]) -> str:
    """A list in words, in which equal parts are counted."""
    counts = Counter(parts).items()
    return ", ".join(part if count == 1 else f"{count} x {part}" for part, count in counts)
