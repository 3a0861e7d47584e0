"""Where each condition of a run stands in its record, and within which runs its values must agree.

``CHECKS`` are those of every run; ``checks_of(rows)`` adds the versions of libraries that only some backends
use: only what a run used can make it differ, and bitsandbytes is nothing to a run on HQQ.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

from bench.ask.experiment import Lora, Optimizer, Workload
from bench.ask.versions import HARNESS_LIBRARIES
from bench.judge.rows import Row
from bench.judge.values import in_words
from bench.record.schema import Record

NOT_RECORDED = "not recorded"
NOT_INSTALLED = "not installed"
ENVIRONMENT = "environment"
"""The condition that one set of packages ran everything."""


def _everywhere(row: Row) -> Hashable:
    return None


def same_repeat(row: Row) -> Hashable:
    """A seed belongs to a repeat, and so does everything that is drawn from it."""
    return row.repeat


def _same_dtype(row: Row) -> Hashable:
    return row.effective_dtype


def _same_placement(row: Row) -> Hashable:
    """Another dtype has other bytes, and a library's calibration may scale the norms (AWQ's does): digests
    agree within both. Rounding to nearest and random codes leave alone what is not quantized."""
    quantization = row.record.quantization
    calibration = quantization.calibration if quantization else None
    return row.repeat, row.effective_dtype, None if calibration in ("rtn", "random") else calibration


@dataclass(frozen=True)
class Check:
    """Where one condition stands in a record; within ``scope`` its values must agree."""

    name: str
    family: str | None
    path: str
    """Dotted, from the record on; the parts of a list are read one by one."""
    scope: Callable[[Row], Hashable] = _everywhere
    null: str = "none"
    """What null means there."""
    if_used: bool = False
    """A run that says nothing of it has nothing to do with it."""
    counted: bool = True
    """Of a list: how many of its parts are equal matters too."""

    @property
    def of_every_repeat(self) -> bool:
        """Whether all repeats of one backend must agree in it."""
        return self.scope is _everywhere

    @cached_property
    def _steps(self) -> Sequence[str]:
        # Two dots at most: a library's own name may have some.
        return self.path.split(".", 2)

    def read(self, row: Row) -> str:
        """The value of one run in words; a part that the record lacks is not a null.

        A run keeps it: names, groups and the table of conditions each ask for all of them.
        """
        text = row.words.get(self.path)
        if text is None:
            # Most runs say the same, so that one string will do for all.
            text = row.words[self.path] = sys.intern(self._text(row.record))
        return text

    def _text(self, record: Record) -> str:
        value: object = record
        for name in self._steps:
            if isinstance(value, tuple):
                value = tuple(getattr(part, name) for part in value)
            elif value is None or (isinstance(value, dict) and name not in value):
                return NOT_RECORDED
            else:
                value = value[name] if isinstance(value, dict) else getattr(value, name)
        if value is None or (isinstance(value, tuple) and all(part is None for part in value)):
            return self.null
        if isinstance(value, tuple) and not self.counted:
            value = tuple(dict.fromkeys(value))
        return in_words(value)

    def read_if_used(self, row: Row) -> str | None:
        """The value of one run in words; None: the run has nothing to do with it."""
        text = self.read(row)
        return None if self.if_used and text == NOT_RECORDED else text


ELSEWHERE = {
    "lora.precision": "dtype",
    # Four processes train what one does with four times as much; the digest tells whether they did.
    "workload.gradient_accumulation_steps": "placement",
}
"""Settings that do not belong to the family of their group."""
COVERED = {"workload.data"}
"""Settings that say nothing more: one file has several paths, and one digest."""

WATCHING = Check("reading of the probes within the time of a step", "trace", "watching_in_step_seconds")
"""The one condition that stands in the steps."""

CHECKS = (
    Check("token ids, labels and masks (digest)", "data", "workload.digest", same_repeat, NOT_RECORDED),
    Check("initial LoRA values (digest)", "lora", "lora.initial_digest", same_repeat),
    Check("unquantized weights (digest)", "model", "load.weights_digest", _same_placement),
    Check("seed", "data", "request.seed", same_repeat),
    Check("model fingerprint", "model", "request.model.fingerprint"),
    Check("weights", "model", "request.model.weights"),
    Check("layers kept", "model", "request.model.layers", null="all"),
    Check("LoRA shapes (digest)", "lora", "lora.shapes_digest"),
    # As observed in the run, which may be another than was asked for.
    Check("effective dtype", "dtype", "quantization.effective_dtype"),
    Check("attention", "attention", "workload.attention"),
    Check("checkpointing", "checkpointing", "request.checkpointing"),
    Check("device", "measure", "request.device"),
    Check("placement", "placement", "request.placement"),
    Check("devices of a run", "placement", "request.device_count"),
    Check("device names", "device", "environment.devices.name"),
    Check("power limit of the cards (W)", "device", "environment.devices.power_limit_watts", counted=False),
    Check("processor", "device", "environment.cpu"),
    Check("CPU threads", "device", "environment.cpu_threads"),
    Check("allocator settings", "device", "environment.allocator_settings", null="default"),
    # Whether, and not how many: else no two runs of a full machine would be alike.
    Check("machine shared with other runs", "sharing", "shared_machine"),
    Check("data file (digest)", "data", "request.data_digest"),
    *(
        Check(path, ELSEWHERE.get(path, family), f"request.{path}")
        for group, family, model in (
            ("workload", "data", Workload),
            ("lora", "lora", Lora),
            ("optimizer", "optimizer", Optimizer),
        )
        for field in model.model_fields
        if (path := f"{group}.{field}") not in COVERED
    ),
    # The function stays the same, and the numbers on the way, the subject of the comparison, do not.
    Check("layers rescaled by --stress", "stress", "request.stress"),
    # Step times have the hooks in them.
    Check("every operation watched (--trace)", "trace", "request.trace"),
    WATCHING,
    Check("harness commit", "commit", "environment.commit", null="outside a checkout"),
    Check("qlora-bench version", "commit", "environment.versions.qlora-bench", null=NOT_INSTALLED),
    Check(ENVIRONMENT, "versions", "request.environment"),
    Check("Python version", "versions", "environment.python"),
    Check("CUDA version", "versions", "environment.cuda"),
    Check("driver of the cards", "versions", "environment.devices.driver", counted=False),
    # One library a condition, so that a difference names the library.
    *(
        Check(f"{name} version", "versions", f"environment.versions.{name}", null=NOT_INSTALLED)
        for name in HARNESS_LIBRARIES
        if name != "qlora-bench"
    ),
    # Weights from the cache are equal to the bit, and their load has a column of its own.
    Check("quantized model loaded from cache", None, "load.from_cache", null="no cache asked for"),
    # What was computed in is a condition by itself; what was asked for is told where that hides it.
    Check("requested dtype", None, "request.dtype", _same_dtype),
    # Two dirty runs of one commit may be of other code, and two that differ here may be of the same.
    Check("uncommitted changes in the harness", None, "environment.dirty"),
)


def checks_of(rows: Iterable[Row]) -> tuple[Check, ...]:
    """Every check, and one for each library that only some backends use."""
    recorded = (row.record.environment.versions for row in rows if row.record.environment)
    own = dict.fromkeys(name for versions in recorded for name in versions if name not in HARNESS_LIBRARIES)
    of_backends = (
        Check(f"{name} version", "versions", f"environment.versions.{name}", null=NOT_INSTALLED, if_used=True)
        for name in own
    )
    return (*CHECKS, *of_backends)
