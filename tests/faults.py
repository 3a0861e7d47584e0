"""What a planted fault is, and what must be found of it: verdict, first failure, replay."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from bench.judge.stability import VerdictName
from bench.record.stability import FailureKind, FailurePhase
from bench.run.replay import REPLAYABLE
from tests.rig import Plant, Rig

LAYER = "model.layers"
NO_PLANT = Plant()


@dataclass(frozen=True)
class Fault:
    """What is asked and planted, and what must be found."""

    name: str
    verdict: VerdictName
    kind: FailureKind | None
    """After the replay. None: there must be no first failure."""
    module: str | None = None
    tensor: str | None = None
    ask: Mapping[str, Any] = field(default_factory=dict)
    plant: Plant = NO_PLANT
    step: int = 0
    micro_batch: int | None = 0
    operation: tuple[str, ...] | None = None
    """Beginnings of the names that the operation may have in the replay; (): none can be named, for no
    operation made something broken out of finite values. None: there is nothing to replay."""
    inside: str | None = None
    """The module in which the replay must see it; None: the failure's."""
    seen_first: FailureKind | None = None
    """The kind before the replay, where that taught better."""
    spared: bool = False
    """By the float16 scaler."""
    told: str = ""
    """What the verdict's reason must say besides."""

    @property
    def phase(self) -> FailurePhase | None:
        if self.kind is None:
            return None
        if self.kind == "optimizer_step":
            return "optimizer"
        return "backward" if self.kind.startswith("backward") else "forward"


def backward(
    name: str,
    ask: Mapping[str, Any],
    plant: Plant,
    module: str,
    *,
    kind: FailureKind = "backward_overflow",
    **more: Any,
) -> Fault:
    """A gradient that arrives broken at the adapters of ``module``; the loss stays finite."""
    overflow = kind == "backward_overflow"
    values: dict[str, Any] = {
        "verdict": "poisoned", "kind": kind, "module": f"{LAYER}.{module}", "tensor": "gradient of lora_B",
        "operation": ("aten.mul",) if overflow else ("aten.div",),
        "seen_first": "backward_invalid" if overflow else None, "told": "the gradient norm is NaN",
    }  # fmt: skip
    return Fault(name, ask=ask, plant=plant, **(values | more))


def assert_found(fault: Fault, rig: Rig) -> None:
    """Train, and hold what was found against the fault's line."""
    outcome = rig.train()
    reason, failure = outcome.verdict.reason, outcome.failure
    same("verdict", outcome.verdict.verdict, fault.verdict, reason)
    assert fault.told in reason, f"'{fault.told}' is not in: {reason}"
    if fault.kind is None:
        assert failure is None, failure
        return
    assert failure is not None, reason
    same("kind", failure.kind, fault.seen_first or fault.kind, failure.evidence)
    for name in ("phase", "step", "micro_batch", "module", "tensor"):
        same(name, getattr(failure, name), getattr(fault, name), failure.evidence)
    same("spared", failure.skipped_by_scaler, fault.spared, failure.evidence)
    assert (fault.module or fault.tensor or "") in reason, reason
    same("replayable", failure.kind in REPLAYABLE, fault.operation is not None)
    if fault.operation is not None:
        assert_replayed(fault, rig)


def assert_replayed(fault: Fault, rig: Rig) -> None:
    """The failing micro-batch again, every operation watched."""
    replay, better = rig.replay()
    assert replay.error is None, replay.error
    assert replay.reproduced
    for name in ("kind", "step", "module"):
        same(name, getattr(better, name), getattr(fault, name), better.evidence)
    if not fault.operation:
        same("operation", replay.operation, None, f"in {replay.module}")
        return
    assert (replay.operation or "").startswith(fault.operation), f"{replay.operation} in {replay.module}"
    same("phase of the operation", replay.phase, fault.phase)
    same("module of the operation", replay.module, fault.inside or fault.module)


def same(what: str, found: object, wanted: object, said: str = "") -> None:
    assert found == wanted, f"{what}: found {found!r}, planted {wanted!r}. {said}"
