"""What other projects published about QLoRA of models of one size, with the conditions of each figure.

``published_for(comparison, forecast)`` gives the figures of published.toml that concern the model of a
report: none for a model of another size. Nothing is converted: a figure keeps its unit.
"""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from typing import Any, Literal

from bench.ask.shapes import decoder_of
from bench.errors import UserError
from bench.judge.comparison import Comparison
from bench.record.forecast import Forecast

Size = Literal["7B", "70B"]
SIZES: Mapping[Size, tuple[float, float]] = {"7B": (6.5e9, 8.6e9), "70B": (65e9, 75e9)}
"""Size -> the fewest and the most parameters: Llama-2-7B (6.74e9) to Llama-3.1-8B (8.03e9), and Llama-2-70B
(69.0e9) to Qwen2-72B (72.7e9), with some room."""
NAMES: Mapping[Size, str] = {"7B": r"(?<![\d.])[78]b(?![a-z0-9])", "70B": r"(?<![\d.])7[02]b(?![a-z0-9])"}
"""Size -> how a model's name tells it, where its configuration does not."""
LARGE_HIDDEN_SIZE = 8192
"""Of Llama's 70B and Qwen's 72B alike."""


@dataclass(frozen=True)
class Published:
    """One figure of another project."""

    size: Size
    model: str
    format: str
    """How the base weights were stored, in the source's words."""
    setup: str
    """All that is known of the conditions: cards, batch, length, kernel, dtype."""
    source: str
    """Repository and path, or thread."""
    reproduced: bool
    """Whether it was measured here again."""
    backend: str | None = None
    """The backend id that does the same; None: none does, or the source does not tell."""
    memory: str | None = None
    """Digits as published; the cards of a run with a plus sign between them."""
    memory_unit: Literal["GB", "GiB"] | None = None
    """As published. GB is 10^9 bytes where a source keeps to it; not every source does."""
    memory_measure: str | None = None
    """What the memory is of; None: not known."""
    tokens_per_second: int | None = None
    tokens_per_second_derived: bool = False
    """Computed from times and token counts that the source gives."""
    other: str | None = None
    """Further results, in words."""


@cache
def published_figures() -> tuple[Published, ...]:
    """Every figure of published.toml, in its order."""
    text = files("bench.show").joinpath("published.toml").read_text(encoding="utf-8")
    return tuple(Published(**values) for values in tomllib.loads(text)["figure"])


def published_for(comparison: Comparison, forecast: Forecast | None) -> tuple[Published, ...]:
    """The figures for the sizes of the report's models."""
    models = [row.record.request.model for row in comparison.rows]
    sizes = {size_of(model.name, model.architecture) for model in models}
    if forecast is not None and not models:
        sizes.add(size_of(forecast.model, {}))
    return tuple(figure for figure in published_figures() if figure.size in sizes)


def size_of(name: str, architecture: Mapping[str, Any]) -> Size | None:
    """Which of the sizes a model has: by the parameters of its whole configuration, else by its hidden size
    or its name. None: another size."""
    try:
        parameters = decoder_of(architecture).parameters
    except UserError:
        if architecture.get("hidden_size") == LARGE_HIDDEN_SIZE:
            return "70B"
        return next((size for size, pattern in NAMES.items() if re.search(pattern, name, re.I)), None)
    return next((size for size, (low, high) in SIZES.items() if low <= parameters <= high), None)
