"""A sharded checkpoint that is large enough to measure, written in seconds."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.load.model import skeleton


@dataclass(frozen=True)
class BigCheckpoint:
    """Where it is, and how large."""

    folder: Path
    layer_bytes: int
    largest_tensor_bytes: int
    total_bytes: int


def make_big_checkpoint(
    folder: Path, *, hidden: int, intermediate: int, layers: int, vocabulary: int, shards: int
) -> BigCheckpoint:
    """A Qwen2 shape in bfloat16. Values are cut out of one random strip, from a place of each tensor's own."""
    config = {
        "model_type": "qwen2",
        "architectures": ["Qwen2ForCausalLM"],
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "vocab_size": vocabulary,
        "max_position_embeddings": 512,
        "tie_word_embeddings": False,
        "torch_dtype": "bfloat16",
    }
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    shapes = {name: parameter.shape for name, parameter in skeleton(config, "sdpa").named_parameters()}
    strip = (torch.randn(2**20, generator=torch.Generator().manual_seed(0)) * 0.02).bfloat16()
    names, placed = list(shapes), {}
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = f"model-{number + 1:05d}-of-{shards:05d}.safetensors"
        tensors = {name: _cut(strip, shapes[name], place) for place, name in enumerate(part)}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        placed |= dict.fromkeys(part, file)
    sizes = {name: 2 * shape.numel() for name, shape in shapes.items()}
    index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": placed}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
    return BigCheckpoint(
        folder,
        layer_bytes=sum(size for name, size in sizes.items() if name.startswith("model.layers.0.")),
        largest_tensor_bytes=max(sizes.values()),
        total_bytes=sum(sizes.values()),
    )


def _cut(strip: torch.Tensor, shape: torch.Size, place: int) -> torch.Tensor:
    rolled = strip.roll(997 * place)
    copies = -(-shape.numel() // len(rolled))
    return rolled.repeat(copies)[: shape.numel()].reshape(shape)
