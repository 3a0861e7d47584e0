"""Small safetensors files, written without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from math import prod
from pathlib import Path


def write_safetensors(file: Path, tensors: Mapping[str, Sequence[int]]) -> None:
    """Float32 zeros of these shapes, by name."""
    header, end = {}, 0
    for name, shape in tensors.items():
        size = 4 * prod(shape)
        header[name] = {"dtype": "F32", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + bytes(end))
