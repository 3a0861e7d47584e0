"""What transformers 5 writes and 4 cannot read: a checkpoint of today in an environment of an older stack.

Used where the worker hands a configuration or a tokenizer's folder to transformers.
"""

from __future__ import annotations

import importlib.metadata
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def transformers_major() -> int:
    """The first number of the version of transformers that is installed here."""
    return int(importlib.metadata.version("transformers").partition(".")[0])


def in_terms_of(major: int, settings: Mapping[str, Any]) -> dict[str, Any]:
    """A config.json as transformers of this major version reads it. 5 writes ``rope_parameters``; 4 does not
    know them, and would go on with its own default base in silence.

    Raises ValueError for parameters that differ from layer type to layer type, which 4 cannot be told.
    """
    told = dict(settings)
    rope = told.get("rope_parameters")
    if major >= 5 or not isinstance(rope, Mapping):
        return told
    if any(isinstance(value, Mapping) for value in rope.values()):
        raise ValueError("rope_parameters by layer type need transformers 5")
    del told["rope_parameters"]
    scaling = {name: value for name, value in rope.items() if name != "rope_theta"}
    if "rope_theta" in rope:
        told["rope_theta"] = rope["rope_theta"]
    if scaling.get("rope_type", "default") != "default":
        told["rope_scaling"] = scaling
    return told


def tokenizer_kind(major: int, folder: Path) -> str:
    """Name of the class of transformers that reads the tokenizer in ``folder``. 5 calls one that is its
    tokenizer.json and nothing else a TokenizersBackend, which is what 4 calls PreTrainedTokenizerFast."""
    if major >= 5:
        return "AutoTokenizer"
    try:
        told = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "AutoTokenizer"  # which says what is wrong with it
    written = told.get("tokenizer_class") if isinstance(told, dict) else None
    return "PreTrainedTokenizerFast" if written == "TokenizersBackend" else "AutoTokenizer"
