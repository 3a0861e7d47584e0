"""One run under transformers' Trainer, as people write it, in a fresh process.

    python -m tests.peers.trainer_peer WORK.json FOLDER

Leaves in FOLDER the stage it reached, what the observer saw, and what the Trainer itself printed.
"""

from __future__ import annotations

import sys
from pathlib import Path

from bench.run.isolation import apply_settings
from tests.peers.work import OWN_FILE, Work, end_with_parent, enter, write_json


def main(work: Work, folder: Path) -> None:
    """Load, attach, train."""
    enter(folder, "import")
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainingArguments

    from tests.peers import observer

    torch.set_num_threads(work.threads)
    enter(folder, "load")
    quantization = BitsAndBytesConfig(**observer.four_bit()) if work.backend == "bnb-nf4" else None
    model = AutoModelForCausalLM.from_pretrained(
        work.model_folder,
        dtype=torch.bfloat16,
        attn_implementation=work.attention,
        quantization_config=quantization,
    )
    model.config.use_cache = False
    enter(folder, "attach")
    watching = observer.Observer(work, folder)
    wrapped = get_peft_model(model, LoraConfig(**observer.lora_settings(work)))
    watching.adapters_digest = observer.copy_adapters(wrapped, work)
    watching.install()
    observer.in_order()
    columns = observer.rows(work)
    data = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
    settings = TrainingArguments(output_dir=str(folder / "out"), use_cpu=True, **observer.arguments(work))
    output = Trainer(model=wrapped, args=settings, train_dataset=data).train()
    write_json(folder / OWN_FILE, output.metrics)


if __name__ == "__main__":
    end_with_parent()
    apply_settings()
    main(Work.load(Path(sys.argv[1])), Path(sys.argv[2]))
