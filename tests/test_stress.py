"""The dial: what it takes, what it refuses, and that it leaves the function and every gradient alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bench.ask.stress import FAMILIES, Pair, module_names, parse_stress, resolve_stress
from bench.errors import BadValue
from bench.load.model import skeleton
from bench.load.stress import TOLERANCE, StressedWeights, prove, scale_adapters
from bench.load.weights import SyntheticWeights
from bench.run.fidelity import gradients_on
from bench.run.training import make_trainer
from tests.rig import CPU, TINY, Rig, ask, quiet, settled

__all__ = ["settled"]  # a fixture for this whole module

pytestmark = quiet

LAYER = "model.layers.1"
PAIRS = {
    "mlp.up_proj": "mlp.down_proj",
    "self_attn.v_proj": "self_attn.o_proj",
    "self_attn.q_proj": "self_attn.k_proj",
}
BOTH_WAYS = [*PAIRS, *PAIRS.values()]


# ---- what is typed


def test_texts_become_factors() -> None:
    assert parse_stress(["model.layers.1.mlp.up_proj=16384", "model.layers.*.self_attn.v_proj=2.5e-3"]) == {
        "model.layers.1.mlp.up_proj": 16384.0,
        "model.layers.*.self_attn.v_proj": 0.0025,
    }
    assert parse_stress([]) == {}


@pytest.mark.parametrize(
    "text",
    ["", "=2", "up_proj", "up_proj=", "up_proj=two", "up_proj=0", "up_proj=-2", "up_proj=inf", "up_proj=nan"],
)
def test_what_is_no_factor_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(BadValue) as refusal:
        parse_stress([text])
    line = str(refusal.value)
    assert f"--stress '{text}' is not MODULE=FACTOR with a finite factor above 0" in line
    assert "--stress model.layers.10.mlp.up_proj=16384" in line


def test_a_name_given_twice_is_refused() -> None:
    with pytest.raises(BadValue, match="names 'a' twice"):
        parse_stress(["a=2", "a=2"])


@given(st.floats(min_value=1e-300, max_value=1e300))
def test_every_factor_comes_through_exactly(factor: float) -> None:
    assert parse_stress([f"a.b={factor!r}"]) == {"a.b": factor}


# ---- which layers


def resolved(stress: dict[str, float], layers: int | None = None, **changes: Any) -> tuple[Pair, ...]:
    return resolve_stress(stress, {**TINY, **changes}, layers)


@pytest.mark.parametrize("scaled", BOTH_WAYS)
def test_each_layer_has_its_partner(scaled: str) -> None:
    partners = PAIRS | {partner: name for name, partner in PAIRS.items()}
    (pair,) = resolved({f"{LAYER}.{scaled}": 8.0})
    assert pair == Pair(f"{LAYER}.{scaled}", f"{LAYER}.{partners[scaled]}", 8.0)
    assert pair.factors == {pair.scaled: 8.0, pair.compensated: 0.125}


def test_a_pattern_names_several_in_the_models_order() -> None:
    pairs = resolved({"*.mlp.up_proj": 4.0, "model.layers.?.self_attn.v_proj": 2.0}, num_hidden_layers=3)
    assert [pair.scaled.removeprefix("model.layers.") for pair in pairs] == [
        f"{layer}.{part}" for layer in range(3) for part in ("self_attn.v_proj", "mlp.up_proj")
    ]
    assert [pair.scaled for pair in resolved({"model.layers.[01].mlp.up_proj": 4.0})] == [
        "model.layers.0.mlp.up_proj",
        "model.layers.1.mlp.up_proj",
    ]


def test_without_a_dial_nothing_is_asked_of_the_model() -> None:
    assert resolve_stress({}, {"model_type": "anything"}, None) == ()


def test_layers_that_are_cut_off_are_not_there() -> None:
    assert resolved({f"{LAYER}.mlp.up_proj": 2.0}, layers=2)
    with pytest.raises(BadValue, match="matches no linear layer"):
        resolved({f"{LAYER}.mlp.up_proj": 2.0}, layers=1)


@pytest.mark.parametrize(
    ("stress", "changes", "said"),
    [
        (
            {"model.layers.1.mlp.upproj": 2}, {},
            "matches no linear layer of this model; did you mean 'model.layers.1.mlp.up_proj'?",
        ),
        ({"model.layers.2.mlp.up_proj": 2}, {}, "did you mean 'model.layers."),
        ({"zzz": 2}, {}, "names look like 'model.layers.0.self_attn.q_proj'"),
        (
            {"model.layers.1.mlp.gate_proj": 2}, {},
            "model.layers.1.mlp.gate_proj cannot be rescaled: its output goes through the activation",
        ),
        ({"*.mlp.*": 2}, {}, "gate_proj cannot be rescaled"),
        (
            {"*.up_proj": 2, "*.1.mlp.down_proj": 2}, {},
            "'*.1.mlp.down_proj' rescales model.layers.1.mlp.down_proj, which '*.up_proj' rescales already",
        ),
        ({"*.[qk]_proj": 2}, {}, "rescales already"),
        ({"*.up_proj": 2}, {"model_type": "gpt2"}, "no two layers of a 'gpt2' model are known"),
        ({"*.q_proj": 2}, {"model_type": "qwen3"}, "a 'qwen3' model normalizes q and k after their proj"),
        ({"*.k_proj": 2}, {"model_type": "gemma3_text"}, "which undoes the factor"),
    ],
)  # fmt: skip
def test_what_fits_nothing_is_refused_in_one_line(stress: Any, changes: dict[str, Any], said: str) -> None:
    with pytest.raises(BadValue) as refusal:
        resolved(stress, **changes)
    assert said in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_qwen3_takes_the_other_pairs() -> None:
    assert len(resolved({"*.v_proj": 2.0, "*.up_proj": 2.0}, model_type="qwen3")) == 4


@pytest.mark.parametrize("model_type", FAMILIES)
def test_the_names_are_those_of_the_models(model_type: str) -> None:
    """Of the families that are known, as transformers builds them."""
    architecture = {
        "model_type": model_type, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2,
        "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64,
    }  # fmt: skip
    model = skeleton(architecture, "eager")
    assert set(module_names(2)) < {name for name, _ in model.named_modules()}


# ---- the weights


def weights() -> SyntheticWeights:
    shapes = {name: parameter.shape for name, parameter in skeleton(TINY, "sdpa").named_parameters()}
    return SyntheticWeights(shapes, 0.02)


@pytest.mark.parametrize("scaled", BOTH_WAYS)
def test_weights_and_biases_are_rescaled_where_the_partner_undoes_it(scaled: str) -> None:
    (pair,) = resolved({f"{LAYER}.{scaled}": 2.0**10})
    plain, dialled = weights(), StressedWeights(weights(), [pair])
    for module, factor in pair.factors.items():
        name = f"{module}.weight"
        assert name in dialled
        assert torch.equal(dialled.tensor(name), plain.tensor(name) * factor)
        assert dialled.tensor(name).dtype == plain.tensor(name).dtype
        if f"{module}.bias" in plain:
            assert torch.equal(dialled.tensor(f"{module}.bias"), plain.tensor(f"{module}.bias") * factor)
    others = [n for n in plain._shapes if not n.startswith(tuple(pair.factors))]
    assert all(torch.equal(dialled.tensor(name), plain.tensor(name)) for name in others)
    assert f"{LAYER}.mlp.no_proj.weight" not in dialled


def test_a_bias_that_is_added_after_the_product_stays() -> None:
    class Constant:
        def __contains__(self, name: str) -> bool:
            return True

        def tensor(self, name: str, device: torch.device = CPU) -> torch.Tensor:
            return torch.ones(2)

    pairs = [
        Pair("a.up_proj", "a.down_proj", 4.0),
        Pair("a.v_proj", "a.o_proj", 4.0),
        Pair("a.q_proj", "a.k_proj", 4.0),
    ]
    dialled = StressedWeights(Constant(), pairs)
    found = {
        part: float(dialled.tensor(f"a.{part}_proj.bias")[0]) for part in ("up", "down", "v", "o", "q", "k")
    }
    assert found == {"up": 4.0, "down": 1.0, "v": 4.0, "o": 1.0, "q": 4.0, "k": 0.25}


def test_of_a_packed_layer_the_scales_are_rescaled_and_the_codes_are_not() -> None:
    class Packed:
        tensors = {
            "a.up_proj.scales": torch.full((2, 3), 0.5, dtype=torch.float16),
            "a.up_proj.qweight": torch.full((2, 3), 7, dtype=torch.int32),
            "a.up_proj.qzeros": torch.full((2, 3), 8, dtype=torch.int32),
            "a.up_proj.g_idx": torch.arange(4, dtype=torch.int32),
        }  # fmt: skip

        def __contains__(self, name: str) -> bool:
            return name in self.tensors

        def tensor(self, name: str, device: torch.device = CPU) -> torch.Tensor:
            return self.tensors[name]

    dialled = StressedWeights(Packed(), [Pair("a.up_proj", "a.down_proj", 16.0)])
    assert torch.equal(dialled.tensor("a.up_proj.scales"), torch.full((2, 3), 8.0, dtype=torch.float16))
    for name, tensor in Packed.tensors.items():
        if "scales" not in name:
            assert torch.equal(dialled.tensor(name), tensor)


# ---- the function


@pytest.mark.parametrize("scaled", BOTH_WAYS)
def test_a_power_of_two_changes_nothing_at_all_in_float32(scaled: str) -> None:
    pairs = resolved({f"{LAYER}.{scaled}": 2.0**14})
    assert prove(skeleton(TINY, "sdpa"), weights(), pairs) == [0.0]


@pytest.mark.parametrize("scaled", ["self_attn.q_proj", "mlp.up_proj"])
def test_another_factor_rounds_bfloat16_weights_and_no_more(scaled: str) -> None:
    """A weight of 8 bits times 1000 is no weight of 8 bits: the proof sees the rounding, and allows it."""
    (difference,) = prove(skeleton(TINY, "sdpa"), weights(), resolved({f"{LAYER}.{scaled}": 1000.0}))
    assert 0 < difference < TOLERANCE


def test_every_pair_is_proven() -> None:
    pairs = resolved({"*.up_proj": 2.0**9, "*.v_proj": 2.0**9, "*.k_proj": 2.0**9})
    assert prove(skeleton(TINY, "sdpa"), weights(), pairs) == [0.0] * 6


@pytest.mark.parametrize(
    "pair",
    [
        Pair(f"{LAYER}.mlp.gate_proj", f"{LAYER}.mlp.down_proj", 2.0),
        Pair(f"{LAYER}.self_attn.v_proj", f"{LAYER}.mlp.down_proj", 2.0),
    ],
)
def test_layers_that_do_not_undo_each_other_are_found_out(pair: Pair) -> None:
    with pytest.raises(ValueError, match=f"rescaling {pair.scaled} by 2 changes what its layer computes"):
        prove(skeleton(TINY, "sdpa"), weights(), [pair])


# ---- the training


def loss_and_gradients(backend: str, stress: dict[str, float]) -> tuple[float, dict[str, torch.Tensor]]:
    """In float32, from the fixed adapters of the fidelity (no B of them is zero)."""
    rig = Rig(ask(backend, dtype="float32", stress=stress))
    rig.adapters.model._forward_pre_hooks.clear()  # the rig's own, which wants to know the batch
    source = rig.builder.reader()
    trainer = make_trainer(rig.adapters, rig.request, source, [CPU], "float32")
    return gradients_on(trainer, source.next_batch())


def relative(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> float:
    return max(float((found[name] - wanted[name]).norm() / wanted[name].norm()) for name in wanted)


@pytest.mark.parametrize("scaled", BOTH_WAYS)
@pytest.mark.parametrize("backend", ["bf16", "bnb-nf4", "bnb-nf4-dq"])
def test_loss_and_every_gradient_are_those_without_the_dial(backend: str, scaled: str) -> None:
    plain_loss, plain = loss_and_gradients(backend, {})
    loss, gradients = loss_and_gradients(backend, {f"{LAYER}.{scaled}": 2.0**14})
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert gradients.keys() == plain.keys()
    assert relative(gradients, plain) < 1e-5


@pytest.mark.parametrize("backend", ["gptq", "awq"])
def test_packed_layers_are_dialled_by_their_scales(backend: str) -> None:
    """As far as float16 holds the scales: 2**4 is exact."""
    plain_loss, plain = loss_and_gradients(backend, {})
    loss, gradients = loss_and_gradients(
        backend, {f"{LAYER}.mlp.up_proj": 2.0**4, "*.0.self_attn.v_proj": 2.0**4}
    )
    assert loss == pytest.approx(plain_loss, rel=1e-6)
    assert relative(gradients, plain) < 1e-5


def test_without_their_own_factor_the_adapters_would_see_other_gradients() -> None:
    """What `scale_adapters` is for."""
    rig = Rig(ask("bf16", dtype="float32", stress={f"{LAYER}.mlp.up_proj": 2.0**14}))
    up, down = (rig.module(f"{LAYER}.mlp.{part}") for part in ("up_proj", "down_proj"))
    assert (up.scaling["default"], down.scaling["default"]) == (2.0 * 2**14, 2.0 / 2**14)
    scale_adapters(
        rig.adapters.model, [Pair(f"{LAYER}.mlp.down_proj", f"{LAYER}.mlp.up_proj", 2.0**14)], "default"
    )
    assert (up.scaling["default"], down.scaling["default"]) == (2.0, 2.0)
    rig.adapters.model._forward_pre_hooks.clear()
    source = rig.builder.reader()
    _, gradients = gradients_on(
        make_trainer(rig.adapters, rig.request, source, [CPU], "float32"), source.next_batch()
    )
    assert relative(gradients, loss_and_gradients("bf16", {})[1]) > 0.5
