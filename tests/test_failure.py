"""The finder of the first failure, told by hand what the probes of each step saw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch

from bench.probe.failure import HISTORY, FailureFinder
from bench.probe.gradients import TensorStatistics
from bench.probe.observation import Observation, worst
from bench.probe.ranges import MicroBatchRanges, Place, Seen

NAN, INF = math.nan, math.inf
PARTS = ("self_attn.q_proj", "mlp.up_proj", "mlp.down_proj")
NAMES = [f"model.layers.{layer}.{part}.lora_{half}" for layer in range(3) for part in PARTS for half in "AB"]
FORWARD = [
    "model.embed_tokens",
    *(f"model.layers.{n}{part}" for n in range(3) for part in (*(f".{p}" for p in PARTS), "")),
    "model.norm",
    "lm_head",
]
BACKWARD = [f"model.layers.{n}" for n in (2, 1, 0)]


def seen(module: str, value: float, dtype: torch.dtype, part: Any = "output") -> Seen:
    return Seen(Place(module, part), value, dtype, "cpu")


def ranges(
    forward: Mapping[str, float] | None = None,
    backward: Mapping[str, float] | None = None,
    dtype: torch.dtype = torch.float16,
) -> MicroBatchRanges:
    """One micro-batch in which every place shows 1, except those that are named."""
    there, back = forward or {}, backward or {}
    return MicroBatchRanges(
        [seen(module, there.get(module, 1.0), dtype) for module in FORWARD],
        [seen(module, back.get(module, 1.0), dtype) for module in BACKWARD],
    )


def observation(step: int, batches: Sequence[MicroBatchRanges] | None = None, **changes: Any) -> Observation:
    """A step in which all is well, but for what is named; ``bad``: adapters with two values not finite."""
    told = batches or [ranges()]
    bad: Mapping[str, float] = changes.pop("bad", {})
    norms = tuple(bad.get(name, 0.5) for name in NAMES)
    counts = tuple(2 if name in bad else 0 for name in NAMES)
    values: dict[str, Any] = {
        "step": step,
        "losses": (2.5,) * len(told),
        "target_counts": (40,) * len(told),
        "ranges": told,
        "gradients": TensorStatistics(norms, counts, (0,) * len(NAMES)),
        "gradient_norm": NAN if bad else 1.5,
        "spoilt_weights": (),
        "loss_scale": None,
    }
    return Observation(**(values | changes))


def finder(broken: Mapping[str, str] | None = None, dtype: torch.dtype = torch.float16) -> FailureFinder:
    return FailureFinder(NAMES, broken or {}, "cpu", dtype)


def first(*steps: Observation, applied: bool = True, **broken: str) -> Any:
    told = finder({name.replace("__", "."): text for name, text in broken.items()})
    for step in steps:
        told.look(step, applied=applied)
    return told.found


def test_all_is_well_where_all_is_finite() -> None:
    assert first(*(observation(step) for step in range(5))) is None


def test_the_first_place_in_the_order_of_the_forward_is_named() -> None:
    later = {"model.layers.1.mlp.up_proj": INF, "model.layers.1": NAN, "model.norm": NAN, "lm_head": NAN}
    found = first(observation(0), observation(1, [ranges(later)], losses=(NAN,)))
    assert (found.kind, found.phase, found.step, found.micro_batch) == ("forward_overflow", "forward", 1, 0)
    assert (found.module, found.tensor, found.device) == ("model.layers.1.mlp.up_proj", "output", "cpu")
    assert (found.value, found.dtype_max, found.last_finite_abs_max) == (INF, 65504.0, 1.0)
    assert math.isnan(found.loss)
    for word in ("model.layers.1.mlp.up_proj", "step 1", "micro-batch 0", "65504", "an infinity", "was 1"):
        assert word in found.evidence


@pytest.mark.parametrize(("value", "kind"), [(INF, "overflow"), (NAN, "invalid")])
def test_an_infinity_is_an_overflow_and_a_nan_an_invalid_operation(value: float, kind: str) -> None:
    assert first(observation(0, [ranges({"model.norm": value})])).kind == f"forward_{kind}"
    backward = observation(0, [ranges(backward={"model.layers.2": value})], gradient_norm=NAN)
    assert first(backward).kind == f"backward_{kind}"
    adapter = "model.layers.1.mlp.up_proj.lora_B"
    assert first(observation(0, bad={adapter: value})).kind == f"backward_{kind}"


def test_the_input_of_a_module_is_called_so() -> None:
    told = ranges()
    told.forward.insert(3, seen("model.layers.0.mlp.down_proj", INF, torch.float16, "input"))
    assert first(observation(0, [told])).tensor == "input"


def test_a_place_that_broke_though_the_loss_is_finite_is_a_failure() -> None:
    assert first(observation(0, [ranges({"model.layers.0": INF})])).module == "model.layers.0"


# ---- what comes before the rest


def test_spoilt_weights_come_before_all_else() -> None:
    batches = [ranges({"model.embed_tokens": NAN})]
    told = observation(0, batches, spoilt_weights=tuple(NAMES[4:6]), losses=(NAN,), target_counts=(0,))
    found = first(told)
    assert (found.kind, found.module, found.tensor) == (
        "poisoned_weights", "model.layers.0.mlp.down_proj", "lora_A"
    )  # fmt: skip
    assert "2 trainable tensors" in found.evidence


def test_weights_that_a_finite_step_left_spoilt_are_its_updates_doing() -> None:
    found = first(observation(0), observation(1), observation(2, spoilt_weights=(NAMES[3],)))
    assert (found.kind, found.phase, found.step, found.micro_batch) == (
        "optimizer_step", "optimizer", 1, None
    )  # fmt: skip
    assert (found.module, found.tensor) == ("model.layers.0.mlp.up_proj", "lora_B")


def test_weights_spoilt_after_a_step_that_was_not_finite_are_no_news() -> None:
    """The failure is the first one, and nothing that follows from it takes its place."""
    told = finder()
    assert told.look(observation(0, bad={NAMES[0]: NAN}), applied=True)
    kept = told.found
    assert not told.look(observation(1, spoilt_weights=tuple(NAMES)), applied=True)
    assert not told.look_at_weights(1, NAMES)
    assert told.found is kept
    assert told.final


def test_the_last_update_is_looked_at_as_well() -> None:
    told = finder()
    told.look(observation(0), applied=True)
    assert not told.look_at_weights(0, [])
    assert told.found is None
    assert told.look_at_weights(0, [NAMES[0]])
    assert told.found
    assert (told.found.kind, told.found.step, told.found.module) == (
        "optimizer_step", 0, "model.layers.0.self_attn.q_proj"
    )  # fmt: skip


def test_a_batch_without_targets_explains_its_loss() -> None:
    found = first(observation(3, [ranges(), ranges()], losses=(2.0, NAN), target_counts=(5, 0)))
    assert (found.kind, found.step, found.micro_batch, found.module) == ("bad_batch", 3, 1, None)
    # Where the loss is finite, there is nothing to explain.
    assert first(observation(0, losses=(0.0,), target_counts=(0,))) is None


def test_a_loss_that_is_not_finite_by_itself_is_told_as_such() -> None:
    found = first(observation(0, losses=(INF,)))
    assert (found.kind, found.module, found.tensor, found.value) == ("forward_overflow", None, "loss", INF)


# ---- frozen weights


def test_a_module_with_broken_weights_explains_its_own_output() -> None:
    found = first(observation(0, [ranges({"lm_head": NAN})]), lm_head="weight: 3 of 9 values")
    assert (found.kind, found.module) == ("broken_weights", "lm_head")
    assert "weight: 3 of 9 values" in found.evidence


def test_a_broken_norm_explains_the_first_place_of_its_layer() -> None:
    told = observation(0, [ranges({"model.layers.1.mlp.up_proj": NAN})])
    norm = "model.layers.1.post_attention_layernorm"
    found = first(told, **{norm.replace(".", "__"): "weight: 1 of 9 values"})
    assert (found.kind, found.module) == ("broken_weights", norm)
    assert first(told, **{"model__layers__2__input_layernorm": "weight"}).kind == "forward_invalid"


def test_a_broken_layer_further_on_explains_nothing_before_it() -> None:
    """Its own output is watched: it would have been first itself."""
    told = observation(
        0, [ranges({"model.layers.1.self_attn.q_proj": INF, "model.layers.1.mlp.down_proj": NAN})]
    )
    found = first(told, **{"model__layers__1__mlp__down_proj": "scales: 1 of 9 values"})
    assert (found.kind, found.module) == ("forward_overflow", "model.layers.1.self_attn.q_proj")


# ---- the backward


def test_the_gradient_at_a_layers_output_is_named_where_no_adapter_above_is_spoilt() -> None:
    below = {"model.layers.1": NAN, "model.layers.0": NAN}
    bad = dict.fromkeys(NAMES[:12], NAN)
    found = first(observation(0), observation(1, [ranges(backward=below)], bad=bad))
    assert (found.kind, found.module, found.tensor, found.micro_batch) == (
        "backward_invalid", "model.layers.1", "gradient of the output", 0
    )  # fmt: skip
    assert found.last_finite_abs_max == 1.0


def test_an_adapter_above_is_where_it_began() -> None:
    """The gradient at layer 0's output came out of layer 1, whose up_proj is spoilt and down_proj is not."""
    bad = {name: NAN for name in NAMES if name.startswith(("model.layers.0", "model.layers.1.mlp.up_proj"))}
    bad |= {name: NAN for name in NAMES if name.startswith("model.layers.1.self_attn")}
    found = first(observation(0, [ranges(backward={"model.layers.0": NAN})], bad=bad))
    assert (found.module, found.tensor) == ("model.layers.1.mlp.up_proj", "gradient of lora_B")
    assert found.micro_batch == 0
    assert f"{len(bad)} of {len(NAMES)} adapter tensors" in found.evidence


def test_below_the_first_layer_only_the_adapters_tell() -> None:
    bad = {"model.layers.0.self_attn.q_proj.lora_A": INF}
    found = first(observation(0, bad=bad))
    assert (found.module, found.tensor, found.value) == (
        "model.layers.0.self_attn.q_proj", "gradient of lora_A", INF
    )  # fmt: skip
    assert (found.micro_batch, found.loss) == (0, 2.5)
    # Of several micro-batches the gradients are summed.
    assert first(observation(0, [ranges(), ranges()], bad=bad)).micro_batch is None


def test_a_norm_that_overflows_by_itself_is_told_as_such() -> None:
    found = first(observation(0, gradient_norm=INF))
    assert (found.kind, found.module, found.tensor) == ("backward_overflow", None, "gradient norm")


def test_the_forward_of_the_second_micro_batch_comes_after_the_backward_of_the_first() -> None:
    told = observation(
        0, [ranges(backward={"model.layers.2": NAN}), ranges({"model.embed_tokens": NAN})], gradient_norm=NAN
    )
    found = first(told)
    assert (found.phase, found.micro_batch) == ("backward", 0)


# ---- the scaler


def test_a_failure_that_the_scaler_spared_gives_way_to_one_that_it_did_not() -> None:
    told = finder()
    skipped = {"bad": {NAMES[7]: INF}, "loss_scale": 65536.0}
    assert told.look(observation(0, **skipped), applied=False)
    assert told.found
    assert told.found.skipped_by_scaler
    assert not told.final
    assert "the loss scaler (at 65536) skipped the update" in told.found.evidence
    # The first that it spared stays the first.
    assert not told.look(observation(1, **skipped), applied=False)
    assert told.found.step == 0
    assert told.look(
        observation(2, [ranges({"model.norm": INF})], losses=(NAN,), loss_scale=16384.0), applied=False
    )
    assert (told.found.step, told.found.module, told.found.skipped_by_scaler) == (2, "model.norm", False)
    assert told.final


def test_a_skipped_step_whose_activations_broke_but_not_its_loss_was_spared() -> None:
    told = observation(0, [ranges({"model.layers.2": INF})], gradient_norm=NAN, loss_scale=65536.0)
    assert first(told, applied=False).skipped_by_scaler


# ---- history


def test_the_history_is_of_that_place_oldest_first_micro_batches_before_it_in_the_step_included() -> None:
    place = "model.layers.1.mlp.down_proj"
    steps = [observation(n, [ranges({place: 2.0**n}), ranges({place: 2.0**n + 0.5})]) for n in range(3)]
    found = first(*steps, observation(3, [ranges({place: 8.0}), ranges({place: INF})], losses=(2.0, NAN)))
    assert found.history_abs_max == (1.0, 1.5, 2.0, 2.5, 4.0, 4.5, 8.0)
    assert found.last_finite_abs_max == 8.0
    assert found.growth == 8.0
    assert (found.step, found.micro_batch) == (3, 1)


def test_the_history_is_bounded_and_without_what_was_not_finite() -> None:
    told = finder()
    for step in range(HISTORY + 20):
        value = INF if step == HISTORY else float(step)
        told.look(observation(step, [ranges({"lm_head": value})], loss_scale=2.0), applied=value != INF)
    told.look(observation(200, [ranges({"lm_head": INF})], losses=(NAN,)), applied=True)
    assert told.found
    wanted = [float(step) for step in range(HISTORY + 20) if step != HISTORY][-HISTORY:]
    assert list(told.found.history_abs_max) == wanted


def test_forward_and_backward_of_one_place_have_histories_of_their_own() -> None:
    before = observation(0, [ranges({"model.layers.1": 5.0}, {"model.layers.1": 7.0})])
    broke = observation(1, [ranges(backward={"model.layers.1": INF})], gradient_norm=NAN)
    assert first(before, broke).history_abs_max == (7.0,)


def test_without_a_micro_batch_before_there_is_no_last_finite_value() -> None:
    found = first(observation(0, [ranges({"lm_head": INF})]))
    assert (found.last_finite_abs_max, found.history_abs_max, found.growth) == (None, (), None)
    assert "there was no micro-batch before" in found.evidence


# ---- the summary for the record


def test_the_summary_has_the_worst_of_each_layer_over_all_micro_batches() -> None:
    one = ranges({"model.layers.0.mlp.up_proj": 9.0, "model.norm": 99.0}, {"model.layers.2": 3.0})
    two = ranges({"model.layers.2": INF}, {"model.layers.1": NAN, "model.layers.2": 0.5})
    two.backward.append(seen("model.layers.0.mlp", 50.0, torch.float16))  # of --trace: no layer's output
    summary = observation(0, [one, two]).summary(4)
    assert summary.activation_abs_max == (9.0, 1.0, INF, None)
    assert summary.gradient_abs_max[0] == 1.0
    assert math.isnan(summary.gradient_abs_max[1] or 0)
    assert summary.gradient_abs_max[2:] == (3.0, None)
    assert summary.tensor_norms == (0.5,) * len(NAMES)


@pytest.mark.parametrize(
    ("known", "new", "wanted"), [(None, 2.0, 2.0), (3.0, 2.0, 3.0), (3.0, INF, INF), (INF, 1.0, INF)]
)
def test_the_larger_is_the_worse(known: float | None, new: float, wanted: float) -> None:
    assert worst(known, new) == wanted


def test_a_nan_outranks_every_number() -> None:
    assert math.isnan(worst(INF, NAN))
    assert math.isnan(worst(NAN, INF))
