"""The watch over single operations, on small modules of its own and in attention's way."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from bench.probe.operations import Operation, OperationWatch
from tests.plants import _Backward

INF = math.inf
HALF = torch.float16


class Calls(nn.Module):
    """Computes what it is given to compute."""

    def __init__(self, compute: Callable[..., torch.Tensor]) -> None:
        super().__init__()
        self.compute = compute

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.compute(*tensors)


class Named(nn.Module):
    """A model whose only module has a name of ours."""

    def __init__(self, name: str, inner: nn.Module) -> None:
        super().__init__()
        holder: nn.Module = self
        *owners, last = name.split(".")
        for owner in owners:
            holder.add_module(owner, nn.Module())
            holder = holder.get_submodule(owner)
        holder.add_module(last, inner)
        self.inner_name = name

    def forward(self, *tensors: torch.Tensor) -> torch.Tensor:
        return self.get_submodule(self.inner_name)(*tensors)


def watched(
    compute: Callable[..., torch.Tensor], *tensors: torch.Tensor, name: str = "model.layers.0.mlp"
) -> Operation | None:
    """The first operation of ``compute``, in a module called ``name``."""
    model = Named(name, Calls(compute))
    with OperationWatch(model) as watch:
        model(*tensors)
    return watch.found


def half(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=HALF)


def test_finite_operations_are_passed_over() -> None:
    assert watched(lambda x: (x * 2).exp().sum(), torch.ones(4)) is None


def test_the_operation_that_made_it_is_named_with_what_went_in() -> None:
    found = watched(lambda x: (x @ x.t()).sum(), torch.full((2, 8), 200.0, dtype=HALF))
    assert found
    assert (found.name, found.phase, found.module) == ("aten.mm.default", "forward", "model.layers.0.mlp")
    assert (found.value, found.input_abs_max, found.output_dtype) == (INF, 200.0, "float16")
    assert found.description == "matrix product in model.layers.0.mlp, forward"


def test_only_the_first_is_named() -> None:
    found = watched(lambda x: (x * 1000).log() / 0, half(300.0))
    assert found
    assert found.name == "aten.mul.Tensor"


def test_a_factor_is_among_what_went_in() -> None:
    found = watched(lambda x: x * 50000.0, half(3.0))
    assert found
    assert found.input_abs_max == 50000.0


@pytest.mark.parametrize(
    ("compute", "name", "words"),
    [
        (lambda x: x / (x - x), "aten.div.Tensor", "division in m, forward"),
        (lambda x: (x - x) / (x - x), "aten.div.Tensor", "division in m, forward"),
        (lambda x: x.float().mul(1e6).to(HALF), "aten._to_copy.default", "cast to float16 in m, forward"),
        (lambda x: (x * 1e4).pow(2), "aten.pow.Tensor_Scalar", "power in m, forward"),
        (lambda x: x.mul(100).exp(), "aten.exp.default", "exponential in m, forward"),
        (lambda x: (x - x).rsqrt(), "aten.rsqrt.default", "reciprocal square root in m, forward"),
        (lambda x: (-x).sqrt(), "aten.sqrt.default", "sqrt operation in m, forward"),
    ],
)
def test_operations_have_words(compute: Any, name: str, words: str) -> None:
    found = watched(compute, half(3.0), name="m")
    assert found
    assert (found.name, found.description) == (name, words)


# ---- in place


def test_an_operation_in_place_that_overflows_is_named() -> None:
    found = watched(lambda x: x.clone().add_(x), half(60000.0))
    assert found
    assert (found.name, found.value, found.input_abs_max) == ("aten.add_.Tensor", INF, 60000.0)


@pytest.mark.parametrize("bad", [math.nan, INF])
def test_an_operation_in_place_is_not_blamed_for_what_it_found(bad: float) -> None:
    """A bias that is added to a broken product: the product was broken before."""
    broken = torch.tensor([bad, 1.0])
    assert watched(lambda x: broken.clone().add_(x), torch.ones(2)) is None


def test_what_a_copy_overwrites_plays_no_part() -> None:
    garbage = half(math.nan)
    assert watched(lambda x: garbage.clone().copy_(x), half(1.0)) is None
    found = watched(lambda x: torch.full((1,), math.nan, dtype=HALF).copy_(x), torch.tensor([1e6]))
    assert found
    assert (found.name, found.input_abs_max) == ("aten.copy_.default", 1e6)


def test_a_result_that_is_written_into_a_given_tensor_is_looked_at() -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        return torch.mul(x, x, out=torch.full((1,), math.nan, dtype=HALF))

    found = watched(compute, half(1000.0))
    assert found
    assert (found.name, found.value) == ("aten.mul.out", INF)
    assert watched(compute, half(2.0)) is None


@torch.library.custom_op("watched::square_into", mutates_args={"out"})
def square_into(x: torch.Tensor, out: torch.Tensor) -> None:
    """As some kernels of quantization libraries do: nothing is returned."""
    out.copy_(x * x)


def test_a_kernel_that_returns_nothing_is_looked_at_by_what_it_fills() -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        out = torch.full_like(x, math.nan)
        square_into(x, out)
        return out

    found = watched(compute, half(1000.0), name="m")
    assert found
    assert (found.name, found.value, found.input_abs_max) == ("watched.square_into.default", INF, 1000.0)
    assert found.description == "the quantization library's square_into in m, forward"
    assert watched(compute, half(2.0)) is None


# ---- masks


@pytest.mark.parametrize(
    "mask",
    [
        lambda x: x.masked_fill(x > 0, -INF),
        lambda x: torch.where(x > 0, x, -INF),
        lambda x: torch.full_like(x, -INF),
        lambda x: torch.tensor([1.0, -INF]),
        lambda x: torch.empty_like(x).fill_(INF),
    ],
)
def test_infinities_that_somebody_wrote_down_are_no_failure(mask: Any) -> None:
    assert watched(mask, torch.tensor([1.0, -1.0]), name="m") is None


def test_scores_that_a_mask_sends_to_minus_infinity_are_no_failure_in_attention() -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(4, 4, dtype=HALF).masked_fill(
            torch.ones(4, 4).triu(1).bool(), torch.finfo(HALF).min
        )
        return torch.softmax(x - 1000 + mask, dim=-1)

    scores = torch.full((4, 4), -60000.0, dtype=HALF)
    assert watched(compute, scores, name="model.layers.0.self_attn") is None
    outside = watched(compute, scores, name="model.layers.0.mlp")
    assert outside
    assert outside.name == "aten.add.Tensor"


def test_the_softmax_over_a_row_that_is_masked_altogether_is_named() -> None:
    def compute(x: torch.Tensor) -> torch.Tensor:
        mask = torch.zeros(4, 4).masked_fill(torch.ones(4, 4).triu(1).bool(), -INF)
        mask[2] = -INF
        return torch.softmax(x + mask, dim=-1)

    found = watched(compute, torch.randn(4, 4), name="model.layers.0.self_attn")
    assert found
    assert (found.name, found.module) == ("aten._softmax.default", "model.layers.0.self_attn")
    assert math.isnan(found.value)
    assert found.input_abs_max is None
    assert found.description == "softmax in model.layers.0.self_attn, forward"


def test_minus_infinity_out_of_a_projection_is_no_mask() -> None:
    found = watched(lambda x: x * -1000, half(300.0, 1.0), name="model.layers.0.self_attn.q_proj")
    assert found
    assert (found.name, found.value) == ("aten.mul.Tensor", -INF)


# ---- the backward


def backward_of(model: nn.Module, x: torch.Tensor, scale: float = 1.0) -> OperationWatch:
    with OperationWatch(model) as watch:
        loss = model(x).float().sum() * scale
        watch.phase = "backward"
        loss.backward()
    return watch


class Through(nn.Module):
    """The identity; its gradient overflows."""

    def __init__(self, inner: nn.Module | None = None) -> None:
        super().__init__()
        self.inner = inner or nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return _Backward.apply(self.inner(x), lambda gradient: gradient * 1e30 * 1e30)


class Attention(nn.Module):
    def __init__(self, o_proj: nn.Module, core: nn.Module | None = None) -> None:
        super().__init__()
        self.q_proj = nn.Linear(4, 4)
        self.core = core or nn.Identity()
        self.o_proj = o_proj

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, None]:
        weighted: torch.Tensor = torch.softmax(self.q_proj(x), dim=-1) * x
        if isinstance(self.core, Calls):
            weighted = self.core.compute(weighted)  # of attention itself, in no module of its own
        return self.o_proj(weighted), None


class Block(nn.Module):
    def __init__(self, attention: Attention, mode: str | None = None) -> None:
        super().__init__()
        self.self_attn = attention
        self.norm = nn.LayerNorm(4)
        self.mode = mode

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x + self.self_attn(self.norm(x))[0]


class Stack(nn.Module):
    """Named as decoders are."""

    def __init__(self, *blocks: Block, reentrant: bool | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(blocks)
        self.reentrant = reentrant

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x) if self.reentrant is None else checkpoint(layer, x, use_reentrant=self.reentrant)
        return x


X = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("reentrant", [None, False, True])
def test_the_backward_is_told_by_module_and_the_innermost_one(reentrant: bool | None) -> None:
    """Attention hands on what its o_proj put out: the gradient that breaks there is o_proj's."""
    model = Stack(
        Block(Attention(nn.Linear(4, 4))), Block(Attention(Through(nn.Linear(4, 4)))), reentrant=reentrant
    )
    found = backward_of(model, X.clone().requires_grad_()).found
    assert found
    assert (found.phase, found.module, found.name) == (
        "backward",
        "layers.1.self_attn.o_proj",
        "aten.mul.Tensor",
    )


def test_what_lies_between_two_projections_belongs_to_the_module_around_them() -> None:
    core = Calls(lambda t: _Backward.apply(t, lambda gradient: gradient * 1e30 * 1e30))
    model = Stack(Block(Attention(nn.Linear(4, 4))), Block(Attention(nn.Linear(4, 4), core)))
    found = backward_of(model, X.clone().requires_grad_()).found
    assert found
    assert found.module == "layers.1.self_attn"


def test_a_norm_owns_its_backward() -> None:
    model = Stack(Block(Attention(nn.Linear(4, 4))), Block(Attention(nn.Linear(4, 4))))
    model.layers[0].norm = Through(nn.LayerNorm(4))
    found = backward_of(model, X.clone().requires_grad_()).found
    assert found
    assert found.module == "layers.0.norm"


def test_a_forward_that_broke_is_not_found_again_in_the_backward() -> None:
    model = Stack(Block(Attention(nn.Linear(4, 4))))
    model.layers[0].norm = Calls(lambda t: t * 1e30 * 1e30)
    watch = backward_of(model, X.clone().requires_grad_())
    assert watch.found
    assert (watch.found.phase, watch.found.module) == ("forward", "layers.0.norm")


def test_every_hook_is_taken_off_again() -> None:
    model = Stack(Block(Attention(nn.Linear(4, 4))))
    backward_of(model, X.clone().requires_grad_())
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_an_error_inside_leaves_no_hook_and_no_mode_behind() -> None:
    def fail(x: torch.Tensor) -> torch.Tensor:
        raise ValueError("inside")

    model = Named("m", Calls(fail))
    with pytest.raises(ValueError, match="inside"), OperationWatch(model):
        model(X)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    assert torch.ones(2).sum() == 2
