"""Makers of checkpoints in the exact layout of Qwen's published ones, tiny.

Qwen/Qwen2-72B-Instruct (37 shards, bfloat16) and its AWQ and GPTQ-Int4 versions (11 shards, float16, an
intermediate size that is padded with zeros, and in the GPTQ one a bias of zeros for every linear layer). The
packing here is the test's own and knows nothing of the backends'. ``into_hub_cache`` puts a folder where
huggingface_hub would.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors.torch import save_file

HIDDEN, INTERMEDIATE, PADDED, LAYERS, VOCABULARY, GROUP = 256, 384, 512, 4, 512, 128
HEADS, KEY_VALUE_HEADS = 4, 2
KEY_VALUE = HIDDEN // HEADS * KEY_VALUE_HEADS
DENSE, AWQ, GPTQ = (f"Qwen/Qwen2-72B-Instruct{suffix}" for suffix in ("", "-AWQ", "-GPTQ-Int4"))
DENSE_SHARDS, PACKED_SHARDS = 37, 11
LINEARS = {
    "self_attn.q_proj": (HIDDEN, HIDDEN),
    "self_attn.k_proj": (KEY_VALUE, HIDDEN),
    "self_attn.v_proj": (KEY_VALUE, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HIDDEN),
    "mlp.gate_proj": (INTERMEDIATE, HIDDEN),
    "mlp.up_proj": (INTERMEDIATE, HIDDEN),
    "mlp.down_proj": (HIDDEN, INTERMEDIATE),
}
BIASED = ("q_proj", "k_proj", "v_proj")
CONFIG: Mapping[str, Any] = {
    "architectures": ["Qwen2ForCausalLM"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "hidden_act": "silu",
    "hidden_size": HIDDEN,
    "initializer_range": 0.02,
    "intermediate_size": INTERMEDIATE,
    "max_position_embeddings": 32768,
    "max_window_layers": 80,
    "model_type": "qwen2",
    "num_attention_heads": HEADS,
    "num_hidden_layers": LAYERS,
    "num_key_value_heads": KEY_VALUE_HEADS,
    "rms_norm_eps": 1e-06,
    "rope_theta": 1000000.0,
    "sliding_window": 131072,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_sliding_window": False,
    "vocab_size": VOCABULARY,
}
QUANTIZATION: Mapping[str, Mapping[str, Any]] = {
    "awq": {
        "bits": 4,
        "group_size": GROUP,
        "modules_to_not_convert": None,
        "quant_method": "awq",
        "version": "gemm",
        "zero_point": True,
    },
    "gptq": {
        "batch_size": 1,
        "bits": 4,
        "block_name_to_quantize": None,
        "cache_block_outputs": True,
        "damp_percent": 0.01,
        "dataset": None,
        "desc_act": False,
        "exllama_config": {"version": 1},
        "group_size": GROUP,
        "max_input_length": None,
        "model_seqlen": None,
        "module_name_preceding_first_block": None,
        "modules_in_block_to_quantize": None,
        "pad_token_id": None,
        "quant_method": "gptq",
        "sym": True,
        "tokenizer": None,
        "true_sequential": True,
        "use_cuda_fp16": False,
        "use_exllama": True,
    },
}
GENERATION = {"bos_token_id": 0, "do_sample": True, "eos_token_id": [1, 0], "repetition_penalty": 1.05,
              "temperature": 0.7, "top_k": 20, "top_p": 0.8, "transformers_version": "4.40.1"}  # fmt: skip
AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)
Method = Literal["awq", "gptq"]


@dataclass(frozen=True)
class Made:
    """A checkpoint, and what is in it."""

    folder: Path
    tensors: Mapping[str, torch.Tensor]
    """As written, by their names in the files."""
    weights: Mapping[str, torch.Tensor]
    """What each linear layer stands for (out x in): float16 of a packed one, the written weight of another."""


def make_dense(folder: Path) -> Made:
    """Qwen2-72B-Instruct: every tensor bfloat16 and drawn, norms and biases too."""
    tensors = _dense_tensors()
    _write(folder, CONFIG, tensors, DENSE_SHARDS)
    weights = {name: tensors[f"{name}.weight"] for name in linear_names()}
    return Made(folder, tensors, weights)


def make_packed(folder: Path, method: Method) -> Made:
    """Its AWQ or GPTQ-Int4 version: the same values, padded, rounded to 4 bits in groups of 128, in float16."""
    dense = _dense_tensors()
    tensors = {name: tensor.half() for name, tensor in dense.items()}
    weights = {}
    for name in linear_names():
        del tensors[f"{name}.weight"]
        padded = _padded(name, dense[f"{name}.weight"].float())
        packed, weights[name] = (_pack_awq if method == "awq" else _pack_gptq)(padded)
        tensors |= {f"{name}.{kind}": tensor for kind, tensor in packed.items()}
        if method == "gptq" and not name.endswith(BIASED):
            tensors[f"{name}.bias"] = torch.zeros(len(padded), dtype=torch.float16)
    if method == "gptq":
        # Older exporters left this buffer in.
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(HIDDEN // HEADS // 2)
    config = {
        **CONFIG,
        "intermediate_size": PADDED,
        "torch_dtype": "float16",
        "quantization_config": QUANTIZATION[method],
    }
    _write(folder, config, tensors, PACKED_SHARDS)
    return Made(folder, tensors, weights)


def linear_names() -> list[str]:
    """Every linear layer of the model."""
    return [f"model.layers.{layer}.{name}" for layer in range(LAYERS) for name in LINEARS]


def into_hub_cache(made: Path, hub: Path, model: str) -> Path:
    """The snapshot of ``model`` in a Hub cache: links into a folder of blobs. ``made`` stays where it is."""
    home = hub / f"models--{model.replace('/', '--')}"
    revision = hashlib.sha1(model.encode(), usedforsecurity=False).hexdigest()
    snapshot = home / "snapshots" / revision
    for folder in (snapshot, home / "blobs", home / "refs"):
        folder.mkdir(parents=True)
    (home / "refs" / "main").write_text(revision)
    for file in sorted(made.iterdir()):
        blob = home / "blobs" / hashlib.sha256(file.read_bytes()).hexdigest()
        blob.hardlink_to(file)
        (snapshot / file.name).symlink_to(Path("../..") / "blobs" / blob.name)
    return snapshot


def _dense_tensors() -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def drawn(*shape: int, scale: float = 0.02, around: float = 0.0) -> torch.Tensor:
        return (torch.randn(shape, generator=generator) * scale + around).bfloat16()

    tensors = {"model.embed_tokens.weight": drawn(VOCABULARY, HIDDEN)}
    for layer in range(LAYERS):
        prefix = f"model.layers.{layer}"
        tensors[f"{prefix}.input_layernorm.weight"] = drawn(HIDDEN, scale=0.1, around=1.0)
        tensors[f"{prefix}.post_attention_layernorm.weight"] = drawn(HIDDEN, scale=0.1, around=1.0)
        for name, shape in LINEARS.items():
            tensors[f"{prefix}.{name}.weight"] = drawn(*shape, scale=0.05)
            if name.endswith(BIASED):
                tensors[f"{prefix}.{name}.bias"] = drawn(shape[0], scale=0.1)
    tensors["model.norm.weight"] = drawn(HIDDEN, scale=0.1, around=1.0)
    tensors["lm_head.weight"] = drawn(VOCABULARY, HIDDEN)
    return tensors


def _padded(name: str, weight: torch.Tensor) -> torch.Tensor:
    """Zeros for the channels that the padding adds: they change nothing of what is computed."""
    extra = PADDED - INTERMEDIATE
    if name.endswith("down_proj"):
        return torch.nn.functional.pad(weight, (0, extra))
    if name.endswith(("gate_proj", "up_proj")):
        return torch.nn.functional.pad(weight, (0, 0, 0, extra))
    return weight


def _grouped(weight: torch.Tensor) -> torch.Tensor:
    return weight.reshape(len(weight), -1, GROUP)


def _pack_awq(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    groups = _grouped(weight)
    low, high = groups.amin(2).clamp_max(0), groups.amax(2).clamp_min(0)
    scales = ((high - low) / 15).clamp_min(1e-4).half()
    zeros = (-low / scales.float()).round().clamp(0, 15).int()
    codes = (groups / scales.float()[..., None] + zeros[..., None]).round().clamp(0, 15).int()
    tensors = {
        "qweight": _words(codes.reshape(weight.shape).t(), AWQ_ORDER),
        "qzeros": _words(zeros.t(), AWQ_ORDER),
        "scales": scales.t().contiguous(),
    }
    return tensors, _stands_for(scales, codes, zeros, weight.shape)


def _pack_gptq(weight: torch.Tensor) -> tuple[dict[str, torch.Tensor], torch.Tensor]:
    groups = _grouped(weight)
    scales = (groups.abs().amax(2) * 2 / 15).clamp_min(1e-4).half()
    codes = ((groups / scales.float()[..., None]).round() + 8).clamp(0, 15).int()
    zeros = torch.full_like(scales, 8, dtype=torch.int32)
    tensors = {
        "qweight": _words(codes.reshape(weight.shape), range(8)).t().contiguous(),
        "qzeros": _words((zeros - 1).t(), range(8)),
        "scales": scales.t().contiguous(),
        "g_idx": torch.arange(weight.shape[1], dtype=torch.int32) // GROUP,
    }
    return tensors, _stands_for(scales, codes, zeros, weight.shape)


def _stands_for(
    scales: torch.Tensor, codes: torch.Tensor, zeros: torch.Tensor, shape: torch.Size
) -> torch.Tensor:
    return (scales.float()[..., None] * (codes - zeros[..., None])).reshape(shape).half()


def _words(codes: torch.Tensor, order: Any) -> torch.Tensor:
    """Codes (rows x columns), 8 columns to an int32 word: column ``order[i]`` of each eight in bits 4i on."""
    found = torch.zeros(codes.shape[0], codes.shape[1] // 8, dtype=torch.int32)
    for place, column in enumerate(order):
        found |= codes[:, column::8] << (4 * place)
    return found.contiguous()


def _write(folder: Path, config: Mapping[str, Any], tensors: Mapping[str, torch.Tensor], shards: int) -> None:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    (folder / "generation_config.json").write_text(json.dumps(GENERATION), encoding="utf-8")
    names, placed = list(tensors), {}
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        save_file(
            {name: tensors[name].contiguous() for name in part}, folder / file, metadata={"format": "pt"}
        )
        placed |= dict.fromkeys(part, file)
    size = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(placed.items()))}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
