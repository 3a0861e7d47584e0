"""The dial: which two linear layers can be rescaled against each other without changing the function.

``--stress model.layers.10.mlp.up_proj=16384`` multiplies that layer by the factor and divides its partner
by it. What the block computes stays the same; the numbers on the way grow, so that a compute dtype runs
out of range at a known place. Three kinds of pairs exist in decoder layers with a gated MLP:

    up_proj / down_proj   the product act(gate) * up is linear in up, and down is linear in it
    v_proj  / o_proj      attention weights do not depend on v, and o is linear in their sum
    q_proj  / k_proj      only q.k enters, and the rotary embedding is linear; not where q and k are
                          normalized after their projection, which would undo the factor

Torch-free: names follow from the configuration, so a dial that fits nothing is refused before any run.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bench.ask.shapes import decoder_layers
from bench.errors import BadValue, nearest

PARTNERS = {
    "mlp.up_proj": "mlp.down_proj",
    "mlp.down_proj": "mlp.up_proj",
    "self_attn.v_proj": "self_attn.o_proj",
    "self_attn.o_proj": "self_attn.v_proj",
    "self_attn.q_proj": "self_attn.k_proj",
    "self_attn.k_proj": "self_attn.q_proj",
}
WITHOUT_PARTNER = {"mlp.gate_proj": "its output goes through the activation, which is not linear"}
FAMILIES = ("llama", "mistral", "qwen2", "gemma", "gemma2", "qwen3", "gemma3_text")
"""Model types whose decoder layers are built this way (transformers, modeling_*.py)."""
NORMALIZES_QUERIES = ("qwen3", "gemma3_text")


@dataclass(frozen=True)
class Pair:
    """Two layers by full name: ``scaled`` is multiplied by ``factor`` and ``compensated`` divided by it."""

    scaled: str
    compensated: str
    factor: float

    @property
    def factors(self) -> dict[str, float]:
        """Full name -> what its weight is multiplied by."""
        return {self.scaled: self.factor, self.compensated: 1 / self.factor}


def parse_stress(texts: Iterable[str]) -> dict[str, float]:
    """``MODULE=FACTOR`` texts as a mapping. Raises BadValue for one that is not that."""
    found: dict[str, float] = {}
    for text in texts:
        pattern, _, spelt = text.rpartition("=")
        try:
            factor = float(spelt)
        except ValueError:
            factor = math.nan
        if not pattern or not math.isfinite(factor) or factor <= 0:
            raise BadValue(
                f"--stress '{text}' is not MODULE=FACTOR with a finite factor above 0",
                "for example --stress model.layers.10.mlp.up_proj=16384",
            )
        if pattern in found:
            raise BadValue(f"--stress names '{pattern}' twice")
        found[pattern] = factor
    return found


def resolve_stress(
    stress: Mapping[str, float], architecture: Mapping[str, Any], layers: int | None
) -> tuple[Pair, ...]:
    """The pairs that ``stress`` rescales, in the model's order.

    ``layers``: how many decoder layers are kept; None: all. Raises BadValue where a pattern matches nothing,
    matches a layer that has no partner, or rescales a pair that another pattern rescales already.
    """
    if not stress:
        return ()
    model_type = str(architecture.get("model_type"))
    if model_type not in FAMILIES:
        raise BadValue(
            f"--stress: no two layers of a '{model_type}' model are known that can be rescaled together",
            f"known: {', '.join(FAMILIES)}",
        )
    count = min(decoder_layers(architecture), layers or math.inf)
    names = module_names(int(count))
    taken: dict[str, str] = {}
    pairs = []
    for pattern, factor in stress.items():
        for name in _matching(pattern, names):
            pair = Pair(name, _partner(name, model_type), factor)
            for member in pair.factors:
                if member in taken:
                    raise BadValue(
                        f"--stress '{pattern}' rescales {member}, which '{taken[member]}' rescales already"
                    )
            taken |= dict.fromkeys(pair.factors, pattern)
            pairs.append(pair)
    return tuple(sorted(pairs, key=lambda pair: names.index(pair.scaled)))


def module_names(layers: int) -> list[str]:
    """Full names of the linear layers of so many decoder layers, in order."""
    attention = [f"self_attn.{part}_proj" for part in "qkvo"]
    parts = [*attention, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"]
    return [f"model.layers.{layer}.{part}" for layer in range(layers) for part in parts]


def _matching(pattern: str, names: Sequence[str]) -> list[str]:
    matching = fnmatch.filter(names, pattern)
    if not matching:
        near = nearest(pattern, names)
        raise BadValue(
            f"--stress '{pattern}' matches no linear layer of this model",
            f"did you mean '{near}'?" if near else f"names look like '{names[0]}'",
        )
    return matching


def _partner(name: str, model_type: str) -> str:
    prefix, part = name.rsplit(".", 2)[0], ".".join(name.rsplit(".", 2)[1:])
    if part in WITHOUT_PARTNER:
        raise BadValue(
            f"--stress: {name} cannot be rescaled: {WITHOUT_PARTNER[part]}",
            f"valid: {', '.join(sorted(PARTNERS))}",
        )
    if part in ("self_attn.q_proj", "self_attn.k_proj") and model_type in NORMALIZES_QUERIES:
        raise BadValue(
            f"--stress: {name} cannot be rescaled: a '{model_type}' model normalizes q and k after their "
            "projections, which undoes the factor"
        )
    return f"{prefix}.{PARTNERS[part]}"
