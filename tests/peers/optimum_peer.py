"""One training scenario of optimum-benchmark, through its Python interface, in a fresh process.

    python -m tests.peers.optimum_peer WORK.json FOLDER [--launcher process|inline] [--quantize-by scheme|method]

It has no way to take data or initial adapter values: it draws random ids and lets PEFT draw the adapters. Both
are handed in behind its back, and rows come in their order, so that its work is this project's; launcher,
scenario, trackers and report are its own. Leaves in FOLDER the stage, what the observer saw, and its report.

``--quantize-by method`` asks for 4 bits as its own deprecation warning says one should
(``quantization_config.quant_method``) instead of by the deprecated ``quantization_scheme``.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

from bench.run.isolation import apply_settings
from tests.peers.work import OWN_FILE, Work, end_with_parent, enter, write_json


def main() -> None:
    """Launch one benchmark."""
    parser = argparse.ArgumentParser()
    parser.add_argument("work", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--launcher", choices=("process", "inline"), default="process")
    parser.add_argument("--quantize-by", choices=("scheme", "method"), default="scheme")
    asked = parser.parse_args()
    enter(asked.folder, "import")
    work = Work.load(asked.work)
    import optimum_benchmark as peer

    enter(asked.folder, "configure")
    config = configure(peer, work, asked.folder, asked.launcher, asked.quantize_by)
    if asked.launcher == "process":
        from optimum_benchmark.launchers.process.launcher import ProcessLauncher as Launcher
    else:
        from optimum_benchmark.launchers.inline.launcher import InlineLauncher as Launcher
    enter(asked.folder, "launch")
    began, busy = time.perf_counter(), time.process_time()
    report = Launcher(config.launcher).launch(worker=run, worker_args=[config, work, str(asked.folder)])
    own = {
        "report": report.to_dict(),
        "launcher": asked.launcher,
        "launch_wall_seconds": time.perf_counter() - began,
        "launch_cpu_seconds": time.process_time() - busy,
    }
    write_json(asked.folder / OWN_FILE, _numbers(own))


def configure(peer: Any, work: Work, folder: Path, launcher: str, quantize_by: str) -> Any:
    """Its configuration for the work."""
    from tests.peers import observer

    quantization: dict[str, Any] = {}
    if work.backend == "bnb-nf4" and quantize_by == "scheme":
        quantization = {"quantization_scheme": "bnb", "quantization_config": observer.four_bit()}
    elif work.backend == "bnb-nf4":
        quantization = {
            "quantization_config": {"quant_method": "bitsandbytes", **observer.four_bit()}
        }
    return peer.BenchmarkConfig(
        name="peers",
        launcher=peer.ProcessConfig() if launcher == "process" else peer.InlineConfig(),
        scenario=peer.TrainingConfig(
            max_steps=work.steps,
            warmup_steps=work.warmup_steps,
            dataset_shapes={
                "dataset_size": work.steps * work.micro_batch_size,
                "sequence_length": work.sequence_length,
            },
            training_arguments={"output_dir": str(folder / "out"), **observer.arguments(work)},
            latency=True,
            memory=True,
        ),
        backend=peer.PyTorchConfig(
            model=work.model_folder,
            device="cpu",
            torch_dtype="bfloat16",
            attn_implementation=work.attention,
            peft_type="LORA",
            peft_config=observer.lora_settings(work),
            **quantization,
        ),
    )


def run(config: Any, work: Work, folder_name: str) -> Any:
    """What the launcher runs, in the process that is measured: its own benchmark, with our data and adapters."""
    folder = Path(folder_name)
    enter(folder, "import")
    import torch
    from datasets import Dataset
    from optimum_benchmark import Benchmark
    from optimum_benchmark.backends.pytorch import backend
    from optimum_benchmark.scenarios.training import scenario

    from tests.peers import observer

    torch.set_num_threads(work.threads)
    watching = observer.Observer(work, folder)
    watching.install()
    observer.in_order()

    def drawn(generator: Any) -> Dataset:
        enter(folder, "load")
        columns = observer.rows(work)
        data = Dataset.from_dict({name: column.tolist() for name, column in columns.items()})
        data.set_format(type="torch", columns=list(columns))
        return data

    attach = backend.apply_peft

    def apply_peft(*arguments: Any, **named: Any) -> Any:
        enter(folder, "attach")
        wrapped = attach(*arguments, **named)
        watching.adapters_digest = observer.copy_adapters(wrapped, work)
        return wrapped

    scenario.DatasetGenerator.__call__ = drawn
    backend.apply_peft = apply_peft
    return Benchmark.run(config)


def _numbers(value: Any) -> Any:
    """numpy's numbers as Python's."""
    if isinstance(value, dict):
        return {key: _numbers(inner) for key, inner in value.items()}
    if isinstance(value, list):
        return [_numbers(inner) for inner in value]
    return value.item() if hasattr(value, "item") else value


if __name__ == "__main__":
    end_with_parent()
    apply_settings()
    main()
