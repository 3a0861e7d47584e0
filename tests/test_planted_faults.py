"""Faults planted in the toy, one at a time: the verdict, the first failure and the replay must name each.

Everything between the fault and the verdict is the real code (``tests/rig.py``). A fault's line says what
must be found, to the step and the module (``tests/faults.py``); the replay must name the operation.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import pytest
import torch

from tests import plants
from tests.faults import LAYER, Fault, assert_found, backward
from tests.rig import BACKENDS, TINY, Plant, Rig, ask, quiet, settled
from tests.thinned import thinned

__all__ = ["settled"]  # a fixture for this whole module

pytestmark = quiet

NAN, INF = math.nan, math.inf
DIAL = 2.0**18
"""The toy's activations are about 1: times this they leave float16's range, and the scaled weights do not."""
NF4 = ("bitsandbytes.", "aten.mm", "aten.addmm")
"""Fused where there is a kernel for it, else dequantized and multiplied."""
GEMM: Mapping[str, tuple[str, ...]] = {"bnb-nf4": NF4, "bnb-nf4-dq": NF4}
PRODUCT = ("aten.mm", "aten.addmm")


def by_dial(backend: str, module: str) -> Fault:
    """The forward of one linear layer overflows in float16."""
    return Fault(
        f"dial {backend} {module}", "non_finite", "forward_overflow", f"{LAYER}.{module}", "output",
        ask={"backend": backend, "dtype": "float16", "stress": {f"{LAYER}.{module}": DIAL}, "layers": 2},
        operation=GEMM.get(backend, PRODUCT), told="float16 ends at 65504",
    )  # fmt: skip


def by_dial_backward(module: str) -> Fault:
    """The scaled layer comes last of its pair: its forward fits, and its adapter's gradient does not."""
    return Fault(
        f"dial backward {module}", "non_finite", "backward_overflow", f"{LAYER}.{module}",
        tensor="gradient of lora_B",
        ask={"backend": "bnb-nf4", "dtype": "float16", "stress": {f"{LAYER}.{module}": DIAL}, "layers": 2},
        operation=("aten.mul",), seen_first="backward_invalid", spared=True, told="nothing was trained",
    )  # fmt: skip


def broken(backend: str, path: str, value: float = NAN, module: str = "1.mlp.up_proj") -> Fault:
    """A frozen tensor is not finite as loaded."""
    return Fault(
        f"broken {backend} {module} {path} {value}", "poisoned", "broken_weights", f"{LAYER}.{module}",
        tensor="output",
        ask={"backend": backend}, plant=plants.weight(f"{LAYER}.{module}.{path}", value), operation=(),
        told=f"loaded with broken weights ({path}: 1 of",
    )  # fmt: skip


FAULTS = [
    # ---- the forward overflows by the dial
    *(by_dial(backend, "1.mlp.up_proj") for backend in BACKENDS),
    *(by_dial("bnb-nf4", f"0.self_attn.{part}_proj") for part in "qkv"),
    by_dial("hqq", "1.self_attn.v_proj"),
    by_dial("gptq", "0.self_attn.k_proj"),
    by_dial_backward("0.self_attn.o_proj"),
    by_dial_backward("1.mlp.down_proj"),
    # ---- by the residual stream, the activation, the embedding, the head
    Fault(
        "residual stream", "non_finite", "forward_overflow", f"{LAYER}.2", "output",
        {"backend": "bnb-nf4", "dtype": "float16", "layers": 4}, plants.multiplied(f"{LAYER}.2", 2.0**24),
        operation=("aten.mul",),
    ),
    Fault(
        "residual stream, from the mlp", "non_finite", "forward_overflow", f"{LAYER}.2", "output",
        {"backend": "eetq", "dtype": "float16", "layers": 4}, plants.multiplied(f"{LAYER}.2.mlp", 2.0**24),
        operation=("aten.mul",), inside=f"{LAYER}.2.mlp",
    ),
    Fault(
        "residual stream, bfloat16", "poisoned", "forward_overflow", f"{LAYER}.1", "output",
        {"backend": "bnb-nf4-dq"}, plants.output(f"{LAYER}.1", lambda tensor, rig: tensor * 1e30 * 1e30),
        operation=("aten.mul",),
    ),
    Fault(
        "from the attention, in step 2", "non_finite", "forward_overflow", f"{LAYER}.2.mlp.gate_proj",
        "output", {"backend": "hqq", "dtype": "float16", "layers": 4},
        plants.multiplied(f"{LAYER}.2.self_attn", 2.0**24, plants.at(2)), step=2,
        operation=("aten.mul",), inside=f"{LAYER}.2.self_attn", seen_first="forward_invalid",
    ),
    Fault(
        "activation", "non_finite", "forward_overflow", f"{LAYER}.1.mlp.down_proj", "input",
        {"backend": "awq", "dtype": "float16"}, plants.multiplied(f"{LAYER}.1.mlp.act_fn", 2.0**24),
        operation=("aten.mul",), inside=f"{LAYER}.1.mlp.act_fn",
    ),
    Fault(
        "activation, traced", "non_finite", "forward_overflow", f"{LAYER}.1.mlp.act_fn", "output",
        {"backend": "awq", "dtype": "float16", "trace": True},
        plants.multiplied(f"{LAYER}.1.mlp.act_fn", 2.0**24), operation=("aten.mul",),
    ),
    Fault(
        "embedding", "non_finite", "forward_overflow", "model.embed_tokens", "output",
        {"backend": "gptq", "dtype": "float16"}, plants.multiplied("model.embed_tokens", 2.0**24),
        operation=("aten.mul",),
    ),
    Fault(
        "head", "non_finite", "forward_overflow", "lm_head", "output",
        {"dtype": "float16"}, plants.multiplied("lm_head", 2.0**24), operation=("aten.mul",),
    ),
    # ---- the backward alone
    *(
        backward(f"backward {dtype} 1.mlp.up_proj", {"backend": "bnb-nf4", "dtype": dtype},
                 plants.gradient_overflowing(f"{LAYER}.1.mlp.up_proj"), "1.mlp.up_proj")
        for dtype in ("bfloat16", "float32")
    ),
    backward("backward 2.self_attn.q_proj", {"backend": "awq"},
             plants.gradient_overflowing(f"{LAYER}.2.self_attn.q_proj"), "2.self_attn.q_proj"),
    backward("backward of a whole layer", {"backend": "bnb-int8"},
             plants.gradient_overflowing(f"{LAYER}.1"), "1.mlp.down_proj", inside=f"{LAYER}.1"),
    backward("backward 1.mlp.gate_proj, traced", {"backend": "eetq", "trace": True},
             plants.gradient_overflowing(f"{LAYER}.1.mlp.gate_proj"), "1.mlp.gate_proj.lora_B.default",
             tensor="gradient of the output", seen_first=None, inside=f"{LAYER}.1.mlp.gate_proj"),
    backward("backward NaN 2.mlp.down_proj", {"backend": "hqq"},
             plants.gradient_invalid(f"{LAYER}.2.mlp.down_proj"), "2.mlp.down_proj", kind="backward_invalid"),
    backward("backward NaN 0.self_attn.v_proj", {"backend": "eetq"},
             plants.gradient_invalid(f"{LAYER}.0.self_attn.v_proj"), "0.self_attn.v_proj",
             kind="backward_invalid"),
    # No adapter lies between these and the layer below, at whose output the gradient is seen first.
    backward("backward NaN of a norm", {"backend": "gptq"},
             plants.gradient_invalid(f"{LAYER}.1.input_layernorm"), "0", kind="backward_invalid",
             tensor="gradient of the output", inside=f"{LAYER}.1.input_layernorm"),
    backward("backward NaN of the last norm", {"backend": "gptq"}, plants.gradient_invalid("model.norm"), "2",
             kind="backward_invalid", tensor="gradient of the output", inside="model.norm"),
    backward("backward of the head", {}, plants.gradient_overflowing("lm_head"), "2",
             tensor="gradient of the output", inside="lm_head"),
    Fault(
        "the norm alone overflows", "non_finite", "backward_overflow", None, "gradient norm",
        {"dtype": "float32"},
        plants.gradient_multiplied(f"{LAYER}.1", 1e24), operation=(), told="the gradient norm is Infinity",
    ),
    # ---- frozen weights that are broken as loaded
    broken("bf16", "weight"),
    broken("bf16", "weight", INF, "2.self_attn.o_proj"),
    broken("bnb-nf4", "weight.quant_state.absmax"),
    broken("bnb-nf4", "weight.quant_state.absmax", INF, "0.mlp.down_proj"),
    broken("bnb-nf4", "bias", NAN, "1.self_attn.q_proj"),
    broken("bnb-nf4-dq", "weight.quant_state.state2.absmax"),
    broken("bnb-nf4-dq", "weight.quant_state.offset", INF),
    broken("bnb-int8", "weight.SCB"),
    broken("bnb-int8", "weight.SCB", INF, "2.self_attn.k_proj"),
    broken("hqq", "meta.scale"),
    broken("hqq", "meta.zero", NAN, "0.self_attn.o_proj"),
    broken("eetq", "weight_scale"),
    broken("eetq", "weight_scale", INF, "2.mlp.gate_proj"),
    broken("gptq", "scales"),
    broken("awq", "scales"),
    broken("awq", "scales", INF, "1.self_attn.v_proj"),
    broken("bf16", "weight", NAN, "1.post_attention_layernorm"),
    broken("hqq", "weight", INF, "2.input_layernorm"),
    Fault(
        "broken last norm", "poisoned", "broken_weights", "model.norm", "output", {"backend": "awq"},
        plants.weight("model.norm.weight", INF), operation=(),
    ),
    Fault(
        "broken embedding", "poisoned", "broken_weights", "model.embed_tokens", "output",
        {"backend": "bnb-nf4"},
        plants.weight("model.embed_tokens.weight", NAN, place=None), operation=(),
    ),
    Fault(
        "broken embedding of a word that no text holds, as the tied head", "poisoned", "broken_weights",
        "lm_head", "output", {}, plants.weight("model.embed_tokens.weight", NAN, place=0), operation=(),
    ),
    Fault(
        "a broken layer behind one that overflows", "non_finite", "forward_overflow",
        f"{LAYER}.1.self_attn.v_proj", "output",
        {"dtype": "float16", "stress": {f"{LAYER}.1.self_attn.v_proj": DIAL}},
        plants.weight(f"{LAYER}.1.mlp.down_proj.weight", NAN), operation=PRODUCT,
    ),
    Fault(
        "the first of two broken layers", "poisoned", "broken_weights", f"{LAYER}.1.mlp.gate_proj", "output",
        {},
        plants.both(plants.weight(f"{LAYER}.2.self_attn.q_proj.weight", NAN),
                    plants.weight(f"{LAYER}.1.mlp.gate_proj.weight", NAN)), operation=(),
    ),
    Fault(
        "a broken table entry that no weight uses", "non_finite", None, ask={"backend": "bnb-nf4-dq"},
        plant=plants.weight(f"{LAYER}.1.mlp.up_proj.weight.quant_state.state2.code", NAN),
        told="frozen weights are not all finite as loaded (model.layers.1.mlp.up_proj",
    ),
    # ---- batches
    Fault(
        "a whole step masked", "non_finite", "bad_batch", None, "labels",
        {"work": {"without_targets": "train"}},
        plants.masked(plants.at(2)), step=2, told="holds no answer token",
    ),
    # The proof that gradients arrive must not take this step for one whose adapters are dead.
    Fault(
        "the first step masked", "non_finite", "bad_batch", None, "labels",
        {"work": {"without_targets": "train"}},
        plants.masked(plants.at(0)), told="holds no answer token",
    ),
    Fault(
        "one micro-batch masked", "non_finite", "bad_batch", None, "labels",
        {"backend": "bnb-nf4", "work": {"without_targets": "train", "gradient_accumulation_steps": 2}},
        plants.masked(plants.at(1, 1)), step=1, micro_batch=1, told="holds no answer token",
    ),
    Fault(
        "an id outside the vocabulary", "not_judged", "bad_batch", "model.embed_tokens", "input_ids", {},
        plants.outside(512, plants.at(0)), told="token id 512 (row 0, position 11)",
    ),
    Fault(
        "a negative id in a later micro-batch", "not_judged", "bad_batch", "model.embed_tokens", "input_ids",
        {"work": {"gradient_accumulation_steps": 2}}, plants.outside(-1, plants.at(2, 1)),
        step=2, micro_batch=1, told="token id -1",
    ),
    # ---- attention
    *(
        Fault(
            f"a row masked altogether, {dtype}", verdict, "forward_invalid", f"{LAYER}.1.self_attn.o_proj",
            "input", {"dtype": dtype, "attention": "eager"}, plants.row_masked_altogether(1),
            operation=("aten._softmax",), inside=f"{LAYER}.1.self_attn",
        )
        for dtype, verdict in (("bfloat16", "poisoned"), ("float16", "non_finite"))
    ),
    # ---- optimizer, adapters
    Fault(
        "an update that overflows", "poisoned", "optimizer_step", f"{LAYER}.0.self_attn.q_proj", "lora_A",
        {"backend": "bnb-nf4", "optimizer": {"learning_rate": 1e20, "weight_decay": 1e20}}, micro_batch=None,
        told="the update of step 0 left 42 of 42",
    ),
    Fault(
        "the last update overflows", "poisoned", "optimizer_step", f"{LAYER}.0.self_attn.q_proj", "lora_A",
        {"work": {"steps": 1, "warmup_steps": 0}, "optimizer": {"learning_rate": 1e20, "weight_decay": 1e20}},
        micro_batch=None, told="though its losses and gradients were finite",
    ),
    Fault(
        "a learning rate that leaves float16 at once", "non_finite", "forward_overflow",
        f"{LAYER}.0.self_attn.q_proj", "output",
        {"backend": "bnb-nf4", "dtype": "float16", "optimizer": {"learning_rate": 1e5}}, step=1,
        operation=("aten._to_copy",), inside=f"{LAYER}.0.self_attn.q_proj.lora_B.default",
        seen_first="forward_invalid",
    ),
    Fault(
        "a learning rate far too high", "spiking", None,
        ask={"backend": "bnb-nf4", "architecture": {**TINY, "initializer_range": 0.2},
             "optimizer": {"learning_rate": 10.0}}, told="the gradient norm jumped to",
    ),
    Fault(
        "an adapter that was NaN before", "poisoned", "poisoned_weights", f"{LAYER}.1.mlp.up_proj", "lora_A",
        {"backend": "hqq"}, plants.adapter(f"{LAYER}.1.mlp.up_proj.lora_A", NAN), micro_batch=None,
    ),
    Fault(
        "an adapter that was infinite before", "poisoned", "poisoned_weights", f"{LAYER}.2.self_attn.k_proj",
        "lora_B", {"dtype": "float16"}, plants.adapter(f"{LAYER}.2.self_attn.k_proj.lora_B", INF),
        micro_batch=None,
    ),
    # ---- dead
    Fault("a layer cut out of the graph", "dead", None, ask={"backend": "bnb-nf4"},
          plant=plants.detached(f"{LAYER}.1"),
          told="no gradient reached model.layers.0.self_attn.q_proj.lora_A"),
    Fault("one adapter cut out of the graph", "dead", None, ask={"backend": "eetq"},
          plant=plants.detached(f"{LAYER}.1.mlp.up_proj"),
          told="no gradient reached model.layers.1.mlp.up_proj"),
    Fault("a gradient of zero from the start", "dead", None, ask={"backend": "gptq"},
          plant=plants.gradient_multiplied("model.norm", 0.0), told="is zero everywhere"),
    Fault("a gradient of zero after the first step", "dead", None,
          plant=plants.gradient_multiplied("model.norm", 0.0, plants.since(1)),
          told="exactly 0 in all 3 measured steps"),
    Fault("one adapter's gradient of zero after the first step", "dead", None, ask={"backend": "awq"},
          plant=plants.gradient_multiplied(f"{LAYER}.1.mlp.up_proj", 0.0, plants.since(1)),
          told="model.layers.1.mlp.up_proj.lora_A, model.layers.1.mlp.up_proj.lora_B"),
    # EETQ keeps its scales in float16: a weight divided by 2**18 has none left.
    Fault("eetq's scales flushed to zero by the dial", "dead", None,
          ask={"backend": "eetq", "stress": {f"{LAYER}.1.mlp.up_proj": DIAL}},
          told="model.layers.1.mlp.gate_proj.lora_B is zero everywhere"),
    # ---- float16's scaler
    backward("the scaler skips every step", {"backend": "bnb-nf4", "dtype": "float16"},
             plants.gradient_multiplied(f"{LAYER}.1.mlp", 1e9), "1.mlp.down_proj", verdict="non_finite",
             inside=f"{LAYER}.1.mlp", spared=True, told="nothing was trained: the loss scaler skipped all 4"),
    # ---- micro-batches
    Fault(
        "micro-batch 1, forward", "poisoned", "forward_overflow", f"{LAYER}.1.self_attn.k_proj", "output",
        {"backend": "bnb-nf4", "work": {"gradient_accumulation_steps": 2}},
        plants.output(f"{LAYER}.1.self_attn.k_proj", lambda t, rig: t * 1e30 * 1e30, plants.at(1, 1)), step=1,
        micro_batch=1,
        operation=("aten.mul",), told="the loss is NaN at step 1",
    ),
    backward("micro-batch 1, backward", {"backend": "hqq", "work": {"gradient_accumulation_steps": 2}},
             plants.gradient_overflowing(f"{LAYER}.1.mlp.up_proj", plants.at(1, 1)), "1.mlp.up_proj",
             step=1, micro_batch=1),
    # Below the first layer nothing watches, so the summed gradients do not say which micro-batch it was.
    backward("micro-batch 1, backward in the first layer", {"work": {"gradient_accumulation_steps": 2}},
             plants.gradient_overflowing(f"{LAYER}.0.mlp.up_proj", plants.at(1, 1)), "0.mlp.up_proj",
             step=1, micro_batch=None),
    # ---- under every way of checkpointing
    *(
        Fault(
            f"forward, checkpointing {mode}", "non_finite", "forward_overflow", f"{LAYER}.1.mlp.up_proj",
            "output", {"backend": "bnb-nf4", "dtype": "float16", "checkpointing": mode,
             "stress": {f"{LAYER}.1.mlp.up_proj": DIAL}}, operation=NF4,
        )
        for mode in ("none", "reentrant", "non_reentrant")
    ),
    *(
        backward(f"backward, checkpointing {mode}", {"backend": "eetq", "checkpointing": mode},
                 plants.gradient_invalid(f"{LAYER}.1.self_attn.k_proj", plants.at(1)), "1.self_attn.k_proj",
                 kind="backward_invalid", step=1)
        for mode in ("none", "reentrant", "non_reentrant")
    ),
]  # fmt: skip


@pytest.mark.parametrize("fault", thinned(FAULTS, 3), ids=lambda fault: fault.name.replace(" ", "-"))
def test_a_planted_fault_is_found_where_it_was_planted(fault: Fault) -> None:
    assert_found(fault, Rig(ask(**{"layers": 3, **fault.ask}), fault.plant))


def test_there_are_many_faults_and_each_has_a_name_of_its_own() -> None:
    assert len({fault.name for fault in FAULTS}) == len(FAULTS) > 70


# ---- the same without the fault -------------------------------------------------------------------


@pytest.mark.parametrize(
    "module", thinned(["1.mlp.up_proj", "0.self_attn.v_proj", "0.self_attn.q_proj", "1.mlp.down_proj"], 4)
)
@pytest.mark.parametrize("backend", [name for name in BACKENDS if name != "eetq"])
def test_what_overflows_in_float16_is_healthy_in_bfloat16(backend: str, module: str) -> None:
    outcome = Rig(ask(backend, stress={f"{LAYER}.{module}": DIAL})).train()
    assert outcome.verdict.verdict == "healthy", outcome.verdict.reason
    assert outcome.failure is None


def test_steps_that_the_scaler_skips_while_it_searches_are_no_failure() -> None:
    work = {"steps": 10, "warmup_steps": 4}
    plant = plants.gradient_multiplied(f"{LAYER}.1", 30.0)
    outcome = Rig(ask("bnb-nf4", dtype="float16", layers=3, work=work), plant).train()
    assert outcome.verdict.verdict == "healthy", outcome.verdict.reason
    applied = [step.applied for step in outcome.record.steps]
    assert not applied[0]
    assert all(applied[4:])
    assert outcome.failure is not None
    assert outcome.failure.skipped_by_scaler


def test_a_failure_that_no_scaler_spared_takes_the_place_of_one_that_it_did() -> None:
    """The scaler skips the first steps; the forward overflows in step 7."""
    both = (
        plants.gradient_multiplied(f"{LAYER}.1", 30.0),
        plants.multiplied(f"{LAYER}.2", 2.0**24, plants.at(7)),
    )

    def plant(rig: Rig) -> None:
        for one in both:
            assert one.model
            one.model(rig)

    work = {"steps": 10, "warmup_steps": 4}
    rig = Rig(ask("bnb-nf4", dtype="float16", layers=3, work=work), Plant(model=plant))
    failure = rig.train().failure
    assert failure is not None
    assert (failure.kind, failure.step, failure.module) == ("forward_overflow", 7, f"{LAYER}.2")
    assert not failure.skipped_by_scaler
    replay, _ = rig.replay()
    assert (replay.reproduced, replay.phase, replay.module) == (True, "forward", f"{LAYER}.2")


# ---- what else a failure says ---------------------------------------------------------------------


def test_a_failure_that_comes_later_tells_how_the_numbers_grew() -> None:
    rig = Rig(
        ask("bnb-nf4", dtype="float16", layers=3, work={"steps": 6}),
        plants.growing(f"{LAYER}.1.mlp.up_proj", 30.0),
    )
    outcome = rig.train()
    failure = outcome.failure
    assert failure is not None
    assert (failure.kind, failure.step) == ("forward_overflow", 4)
    assert failure.module == f"{LAYER}.1.mlp.up_proj"
    assert failure.dtype_max == 65504.0
    assert len(failure.history_abs_max) == 4
    factors = [b / a for a, b in zip(failure.history_abs_max, failure.history_abs_max[1:], strict=False)]
    assert all(15 < factor < 60 for factor in factors)
    assert failure.last_finite_abs_max == failure.history_abs_max[-1]
    assert failure.growth == pytest.approx(failure.history_abs_max[-1] / failure.history_abs_max[0])
    assert failure.growth is not None
    assert failure.growth > 15**3
    probes = [step.probe for step in outcome.record.steps]
    assert [probe is not None and math.isfinite(probe.activation_abs_max[1] or 0) for probe in probes] == [
        True, True, True, True, False, False,
    ]  # fmt: skip


def test_clipping_spreads_one_nan_over_all_adapters_and_the_failure_names_the_first() -> None:
    plant = plants.gradient_invalid(f"{LAYER}.1.self_attn.v_proj", plants.at(1))
    rig = Rig(ask("bnb-nf4", layers=3, work={"steps": 2}), plant)
    outcome = rig.train()
    assert outcome.verdict.verdict == "poisoned"
    assert all(bool(tensor.isnan().all()) for tensor in rig.adapters.tensors.values())
    names, probe = outcome.record.lora.names, outcome.record.steps[1].probe
    assert probe is not None
    spoilt = [name for name, count in zip(names, probe.non_finite_values, strict=True) if count]
    assert all(name.startswith((f"{LAYER}.0.", f"{LAYER}.1.self_attn.v_proj")) for name in spoilt)
    assert outcome.failure is not None
    assert outcome.failure.module == f"{LAYER}.1.self_attn.v_proj"


def test_the_aftermath_tells_what_heals_an_overflow() -> None:
    rig = Rig(ask("bnb-nf4", dtype="float16", stress={f"{LAYER}.1.mlp.up_proj": DIAL}))
    outcome = rig.investigate(rig.train())
    assert outcome.record.replay is not None
    heals = {remedy.change: remedy.heals for remedy in outcome.record.replay.remedies}
    assert heals == {"attention": False, "float32_adapters": False, "bfloat16": True}
    there = outcome.record.replay.remedies[-1].abs_max_there
    assert there is not None
    assert 65504 < there < 2**20
    assert "healed by bfloat16" in outcome.verdict.reason


def test_the_aftermath_tells_that_another_attention_heals_a_row_masked_altogether() -> None:
    rig = Rig(ask(layers=3, attention="eager"), plants.row_masked_altogether(1))
    outcome = rig.investigate(rig.train())
    assert outcome.record.replay is not None
    assert outcome.record.replay.operation == "aten._softmax.default"
    assert outcome.record.first_failure is not None
    assert outcome.record.first_failure.kind == "forward_invalid"
    assert "softmax" in outcome.verdict.reason


def test_the_rig_computes_in_one_thread() -> None:
    assert torch.get_num_threads() == 1
