"""``qlora-bench plan``: whether a training fits on cards, by arithmetic, before anything is downloaded."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING

import click

from bench.errors import BadValue

if TYPE_CHECKING:
    from bench.ask.cards import Cards

SHARED = {"preset", "dtype", "attention", "checkpointing", "workload", "lora"}
"""Fields of a request that a plan depends on and that every backend's has alike."""


@click.command()
@click.option("--preset", default="auto", show_default=True, metavar="NAME|FILE", help="What to plan for.")
@click.option("--backend", "backends", multiple=True, metavar="ID", help="A backend (repeatable), or 'all'.")
@click.option(
    "--cards",
    multiple=True,
    metavar="NxSIZE",
    help="The cards, such as 7x24GB or 80GB (repeatable).  [default: those of this machine]",
)
@click.option("--dtype", metavar="DTYPE", help="Compute dtype: bfloat16, float16 or float32.")
@click.option("--model", metavar="DIR", help="A folder with config.json, instead of the preset's model.")
@click.option("--layers", type=int, metavar="N", help="Keep only the first N decoder layers.")
@click.option(
    "--set",
    "settings",
    multiple=True,
    metavar="KEY=VALUE",
    help="Any other setting of run, such as workload.sequence_length=2048 or lora.rank=16 (repeatable).",
)
@click.option("--json", "as_json", is_flag=True, help="Print every card, phase and term as JSON.")
def plan(
    preset: str,
    backends: tuple[str, ...],
    cards: tuple[str, ...],
    dtype: str | None,
    model: str | None,
    layers: int | None,
    settings: tuple[str, ...],
    as_json: bool,
) -> None:
    """Compute the memory of a training on each card: does it fit, and up to which sequence length?

    Nothing is loaded or allocated, no card and no weights are needed.
    """
    from bench.load.fit import assumptions, outlooks
    from bench.run.arrange import arrange
    from bench.run.asked import Asked
    from bench.show.footprint import plan_document, plan_table
    from bench.show.terminal import Terminal, say

    for setting in settings:
        if setting.partition("=")[0].strip() == "device":
            raise BadValue("--set device: a plan is always for CUDA cards", "name them with --cards")
    wanted = _cards(cards)
    # Synthetic weights on a CPU: what every machine can plan, whatever lies on its disk.
    asked = Asked(
        preset=preset,
        backends=backends,
        dtype=dtype,
        device="cpu",
        model=model,
        weights="synthetic",
        layers=layers,
        settings=settings,
    )
    requests = arrange(asked).sweep.requests
    found, assumed = outlooks(requests, wanted), assumptions(requests)
    # What all of them share.
    first = requests[0]
    depth = first.model.architecture["num_hidden_layers"]
    if as_json:
        shared = first.model_dump(mode="json", include=SHARED) | {
            "model": first.model.name,
            "decoder_layers": depth,
        }
        click.echo(json.dumps(plan_document(found, assumed, shared), indent=1))
        return
    say(
        f"{first.model.name}, {depth} layers: {first.workload.micro_batch_size} x "
        f"{first.workload.sequence_length} tokens, LoRA rank {first.lora.rank}, checkpointing "
        f"{first.checkpointing.replace('_', ' ')}"
    )
    Terminal().print(plan_table(found, assumed))


def _cards(named: tuple[str, ...]) -> list[Cards]:
    """The cards that were named, or those of this machine. Raises BadValue where there are none."""
    from bench.ask.cards import EXAMPLE, cards_here, parse_cards
    from bench.probe.machine import cuda_devices

    if named:
        return list(dict.fromkeys(parse_cards(text) for text in named))
    here = cards_here(device.total_memory_bytes for device in cuda_devices())
    if not here:
        raise BadValue("no CUDA card was found here to plan for", f"name the cards, {EXAMPLE}")
    return here
