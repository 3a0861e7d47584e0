"""The weight files of a model folder: one safetensors file, or shards with an index of what is in which.

Read here are headers only, so that a folder of 145 GB is checked in a moment, before any worker starts.
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

from bench.ask.documents import parsed
from bench.errors import BrokenFile

INDEX_NAME = "model.safetensors.index.json"
METADATA = "__metadata__"
"""The entry of a safetensors header that is no tensor."""


def weight_files(folder: Path) -> dict[str, Path]:
    """Tensor name -> the safetensors file that holds it, over all shards.

    Raises BrokenFile for a folder without weights, a shard that is missing, a broken header, an index that
    names a tensor twice or where it is not, and a tensor that two shards hold without an index to choose.
    """
    index = folder / INDEX_NAME
    placed = _read_index(index) if index.is_file() else {}
    files = sorted({folder / shard for shard in placed.values()}) or sorted(folder.glob("*.safetensors"))
    if not files:
        raise BrokenFile(f"'{folder}' holds no *.safetensors", "other weight formats are not read")
    found: dict[str, Path] = {}
    for file in files:
        for name in safetensors_header(file):
            if name in found and name not in placed and name != METADATA:
                raise BrokenFile(f"'{folder}' holds tensor '{name}' in {found[name].name} and {file.name}")
            if placed.get(name, file.name) == file.name:
                found[name] = file
    found.pop(METADATA, None)
    for name, shard in placed.items():
        if name not in found:
            raise BrokenFile(f"'{index}' places tensor '{name}' in {shard}, which does not hold it")
    return found


def _read_index(index: Path) -> dict[str, str]:
    """Tensor name -> name of its shard, as an index of shards says. Raises BrokenFile."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        names = Counter(name for name, _ in pairs)
        if twice := [name for name, count in names.items() if count > 1]:
            raise BrokenFile(f"'{index}' names '{twice[0]}' twice")
        return dict(pairs)

    try:
        placed = json.loads(index.read_text(encoding="utf-8"), object_pairs_hook=once)["weight_map"]
        # The name alone: an index cannot lead out of its folder.
        return {name: Path(shard).name for name, shard in placed.items()}
    except (OSError, ValueError, KeyError, AttributeError, TypeError, RecursionError) as error:
        raise BrokenFile(f"'{index}' is no index of shards: {error!r}") from None


def safetensors_header(file: Path) -> dict[str, Any]:
    """The JSON header of one safetensors file (8 bytes of length, then the header).

    Raises BrokenFile where the file is missing, truncated or no safetensors file.
    """
    try:
        size = file.stat().st_size
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if not 2 <= length <= min(size - 8, 100_000_000):
                raise BrokenFile(f"'{file}' is truncated or no safetensors file")
            header = parsed(stream.read(length))
        if not isinstance(header, dict):
            raise TypeError("header is no object")
        ends = [entry["data_offsets"][1] for name, entry in header.items() if name != METADATA]
        end = max(ends, default=0) + 8 + length
        if ends and end > size:
            raise BrokenFile(f"'{file}' is truncated: {size} bytes of {end}")
    except FileNotFoundError:
        raise BrokenFile(f"shard '{file}' is missing") from None
    except (OSError, ValueError, TypeError, KeyError, IndexError) as error:
        raise BrokenFile(f"'{file}' is no safetensors file: {error!r}") from None
    return header
