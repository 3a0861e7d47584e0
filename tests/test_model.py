import json

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, Qwen2Config, Qwen2ForCausalLM

from bench.load.layout import Layout
from bench.load.model import build_model, linear_shapes, skeleton, unquantized_digest
from bench.load.registry import get_backend
from bench.load.weights import CheckpointWeights, SyntheticWeights

CPU = torch.device("cpu")
IDS = torch.arange(24).reshape(2, 12)


def checkpoint(folder, *, tied=True, dtype=torch.bfloat16):
    torch.manual_seed(0)
    config = Qwen2Config(
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        vocab_size=128,
        max_position_embeddings=64,
        tie_word_embeddings=tied,
        initializer_range=0.1,
    )
    model = Qwen2ForCausalLM(config).to(dtype)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(("bias", "norm.weight")):
                parameter.add_(torch.randn_like(parameter) * 0.1)
    model.save_pretrained(folder)
    return folder, json.loads((folder / "config.json").read_text())


def built(folder, architecture, backend="bf16", dtype="bfloat16", attention="sdpa"):
    made = get_backend(backend).create({}, "cpu", dtype)
    return build_model(skeleton(architecture, attention), CheckpointWeights(folder), made, Layout.on(CPU))


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_the_reference_computes_what_transformers_computes(tmp_path, tied, dtype, attention):
    folder, architecture = checkpoint(tmp_path, tied=tied)
    ours = built(folder, architecture, dtype=dtype, attention=attention).model
    theirs = AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype), attn_implementation=attention
    ).train()
    with torch.no_grad():
        assert torch.equal(ours(input_ids=IDS).logits, theirs(input_ids=IDS).logits)


def test_every_parameter_is_the_one_that_transformers_reads(tmp_path):
    folder, architecture = checkpoint(tmp_path)
    ours = dict(built(folder, architecture).model.named_parameters())
    theirs = dict(AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).named_parameters())
    assert list(ours) == list(theirs)
    assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_a_tied_head_shares_the_embeddings_storage(tmp_path):
    model = built(*checkpoint(tmp_path)).model
    assert model.lm_head.weight.data_ptr() == model.model.embed_tokens.weight.data_ptr()


def test_a_head_of_its_own_shares_nothing(tmp_path):
    model = built(*checkpoint(tmp_path, tied=False)).model
    assert model.lm_head.weight.data_ptr() != model.model.embed_tokens.weight.data_ptr()


def test_no_parameter_and_no_buffer_is_left_without_memory(tmp_path):
    model = built(*checkpoint(tmp_path)).model
    assert not [
        name for name, tensor in [*model.named_parameters(), *model.named_buffers()] if tensor.is_meta
    ]


def test_the_rotary_buffer_has_its_values_in_float32(tmp_path):
    model = built(*checkpoint(tmp_path)).model
    frequencies = model.model.rotary_emb.inv_freq
    assert frequencies.dtype == torch.float32
    assert float(frequencies[0]) == 1.0


def test_the_skeleton_has_no_weights_and_real_buffers():
    model = skeleton(
        {"model_type": "qwen2", "num_hidden_layers": 1, "quantization_config": {"bits": 4}}, "sdpa"
    )
    assert all(parameter.is_meta for parameter in model.parameters())
    assert not any(buffer.is_meta for buffer in model.buffers())
    assert model.config.use_cache is False


def test_a_model_type_that_is_not_known_is_a_value_error():
    with pytest.raises(ValueError, match="no-such-model"):
        skeleton({"model_type": "no-such-model"}, "sdpa")


def test_the_head_is_not_quantized_and_all_other_linear_layers_are(tmp_path):
    _, architecture = checkpoint(tmp_path, tied=False)
    names = linear_shapes(skeleton(architecture, "sdpa"))
    assert len(names) == 14
    assert "lm_head" not in names


def test_the_model_is_frozen_and_in_training_mode(tmp_path):
    model = built(*checkpoint(tmp_path)).model
    assert not any(parameter.requires_grad for parameter in model.parameters())
    assert all(module.training for module in model.modules())


@pytest.mark.parametrize("dtype", ["float16", "float32"])
def test_everything_is_placed_in_the_compute_dtype(tmp_path, dtype):
    model = built(*checkpoint(tmp_path), dtype=dtype).model
    assert {parameter.dtype for parameter in model.parameters()} == {getattr(torch, dtype)}


@pytest.mark.parametrize("backend", ["bnb-nf4", "bnb-int8", "hqq", "eetq"])
def test_what_is_not_quantized_is_equal_for_every_backend(tmp_path, backend):
    folder, architecture = checkpoint(tmp_path)
    reference = unquantized_digest(built(folder, architecture))
    assert unquantized_digest(built(folder, architecture, backend)) == reference


def test_the_digest_of_the_unquantized_part_sees_a_changed_norm(tmp_path):
    model = built(*checkpoint(tmp_path))
    before = unquantized_digest(model)
    with torch.no_grad():
        model.model.model.norm.weight[0] += 1
    assert unquantized_digest(model) != before


@pytest.mark.parametrize("backend", ["bnb-nf4", "bnb-nf4-dq", "bnb-int8", "hqq", "eetq"])
def test_a_quantized_model_has_nearly_the_logits_of_the_reference(tmp_path, backend):
    folder, architecture = checkpoint(tmp_path)
    with torch.no_grad():
        wanted = built(folder, architecture, dtype="float32").model(input_ids=IDS).logits
        found = built(folder, architecture, backend, dtype="float32").model(input_ids=IDS).logits
    assert float((found - wanted).norm() / wanted.norm()) < (
        0.35 if "nf4" in backend or backend == "hqq" else 0.06
    )
    assert not torch.equal(found, wanted)


def test_progress_is_told_for_every_layer_and_at_the_end(tmp_path):
    folder, architecture = checkpoint(tmp_path)
    told = []
    made = get_backend("bf16").create({}, "cpu", "bfloat16")
    build_model(
        skeleton(architecture, "sdpa"),
        CheckpointWeights(folder),
        made,
        Layout.on(CPU),
        lambda done, total: told.append((done, total)),
    )
    assert told == [(done, 14) for done in range(15)]


def test_a_tensor_of_another_shape_is_named(tmp_path):
    folder, architecture = checkpoint(tmp_path)
    with pytest.raises(ValueError, match=r"embed_tokens\.weight' has shape \(128, 64\)"):
        built(folder, {**architecture, "vocab_size": 130})


def test_a_linear_weight_of_another_shape_is_named(tmp_path):
    folder, architecture = checkpoint(tmp_path)
    tensors = {name: CheckpointWeights(folder).tensor(name) for name in CheckpointWeights(folder)._files}
    name = "model.layers.0.mlp.up_proj.weight"
    tensors[name] = tensors[name][:-8].contiguous()
    save_file(tensors, folder / "model.safetensors")
    with pytest.raises(ValueError, match=r"up_proj"):
        built(folder, architecture)


def test_a_synthetic_model_computes_finite_logits():
    architecture = {
        "model_type": "qwen2",
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 1,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 128,
        "tie_word_embeddings": True,
    }
    model = skeleton(architecture, "sdpa")
    weights = SyntheticWeights({name: p.shape for name, p in model.named_parameters()}, 0.02)
    done = build_model(model, weights, get_backend("bf16").create({}, "cpu", "bfloat16"), Layout.on(CPU))
    assert bool(done.model(input_ids=IDS).logits.isfinite().all())
