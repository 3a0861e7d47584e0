"""A small checkpoint on disk, for tests that need weights which count as real."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.ask.preset import load_preset
from bench.load.model import skeleton
from bench.load.weights import SyntheticWeights


def make_checkpoint(folder: Path, preset: str = "tiny") -> Path:
    """The preset's shape with its drawn weights, saved as any checkpoint is."""
    architecture = dict(load_preset(preset).architecture or {})
    model = skeleton(architecture, "sdpa")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    weights = SyntheticWeights(shapes, 0.02)
    folder.mkdir(parents=True)
    tensors: dict[str, torch.Tensor] = {name: weights.tensor(name) for name in shapes}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(architecture), encoding="utf-8")
    return folder
