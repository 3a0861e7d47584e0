"""``qlora-bench diagnose``: what happened in a training that another program logged."""

from __future__ import annotations

import json
from pathlib import Path

import click

from bench.cli.paths import GivenPath

MOST_STEPS = 1_000_000


@click.command()
@click.argument("file", type=GivenPath())
@click.option(
    "--logging-steps",
    type=click.IntRange(1, MOST_STEPS),
    metavar="N",
    help="Optimizer steps between entries, where the file does not tell.",
)
@click.option(
    "--accumulation",
    type=click.IntRange(1, MOST_STEPS),
    metavar="N",
    help="Micro-batches per optimizer step (gradient_accumulation_steps), where the file does not tell.",
)
@click.option(
    "--finite-loss",
    type=click.FloatRange(min=0, min_open=True),
    metavar="X",
    help="The loss before the NaN, where the file begins too late to show it.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as one JSON document.")
def diagnose(
    file: Path, logging_steps: int | None, accumulation: int | None, finite_loss: float | None, as_json: bool
) -> None:
    """Say what happened in a training, and at which step NaN began, from the log in FILE.

    FILE is a Trainer's trainer_state.json, LLaMA-Factory's trainer_log.jsonl, or console output with lines
    such as {'loss': 2.29, 'grad_norm': 0.39, ...}, whatever stands between them.
    """
    from bench.judge.logs.diagnosis import diagnose as diagnosed
    from bench.record.logs.training_log import read_training_log
    from bench.show.diagnosis import diagnosis_document, diagnosis_text
    from bench.show.terminal import say

    log = read_training_log(file)
    found = diagnosed(log, logging_steps, accumulation, finite_loss)
    if as_json:
        click.echo(json.dumps(diagnosis_document(found), indent=1, allow_nan=False))
    else:
        say(diagnosis_text(found))
