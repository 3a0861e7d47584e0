"""The always-on probe against a brute-force computation, with the toy under real backends."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from bench.probe.ranges import BETWEEN, MicroBatchRanges, Place, RangeProbe, abs_max, plain_name
from bench.run.training import make_trainer, micro_batch, micro_batch_loss
from bench.run.workload import Batch
from tests.rig import CPU, Rig, ask, quiet, settled

__all__ = ["settled"]  # a fixture for this whole module

pytestmark = quiet

LAYERS = 3
MODES = ("none", "reentrant", "non_reentrant")
Tensors = list[tuple[Place, torch.Tensor]]


class Stand:
    """A rig with adapters that are not zero, so that each of their places has something to show."""

    def __init__(self, backend: str = "bnb-nf4", dtype: str = "bfloat16", mode: str = "none") -> None:
        self.rig = Rig(ask(backend, dtype=dtype, layers=LAYERS, checkpointing=mode))
        with torch.no_grad():
            for name, tensor in self.rig.adapters.tensors.items():
                if name.endswith("lora_B"):
                    tensor.uniform_(-0.05, 0.05, generator=torch.Generator().manual_seed(len(name)))
        reader = self.rig._reader = AnyPlace()
        self.trainer = make_trainer(self.rig.adapters, self.rig.request, reader, [CPU], dtype)
        source = self.rig.builder.reader()
        self.batches = [source.next_batch() for _ in range(3)]
        self.model = self.rig.adapters.model

    def probe(self, *, fine: bool = False) -> RangeProbe:
        return RangeProbe(self.model, self.rig.built.layers, fine=fine)

    def step(self, batch: Batch, begins: Callable[[], None] = lambda: None) -> torch.Tensor:
        loss = micro_batch_loss(self.trainer, batch)
        begins()
        (loss * self.scale).backward()
        return loss.detach()

    scale = 1.0

    def ranges(self, batch: Batch, *, fine: bool = False) -> MicroBatchRanges:
        """As the training loop watches one micro-batch."""
        probe = self.probe(fine=fine)
        probe.forward_begins()
        self.step(batch, probe.backward_begins)
        probe.ends()
        probe.remove()
        (found,) = probe.read()
        return found


class AnyPlace:
    """The rig asks where a batch stands; here that plays no part."""

    def place_of(self, ids: torch.Tensor) -> tuple[int, int]:
        return 0, 0


def brute_force(stand: Stand, batch: Batch) -> tuple[Tensors, Tensors]:
    """Every tensor that the probe is to tell of, kept whole: forward, and gradients of layer outputs."""
    forward: Tensors = []
    backward: Tensors = []
    handles = []
    layers = {f"model.layers.{layer}" for layer in range(LAYERS)}
    wanted = {*layers, *stand.rig.built.layers, "model.embed_tokens", "model.norm", "lm_head"}

    def keep(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensor = output[0] if isinstance(output, tuple) else output
            forward.append((Place(name, "output"), tensor.detach().clone()))
            if name in layers:
                tensor.register_hook(lambda g: backward.append((Place(name, "output"), g.detach().clone())))

        return hook

    def keep_input(name: str) -> Callable[..., None]:
        return lambda module, inputs: forward.append((Place(name, "input"), inputs[0].detach().clone()))

    for name in wanted:
        module = stand.rig.module(name)
        if name.endswith(BETWEEN):
            handles.append(module.register_forward_pre_hook(keep_input(name)))
        handles.append(module.register_forward_hook(keep(name)))
    stand.step(batch)
    for handle in handles:
        handle.remove()
    return forward, backward


def largest(tensor: torch.Tensor) -> float:
    return max(abs(value) for value in tensor.double().flatten().tolist())


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("bf16", "float32"), ("bnb-nf4", "bfloat16"), ("hqq", "float16"), ("bnb-int8", "bfloat16")],
)
def test_every_maximum_is_the_one_of_the_whole_tensor(backend: str, dtype: str) -> None:
    stand = Stand(backend, dtype)
    forward, backward = brute_force(stand, stand.batches[0])
    found = stand.ranges(stand.batches[0])
    assert [(seen.place, seen.abs_max) for seen in found.forward] == [(p, largest(t)) for p, t in forward]
    assert [(seen.place, seen.abs_max) for seen in found.backward] == [(p, largest(t)) for p, t in backward]
    assert [seen.dtype for seen in found.forward] == [tensor.dtype for _, tensor in forward]
    assert [seen.place.layer for seen in found.backward] == [2, 1, 0]
    # Embedding, last norm and head; each layer, its 7 projections, and 2 inputs.
    assert len(found.forward) == 3 + LAYERS * (1 + 7 + 2)


@pytest.mark.parametrize("mode", MODES)
def test_checkpointing_neither_repeats_nor_loses_anything(mode: str) -> None:
    plain, checkpointed = Stand(mode="none"), Stand(mode=mode)
    wanted, found = plain.ranges(plain.batches[0]), checkpointed.ranges(checkpointed.batches[0])
    assert found.forward == wanted.forward
    assert found.backward == wanted.backward


@pytest.mark.parametrize("mode", MODES)
def test_the_fine_probe_sees_all_that_the_other_sees_and_more(mode: str) -> None:
    stand = Stand(mode=mode)
    coarse, fine = (stand.ranges(stand.batches[0], fine=fine) for fine in (False, True))
    places = [seen.place for seen in fine.forward]
    assert len(places) == len(set(places))
    assert [seen for seen in fine.forward if seen in coarse.forward] == coarse.forward
    modules = {place.module for place in places}
    for inner in ("input_layernorm", "self_attn", "mlp", "mlp.act_fn", "mlp.up_proj.lora_A.default"):
        assert f"model.layers.1.{inner}" in modules
    assert {seen.place for seen in coarse.backward} < {seen.place for seen in fine.backward}
    backward = {seen.place.module: seen.abs_max for seen in fine.backward}
    assert backward["model.layers.1.mlp.up_proj"] > 0


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("fine", [False, True])
def test_the_probe_changes_no_gradient(mode: str, fine: bool) -> None:
    stand = Stand(mode=mode)
    gradients = []
    for watched in (False, True, False):
        if watched:
            stand.ranges(stand.batches[0], fine=fine)
        else:
            stand.step(stand.batches[0])
        gradients.append(
            [tensor.grad.clone() for tensor in stand.trainer.parameters if tensor.grad is not None]
        )
        for tensor in stand.trainer.parameters:
            tensor.grad = None
    assert len(gradients[0]) == LAYERS * 14
    for other in gradients[1:]:
        assert all(torch.equal(a, b) for a, b in zip(gradients[0], other, strict=True))


@pytest.mark.parametrize("mode", MODES)
def test_a_probe_that_looks_at_the_forward_only_does_not_upset_checkpointing(mode: str) -> None:
    """Non-reentrant checkpointing raises CheckpointError where the second forward saves other tensors."""
    stand = Stand(mode=mode)
    probe = stand.probe()
    probe.forward_begins()
    stand.step(stand.batches[0], probe.ends)
    probe.forward_begins()
    stand.step(stand.batches[1], probe.backward_begins)
    probe.ends()
    probe.remove()
    first, second = probe.read()
    assert not first.backward
    assert len(second.backward) == LAYERS


def test_micro_batches_are_kept_apart_and_read_once() -> None:
    stand = Stand(mode="non_reentrant")
    alone = [stand.ranges(batch) for batch in stand.batches]
    watch = stand.probe()
    for batch in stand.batches:
        watch.forward_begins()
        stand.step(batch, watch.backward_begins)
        watch.ends()
    assert watch.read() == alone
    assert watch.read() == []
    assert alone[0].forward != alone[1].forward


def test_the_training_loop_drives_it() -> None:
    stand = Stand()

    class Watching:
        ranges = stand.probe()

    stand.trainer.watch = Watching()
    micro_batch(stand.trainer, stand.batches[0], 1)
    (found,) = Watching.ranges.read()
    assert found == Stand().ranges(stand.batches[0])


def test_nothing_is_recorded_between_the_micro_batches() -> None:
    stand = Stand()
    probe = stand.probe()
    stand.step(stand.batches[0])
    assert probe.read() == []


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


@pytest.mark.parametrize("fine", [False, True])
def test_every_hook_is_taken_off_again(fine: bool) -> None:
    stand = Stand()
    before = hooks(stand.model)
    probe = stand.probe(fine=fine)
    assert hooks(stand.model) > before + 3 + LAYERS * 10 - 1
    probe.remove()
    assert hooks(stand.model) == before
    probe.forward_begins()
    stand.step(stand.batches[0], probe.backward_begins)
    assert probe.read() == [MicroBatchRanges()]


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_what_is_not_finite_comes_through_in_the_forward(value: float) -> None:
    stand = Stand()
    place = Place("model.layers.1.mlp.up_proj", "output")

    def spoil(module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        spoilt = output.clone()
        spoilt[0, 1, 2] = value
        return spoilt

    stand.rig.module(place.module).register_forward_hook(spoil)
    found = {seen.place: seen.abs_max for seen in stand.ranges(stand.batches[0]).forward}
    assert math.isnan(found[place]) if math.isnan(value) else found[place] == math.inf
    assert all(math.isfinite(size) for place, size in found.items() if place.layer == 0)


def test_what_overflows_in_the_backward_comes_through() -> None:
    stand = Stand("bf16", "float32")
    stand.scale = 1e38
    found = stand.ranges(stand.batches[0])
    assert all(math.isfinite(seen.abs_max) for seen in found.forward)
    plain = Stand("bf16", "float32").ranges(stand.batches[0])
    for seen, without in zip(found.backward, plain.backward, strict=True):
        assert seen.abs_max == pytest.approx(without.abs_max * 1e38, rel=1e-4)
    stand.scale = math.inf
    assert not any(math.isfinite(seen.abs_max) for seen in stand.ranges(stand.batches[0]).backward)


@given(st.lists(st.floats(width=16, allow_nan=True), min_size=1, max_size=12))
def test_the_absolute_maximum_is_the_largest_and_a_nan_outranks_all(values: list[float]) -> None:
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        tensor = torch.tensor(values, dtype=dtype)
        found, wanted = float(abs_max(tensor)), float(tensor.float().abs().max())
        assert math.isnan(found) if math.isnan(wanted) else found == wanted


def test_the_absolute_maximum_of_zeros_is_zero_without_a_sign() -> None:
    for zeros in (torch.zeros(3), -torch.zeros(3), torch.tensor([0.0, -0.0])):
        assert math.copysign(1, float(abs_max(zeros))) == 1


def test_the_absolute_maximum_leaves_the_graph_alone() -> None:
    tensor = torch.ones(3, requires_grad=True)
    assert not abs_max(tensor * 2).requires_grad
    assert abs_max(tensor).dtype == torch.float32


@pytest.mark.parametrize(
    ("name", "plain"),
    [
        ("base_model.model.model.layers.0.mlp.up_proj.base_layer", "model.layers.0.mlp.up_proj"),
        ("base_model.model.lm_head", "lm_head"),
        ("model.norm", "model.norm"),
    ],
)
def test_names_are_those_of_the_model_without_peft(name: str, plain: str) -> None:
    assert plain_name(name) == plain


@pytest.mark.parametrize(
    ("module", "layer"),
    [("model.layers.12.mlp", 12), ("model.layers.3", 3), ("model.norm", None), ("sublayers.4.x", None)],
)
def test_a_place_knows_its_layer(module: str, layer: int | None) -> None:
    assert Place(module, "output").layer == layer
