from typing import Any

import pytest

from bench.ask.preset import load_preset, preset_names
from bench.ask.shapes import LAYOUTS, decoder_of
from bench.errors import BadValue, UserError

SMALL: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 128,
    "max_position_embeddings": 64,
}
CASES = [
    {"model_type": "qwen2"},
    {"model_type": "qwen2", "tie_word_embeddings": True},
    {"model_type": "llama"},
    {"model_type": "llama", "attention_bias": True, "mlp_bias": True, "head_dim": 32},
    {"model_type": "mistral", "tie_word_embeddings": True},
    {"model_type": "qwen3"},
    {"model_type": "qwen3", "attention_bias": True, "head_dim": 24},
]


@pytest.mark.parametrize("more", CASES, ids=str)
def test_shapes_are_those_of_the_model_that_transformers_builds(more):
    from torch import nn

    from bench.load.model import linear_shapes, skeleton

    decoder, model = decoder_of(SMALL | more), skeleton(SMALL | more, "sdpa")
    built = {
        name: (shape.out_features, shape.in_features, model.get_submodule(name).bias is not None)
        for name, shape in linear_shapes(model).items()
    }
    expected = {
        f"model.layers.{layer}.{'mlp' if name.split('_')[0] in ('gate', 'up', 'down') else 'self_attn'}.{name}": (
            linear.outputs,
            linear.inputs,
            linear.bias,
        )
        for layer in range(decoder.layers)
        for name, linear in decoder.linears.items()
    }
    assert built == expected
    assert decoder.parameters == sum(parameter.numel() for parameter in model.parameters())
    assert decoder.tied is (model.get_output_embeddings().weight is model.get_input_embeddings().weight)
    layer = model.get_submodule("model.layers.0")
    quantized = sum(m.weight.numel() for m in layer.modules() if isinstance(m, nn.Linear))
    assert decoder.layer_quantized_parameters == quantized
    rest = sum(p.numel() for p in layer.parameters()) - quantized
    assert decoder.layer_unquantized_parameters == rest
    assert decoder.buffer_bytes == sum(buffer.nbytes for buffer in model.buffers())


def test_every_layout_is_held_against_transformers():
    assert {case["model_type"] for case in CASES} == set(LAYOUTS)


def test_qwen2_72b_has_its_published_size():
    decoder = decoder_of(load_preset("qwen2-72b").architecture)
    # As its safetensors index sums up: 145,412,407,296 bytes in bfloat16.
    assert decoder.parameters == 72_706_203_648
    assert decoder.layer_quantized_parameters == 877_658_112
    assert (decoder.layers, decoder.queries, decoder.keys) == (80, 8192, 1024)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_a_known_shape(name):
    assert decoder_of(load_preset(name).architecture).parameters > 0


def test_adapters_of_some_projections_are_counted():
    decoder = decoder_of(SMALL | {"model_type": "qwen2"})
    assert decoder.lora_parameters(8, ("q_proj",)) == 8 * (64 + 64)
    assert decoder.lora_parameters(8, ("k_proj", "down_proj")) == 8 * (64 + 32) + 8 * (96 + 64)


def test_fewer_layers_can_be_kept_but_not_more():
    whole = decoder_of(SMALL | {"model_type": "llama"})
    cut = decoder_of(SMALL | {"model_type": "llama"}, layers=1)
    layer = whole.layer_quantized_parameters + whole.layer_unquantized_parameters
    assert whole.parameters - cut.parameters == layer
    with pytest.raises(BadValue, match="the model has 2 decoder layers"):
        decoder_of(SMALL | {"model_type": "llama"}, layers=3)


def test_an_unknown_model_type_is_refused_and_the_nearest_named():
    with pytest.raises(UserError, match="'qwen4' are not known; did you mean 'qwen"):
        decoder_of(SMALL | {"model_type": "qwen4"})
    with pytest.raises(UserError, match=f"known: {', '.join(LAYOUTS)}"):
        decoder_of(SMALL | {"model_type": "zzz"})


@pytest.mark.parametrize("broken", [None, 0, -1, "64", True, 1.5])
def test_a_configuration_without_a_size_is_refused(broken):
    with pytest.raises(BadValue, match="hidden_size"):
        decoder_of(SMALL | {"model_type": "llama", "hidden_size": broken})
