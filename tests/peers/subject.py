"""Makes what every arm reads: one checkpoint, and for each case the batches and the initial adapters.

    python -m tests.peers.subject checkpoint REQUEST.json SOURCE|- FOLDER
    python -m tests.peers.subject tensors REQUEST.json MODEL FOLDER

Run in a process of its own, since it imports torch. REQUEST is a `RunRequest`. SOURCE is the folder of real
weights; ``-`` draws synthetic ones in the request's shape.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors.torch import save_file

from bench.ask.plan import RunRequest
from bench.load.lora import initial_values
from bench.load.model import linear_shapes, skeleton
from bench.load.weights import CheckpointWeights, SyntheticWeights, Weights
from bench.run.workload import WorkloadReader, encoder_for
from tests.peers.preparing import older_form
from tests.peers.work import ADAPTERS_FILE, BATCHES_FILE

OF_A_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "vocab*", "merges.txt", "chat_template*")


def write_checkpoint(request: RunRequest, source: Path | None, folder: Path) -> None:
    """The request's model as an ordinary checkpoint in one file, cut to its layers."""
    architecture = dict(request.model.architecture)
    model = skeleton(architecture, "sdpa")
    shapes = {name: parameter.shape for name, parameter in model.named_parameters()}
    weights: Weights = (
        CheckpointWeights(source)
        if source
        else SyntheticWeights(shapes, float(architecture.get("initializer_range", 0.02)))
    )
    folder.mkdir(parents=True)
    tensors = {name: weights.tensor(name).to(torch.bfloat16) for name in shapes}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    (folder / "config.json").write_text(json.dumps(older_form(architecture), indent=1), encoding="utf-8")
    for pattern in OF_A_TOKENIZER:
        for file in source.glob(pattern) if source else ():
            shutil.copy(file, folder)


def write_tensors(request: RunRequest, model_folder: Path, folder: Path) -> None:
    """The batches of all steps in their order, and the initial value of every adapter."""
    architecture = dict(request.model.architecture)
    reader = WorkloadReader(request.workload, encoder_for(model_folder, int(architecture["vocab_size"])))
    batches = [reader.next_batch() for _ in range(request.workload.steps)]
    columns = {
        name: torch.cat([getattr(batch, name) for batch in batches])
        for name in ("input_ids", "labels", "attention_mask")
    }
    save_file(columns, folder / BATCHES_FILE)
    adapters = {}
    for layer, shape in linear_shapes(skeleton(architecture, "sdpa")).items():
        if layer.rpartition(".")[2] in request.lora.target_modules:
            a, b = (request.lora.rank, shape.in_features), (shape.out_features, request.lora.rank)
            for side, size in (("lora_A", a), ("lora_B", b)):
                name = f"{layer}.{side}"
                adapters[name] = initial_values(name, torch.Size(size), request.seed)
    save_file(adapters, folder / ADAPTERS_FILE)


def main(work: str, request_file: str, model: str, folder: str) -> None:
    """One of the two."""
    request = RunRequest.model_validate_json(Path(request_file).read_text(encoding="utf-8"))
    if work == "checkpoint":
        write_checkpoint(request, None if model == "-" else Path(model), Path(folder))
    else:
        write_tensors(request, Path(model), Path(folder))


if __name__ == "__main__":
    main(*sys.argv[1:])
