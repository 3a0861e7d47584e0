"""Counts the bytes of every tensor that lives while the real training loop runs, as an allocator would.

``python -m tests.live_bytes CASES`` takes a JSON list of cases, trains each for two steps on a toy and prints a JSON
list of the peaks of the second step by phase. A process of its own, since backends' libraries change the process that
imports them. What a kernel holds inside one operation is not seen; everything between operations is.
"""

from __future__ import annotations

import contextlib
import gc
import io
import json
import sys
import warnings
import weakref
from typing import Any

ARCHITECTURE: dict[str, Any] = {
    "model_type": "qwen2",
    "hidden_size": 256,
    "intermediate_size": 768,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 500,
    "max_position_embeddings": 1024,
    "tie_word_embeddings": False,
}
DEFAULTS: dict[str, Any] = {
    "architecture": {},
    "options": {},
    "dtype": "bfloat16",
    "length": 128,
    "rows": 1,
    "accumulation": 1,
    "rank": 8,
    "precision": "autocast",
    "attention": "sdpa",
    "checkpointing": "non_reentrant",
    "padding": "packed",
}


def measure(case: dict[str, Any]) -> dict[str, int]:
    """Peak bytes of forward, backward and optimizer step in the second step, weights and all."""
    import torch
    from torch.utils._python_dispatch import TorchDispatchMode
    from torch.utils._pytree import tree_iter

    from bench.run.training import _update, micro_batch_loss, unscaled_norm

    class Live(TorchDispatchMode):
        def __init__(self) -> None:
            super().__init__()
            self.sizes: dict[int, int] = {}
            self.bytes = self.peak = 0

        def see(self, tensor: torch.Tensor) -> None:
            storage = tensor.untyped_storage()
            identity = storage._cdata
            if identity not in self.sizes and tensor.device.type != "meta":
                self.sizes[identity] = storage.nbytes()
                self.bytes += storage.nbytes()
                weakref.finalize(storage, self.gone, identity)

        def gone(self, identity: int) -> None:
            self.bytes -= self.sizes.pop(identity, 0)

        def restart(self) -> None:
            self.peak = self.bytes

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            out = func(*args, **(kwargs or {}))
            for value in tree_iter(out):
                if isinstance(value, torch.Tensor):
                    self.see(value)
            self.peak = max(self.peak, self.bytes)
            return out

    trainer, model = _trainer(case)
    live, peaks = Live(), {}
    for tensor in [*model.parameters(), *model.buffers(), *_others(model)]:
        live.see(tensor)
    with live:
        for _ in range(2):
            for _ in range(case["accumulation"]):
                batch = trainer.reader.next_batch()
                live.restart()
                loss = micro_batch_loss(trainer, batch)
                peaks["forward"] = live.peak
                live.restart()
                (loss / case["accumulation"]).backward()
                peaks["backward"] = live.peak
                del loss
            live.restart()
            scale, norm = unscaled_norm(trainer)
            _update(trainer, norm, scale)
            peaks["optimizer_step"] = live.peak
    return peaks


def _others(model: Any) -> list[Any]:
    """Tensors of the layers that are neither parameters nor buffers."""
    from bench.load.proof import tensors_of

    return [tensor for module in model.modules() for _, tensor in tensors_of(module)]


def _trainer(case: dict[str, Any]) -> tuple[Any, Any]:
    import torch

    from bench.ask.experiment import Lora, Workload
    from bench.load.contract import PackedBackend
    from bench.load.layout import Layout
    from bench.load.lora import attach
    from bench.load.model import DTYPES, build_model, linear_shapes, skeleton
    from bench.load.registry import get_backend
    from bench.load.weights import CPU, SyntheticWeights
    from bench.run.attention import choose_kernel, implementation
    from bench.run.training import enable_checkpointing, make_trainer
    from bench.run.workload import HashEncoder, WorkloadReader
    from tests.record_factory import request

    architecture = ARCHITECTURE | case["architecture"]
    backend = get_backend(case["backend"]).create(case["options"], "cpu", case["dtype"])
    choose_kernel(case["attention"])
    model = skeleton(architecture, implementation(case["attention"]))
    shapes = linear_shapes(model)
    backend.fit(list(shapes.values()))
    dense = SyntheticWeights({name: p.shape for name, p in model.named_parameters()}, 0.02)

    class Packed:
        def __contains__(self, name: str) -> bool:
            return name in dense or name.rpartition(".")[2] in backend.packed_names  # type: ignore[attr-defined]

        def tensor(self, name: str, device: torch.device = CPU) -> torch.Tensor:
            owner, _, part = name.rpartition(".")
            if owner not in shapes or part == "bias":
                return dense.tensor(name)
            return backend.pack(dense.tensor(f"{owner}.weight"))[part]  # type: ignore[attr-defined]

    weights = Packed() if isinstance(backend, PackedBackend) else dense
    built = build_model(model, weights, backend, Layout.on(torch.device("cpu")))
    enable_checkpointing(built.model, case["checkpointing"])
    work = Workload(
        sequence_length=case["length"],
        micro_batch_size=case["rows"],
        gradient_accumulation_steps=case["accumulation"],
        padding=case["padding"],
    )
    lora = Lora(rank=case["rank"], precision=case["precision"])
    asked = request(case["backend"], device="cpu", workload=work, lora=lora, dtype=case["dtype"])
    adapters = attach(built.model, lora, 0, DTYPES[backend.dtype])
    reader = WorkloadReader(work, HashEncoder(architecture["vocab_size"]))
    trainer = make_trainer(adapters, asked, reader, [torch.device("cpu")], backend.dtype)
    # The form that torch chooses by itself on a card.
    trainer.optimizer = torch.optim.AdamW(trainer.parameters, foreach=True)
    return trainer, built.model


def main() -> None:
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    # Without a device autocast's state is that of CUDA, and PEFT's HQQ layer asks for that: on a card it is on.
    asked = torch.is_autocast_enabled
    torch.is_autocast_enabled = lambda *device: asked(*device) if device else asked("cpu")
    with contextlib.redirect_stdout(io.StringIO()):
        peaks = []
        for case in json.loads(sys.argv[1]):
            peaks.append(measure(DEFAULTS | case))
            gc.collect()
    print(json.dumps(peaks))


if __name__ == "__main__":
    main()
