"""The same kinds of faults, and healthy runs, on real weights: the first layers of SmolLM2-135M-Instruct.

Skipped where the model is not in the cache; with QLORA_BENCH_REQUIRE_SMOLLM2 set, that is a failure.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping
from typing import Any

import pytest

from bench.ask.models import CONFIG_NAME
from bench.ask.plan import RunRequest
from bench.load.smollm2 import folder
from tests import plants
from tests.faults import LAYER, Fault, assert_found, backward
from tests.rig import BACKENDS, Rig, ask, quiet, settled

__all__ = ["settled"]  # a fixture for this whole module

pytestmark = [
    quiet,
    pytest.mark.slow,
    pytest.mark.slow,
    pytest.mark.skipif(
        not (folder() / CONFIG_NAME).is_file() and "QLORA_BENCH_REQUIRE_SMOLLM2" not in os.environ,
        reason="SmolLM2 is not in the cache; `make smollm2` brings it",
    ),
]

UP, DOWN = f"{LAYER}.10.mlp.up_proj", f"{LAYER}.10.mlp.down_proj"
PRODUCT = ("bitsandbytes.", "aten.mm", "aten.addmm")
FEW = 6
"""Layers, where the fault is none of numbers that only the model's later layers reach."""
SHORT = {"steps": 2}


def real(*, layers: int = FEW, work: Mapping[str, Any] | None = None, **changes: Any) -> RunRequest:
    """A request for the first layers of the model, on 64 tokens a step."""
    architecture = json.loads((folder() / CONFIG_NAME).read_text(encoding="utf-8"))
    return ask(architecture=architecture, layers=layers, work=work, **changes)


FAULTS = [
    Fault(
        "dial 16384: the projection itself", "non_finite", "forward_overflow", UP, "output",
        {"backend": "bnb-nf4", "dtype": "float16", "stress": {UP: 16384.0}, "layers": 12}, operation=PRODUCT,
    ),
    *(
        Fault(
            f"dial 4096, {backend}: the product after it", "non_finite", "forward_overflow", DOWN, "input",
            {"backend": backend, "dtype": "float16", "stress": {UP: 4096.0}, "layers": 12},
            operation=("aten.mul",), inside=f"{LAYER}.10.mlp",
        )
        for backend in ("bnb-nf4", "bnb-int8", "bf16")
    ),
    Fault(
        "dial, values", "non_finite", "forward_overflow", f"{LAYER}.3.self_attn.v_proj", "output",
        {"backend": "bnb-nf4-dq", "dtype": "float16", "stress": {f"{LAYER}.3.self_attn.v_proj": 2.0**16}},
        operation=PRODUCT,
    ),
    Fault(
        "residual stream", "non_finite", "forward_overflow", f"{LAYER}.3", "output",
        {"backend": "awq", "dtype": "float16"}, plants.multiplied(f"{LAYER}.3", 2.0**16),
        operation=("aten.mul",),
    ),
    backward("backward", {"backend": "bnb-nf4"}, plants.gradient_overflowing(f"{LAYER}.3.mlp.up_proj"),
             "3.mlp.up_proj"),
    backward("backward NaN in step 1", {"backend": "eetq"},
             plants.gradient_invalid(f"{LAYER}.4.self_attn.q_proj", plants.at(1)), "4.self_attn.q_proj",
             kind="backward_invalid", step=1),
    Fault(
        "broken absmax", "poisoned", "broken_weights", f"{LAYER}.3.self_attn.k_proj", "output",
        {"backend": "bnb-nf4"},
        plants.weight(f"{LAYER}.3.self_attn.k_proj.weight.quant_state.absmax", math.nan), operation=(),
    ),
    Fault(
        "broken int8 scale", "poisoned", "broken_weights", f"{LAYER}.5.mlp.down_proj", "output",
        {"backend": "bnb-int8"}, plants.weight(f"{LAYER}.5.mlp.down_proj.weight.SCB", math.inf), operation=(),
    ),
    Fault(
        "broken packed scale", "poisoned", "broken_weights", f"{LAYER}.2.mlp.gate_proj", "output",
        {"backend": "gptq"}, plants.weight(f"{LAYER}.2.mlp.gate_proj.scales", math.nan), operation=(),
    ),
    Fault(
        "a step masked", "non_finite", "bad_batch", None, "labels", {}, plants.masked(plants.at(1)), step=1,
        told="holds no answer token",
    ),
    Fault(
        "a row masked altogether", "poisoned", "forward_invalid", f"{LAYER}.4.self_attn.o_proj", "input",
        {"attention": "eager"}, plants.row_masked_altogether(4), operation=("aten._softmax",),
        inside=f"{LAYER}.4.self_attn",
    ),
    Fault("a layer cut out of the graph", "dead", None, plant=plants.detached(f"{LAYER}.3"),
          told="no gradient reached model.layers.0.self_attn.q_proj.lora_A"),
    Fault("a learning rate far too high", "spiking", None,
          ask={"work": {"steps": 5}, "optimizer": {"learning_rate": 0.3}}, told="the loss rose from"),
]  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_fault_planted_in_real_weights_is_found(fault: Fault) -> None:
    assert_found(fault, Rig(real(**{"work": SHORT, **fault.ask}), fault.plant, folder()))


HEALTHY = [
    *((backend, "bfloat16") for backend in BACKENDS if backend != "hqq"),  # its solver takes a while
    ("bnb-nf4", "float16"),
]


@pytest.mark.parametrize(("backend", "dtype"), HEALTHY, ids=lambda value: value)
def test_no_false_alarm_on_the_whole_model(backend: str, dtype: str) -> None:
    """All layers: a model that is cut predicts nothing, and its loss jumps by many nats from row to row."""
    outcome = Rig(real(backend=backend, dtype=dtype, layers=30, work={"steps": 3}), folder=folder()).train()
    assert outcome.verdict.verdict == "healthy", outcome.verdict.reason
    assert outcome.failure is None or outcome.failure.skipped_by_scaler
    assert outcome.record.steps[0].losses[0] < 4


def test_what_overflows_in_float16_is_healthy_in_bfloat16_and_the_same_function() -> None:
    losses = []
    for stress in ({}, {UP: 16384.0}):
        asked = real(backend="bnb-nf4", layers=12, stress=stress, work={"steps": 3})
        outcome = Rig(asked, folder=folder()).train()
        assert outcome.verdict.verdict == "healthy", outcome.verdict.reason
        assert outcome.failure is None
        losses.append([step.losses for step in outcome.record.steps])
    assert losses[0] == losses[1]
