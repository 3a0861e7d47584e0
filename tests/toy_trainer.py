"""Real trainings by transformers' Trainer of a toy on the CPU, in which NaN begins where a case says.

``python -m tests.toy_trainer FOLDER`` runs every case of CASES and leaves FOLDER/NAME/trainer_state.json and
FOLDER/NAME/console.log, standard output and error together, as a person would have redirected them. Run in a
process of its own: it imports torch and transformers, whose warnings are none of the tests' concern.
"""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

How = Literal["from_on", "one", "backward"]
"""The loss is NaN from a micro-batch on; in it alone, after which the weights are; or only its gradient is."""


@dataclass(frozen=True)
class Case:
    """One training. Steps and micro-batches are counted from 1."""

    accumulation: int
    logging_steps: int
    steps: int
    how: How | None
    step: int = 0
    micro_batch: int = 1
    filtered: bool = True
    noisy: bool = False
    """Random sentences and a rate at which the loss falls, instead of one sentence and next to none."""
    batches_per_epoch: int | None = None
    """None: the run is one epoch."""
    tag: str = ""

    @property
    def name(self) -> str:
        where = f"-step{self.step}.{self.micro_batch}" if self.how else ""
        return f"G{self.accumulation}-N{self.logging_steps}-{self.how or 'healthy'}{where}{self.tag}"


EXACT = (
    Case(1, 1, 9, "from_on", 7),
    Case(2, 1, 9, "from_on", 7, 2),
    Case(4, 1, 8, "from_on", 6),
    Case(8, 1, 8, "from_on", 5, 6),
    Case(1, 5, 20, "from_on", 18),
    Case(2, 5, 25, "from_on", 18),
    Case(4, 5, 20, "from_on", 17, 3),
    Case(8, 5, 25, "from_on", 19),
    Case(8, 5, 20, "from_on", 16, 5),
    Case(1, 10, 50, "from_on", 35),
    Case(1, 10, 40, "from_on", 39),
    Case(2, 10, 50, "from_on", 34),
    Case(4, 10, 40, "from_on", 32),
    Case(4, 10, 50, "from_on", 31),
    Case(8, 10, 50, "from_on", 37, 4),
    Case(2, 10, 40, "one", 33),
    Case(4, 10, 40, "one", 36, 3),
    Case(8, 5, 25, "one", 17, 8),
    Case(8, 10, 40, "one", 32, 3),
    Case(8, 1, 8, "one", 6, 4),
)
"""The loss hardly changes, so that the filter's arithmetic alone decides: every step must come out right."""
BACKWARD_INSIDE = Case(4, 5, 20, "backward", 17, 2)
BACKWARD_LAST = Case(2, 5, 25, "backward", 20)
NOISY = (
    Case(4, 10, 40, "from_on", 35, noisy=True, tag="-noisy"),
    Case(8, 5, 40, "one", 33, 4, noisy=True, tag="-noisy"),
    Case(2, 10, 50, "from_on", 36, 2, noisy=True, tag="-noisy"),
)
UNEVEN = Case(4, 10, 28, "from_on", 12, batches_per_epoch=53, tag="-uneven")
"""13 full steps and one of a single micro-batch: step 14, after NaN began and before it is logged."""
OVERFLOWING = Case(40, 10, 20, "from_on", 11, 2, tag="-overflow")
UNFILTERED = Case(4, 5, 25, "one", 12, filtered=False, tag="-unfiltered")
HEALTHY = Case(2, 5, 40, None)
CASES = (*EXACT, BACKWARD_INSIDE, BACKWARD_LAST, *NOISY, UNEVEN, OVERFLOWING, UNFILTERED, HEALTHY)


def main(folder: Path) -> None:
    """Run every case."""
    os.environ["HF_HUB_OFFLINE"] = "1"
    import torch

    torch.set_num_threads(1)
    for case in CASES:
        there = folder / case.name
        there.mkdir(parents=True)
        console = os.open(there / "console.log", os.O_WRONLY | os.O_CREAT, 0o644)
        kept = [(stream, os.dup(stream)) for stream in (1, 2)]
        for stream, _ in kept:
            os.dup2(console, stream)
        try:
            run(case, there)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            for stream, copy in kept:
                os.dup2(copy, stream)
                os.close(copy)
            os.close(console)


def run(case: Case, folder: Path) -> None:
    """Train once."""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM, Trainer, TrainingArguments

    bad = (case.step - 1) * case.accumulation + case.micro_batch - 1 if case.how else None

    class Poisoned(Trainer):
        """A Trainer whose loss goes bad at a micro-batch; all else is its own."""

        seen = 0

        def compute_loss(self, *arguments, **options):
            loss = super().compute_loss(*arguments, **options)
            here, self.seen = self.seen, self.seen + 1
            if bad is None or here < bad or (here > bad and case.how != "from_on"):
                return loss
            if case.how == "backward":
                loss.register_hook(lambda gradient: gradient * float("nan"))
                return loss
            return loss * float("nan")

    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=32, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=2, max_position_embeddings=32, use_cache=False, bos_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip
    count = case.batches_per_epoch or case.steps * case.accumulation
    draw = torch.Generator().manual_seed(1)
    rows = [
        torch.randint(0, 32, (12,), generator=draw) if case.noisy else torch.arange(12) for _ in range(count)
    ]
    arguments = TrainingArguments(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=1,
        gradient_accumulation_steps=case.accumulation,
        logging_steps=case.logging_steps,
        logging_nan_inf_filter=case.filtered,
        max_steps=case.steps,
        learning_rate=3e-3 if case.noisy else 1e-6,
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        seed=0,
    )
    trainer = Poisoned(
        model=model, args=arguments, train_dataset=[{"input_ids": r, "labels": r} for r in rows]
    )
    trainer.train()
    trainer.state.save_to_json(str(folder / "trainer_state.json"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
