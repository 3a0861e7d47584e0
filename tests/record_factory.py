"""Realistic, valid records for the tests of everything after the measurement.

``record("hqq", status="crashed")`` builds one; every field of Record can be overridden by keyword.
``eight_backends()`` builds a plausible set on one CUDA card, AWQ's float16 included. The numbers are
made up and appear nowhere but in tests.
"""

from __future__ import annotations

import hashlib
import json
import math
from typing import Any

from bench.ask.experiment import Lora, Optimizer, Workload
from bench.ask.plan import ModelRequest, RunRequest
from bench.record.environment import Device, Environment
from bench.record.memory import BytesByKind, Memory, MemoryReading
from bench.record.schema import Load, LoraFacts, Proof, Quantization, Record, Step, WorkloadFacts
from bench.record.stability import (
    Fidelity,
    FirstFailure,
    LayerFidelity,
    Remedy,
    Replay,
    StepProbe,
    StressedPair,
    WeightError,
)
from bench.record.triage import Configuration, Confirmation, Rung, Triage
from bench.record.triage import Evidence as Seen

MIB = 2**20
GIB = 2**30
PHASES = ("loaded", "attached", "forward", "backward", "optimizer_step")

# backend: (kernel, bits per weight, load seconds, step seconds, peak GiB, first loss)
FIGURES = {
    "bf16": ("torch.nn.Linear", 16.0, 3.1, 0.212, 17.4, 1.912),
    "bnb-nf4": ("bitsandbytes.nn.Linear4bit", 4.5, 9.8, 0.301, 8.61, 1.957),
    "bnb-nf4-dq": ("bitsandbytes.nn.Linear4bit", 4.127, 10.4, 0.312, 8.28, 1.957),
    "bnb-int8": ("bitsandbytes.nn.Linear8bitLt", 8.008, 8.9, 0.402, 11.7, 1.921),
    "hqq": ("hqq.core.quantize.HQQLinear", 4.5, 63.2, 0.355, 8.66, 1.949),
    "gptq": ("gptqmodel.nn_modules.qlinear.torch.TorchLinear", 4.156, 12.3, 0.498, 8.9, 2.031),
    "awq": ("gptqmodel.nn_modules.qlinear.torch_awq.AwqTorchLinear", 4.156, 12.9, 0.521, 8.94, 1.988),
    "eetq": ("backends.eetq.PortableInt8Linear", 8.008, 6.7, 0.377, 11.9, 1.924),
}
AWQ_NOTE = "AWQ kernels on CUDA compute in float16 only, so bfloat16 was replaced"


def digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def request(
    backend: str = "bf16",
    *,
    repeat: int = 0,
    device: str = "cuda",
    weights: str = "real",
    **changes: Any,
) -> RunRequest:
    values: dict[str, Any] = {
        "preset": "qwen2-7b",
        "model": ModelRequest(
            name="Qwen/Qwen2-7B-Instruct",
            weights=weights,
            fingerprint=digest("qwen2-7b" + weights),
            architecture={"model_type": "qwen2", "num_hidden_layers": 28},
        ),
        "backend": backend,
        "options": {"group_size": 64} if backend in {"hqq", "gptq", "awq"} else {},
        "dtype": "bfloat16",
        "device": device,
        "attention": "sdpa",
        "checkpointing": "non_reentrant",
        "workload": Workload(sequence_length=512, steps=8, warmup_steps=2),
        "lora": Lora(),
        "optimizer": Optimizer(),
        "seed": repeat,
        "repeat": repeat,
        "timeout_seconds": 3600.0,
        "cpu_threads": 8,
        "versions": {"qlora-bench": "0.1.0", "torch": "2.14.1"},
    }
    return RunRequest(**(values | changes))


def step(index: int, **changes: Any) -> Step:
    values: dict[str, Any] = {
        "index": index,
        "warmup": index < 2,
        "losses": (2.0 - 0.05 * index,),
        "gradient_norm": 0.8 - 0.03 * index,
        "learning_rate": 2e-4,
        "seconds": 0.3 if index else 1.9,
        "tokens": 512,
        "loss_tokens": 301,
        "applied": True,
    }
    return Step(**(values | changes))


def steps(backend: str, repeat: int = 0, count: int = 8) -> tuple[Step, ...]:
    *_, seconds, _, loss = FIGURES[backend]
    shake = [1.0, 1.004, 0.997, 1.011, 0.993, 1.002, 1.006, 0.999]
    return tuple(
        step(
            index,
            losses=(loss - 0.06 * index + 0.02 * math.sin(3 * index + repeat),),
            gradient_norm=0.9 * math.exp(-0.08 * index) * (1 + 0.1 * math.sin(5 * index)) * loss / 2,
            seconds=seconds * (shake[(index + repeat) % 8] if index else 6.0) * (1 + 0.004 * repeat),
            loss_tokens=301 + index,
        )
        for index in range(count)
    )


def memory(backend: str, *, cpu: bool = False) -> Memory:
    bits, peak = FIGURES[backend][1], FIGURES[backend][4]
    device = "cpu" if cpu else "cuda:0"
    share = dict(zip(PHASES, (0.62, 0.63, 0.88, 1.0, 0.97), strict=True))
    names = ("resident_bytes", "peak_resident_bytes") if cpu else ("allocated_bytes", "peak_reserved_bytes")

    def reading(phase: str) -> MemoryReading:
        top = int(peak * GIB * share[phase])
        extra = {} if cpu else {"nvml_used_bytes": top + 512 * MIB, "reserved_bytes": top}
        return MemoryReading(
            phase=phase, device=device, **{names[0]: int(top * 0.93), names[1]: top}, **extra
        )

    weights = 6_525_288_448
    kinds = BytesByKind(
        device=device,
        quantized_weights=int(weights * min(bits, 16) / 8 * 0.9),
        quantization_metadata=0 if backend == "bf16" else int(weights * bits / 8 * 0.1),
        unquantized_weights=2_180_000_000,
        lora=80_740_352,
        gradients=80_740_352,
        optimizer_state=161_480_704,
    )
    return Memory(readings=tuple(reading(phase) for phase in PHASES), bytes_by_kind=(kinds,), phase_step=1)


def environment(*, cpu: bool = False, **changes: Any) -> Environment:
    card = Device(
        device="cuda:0",
        name="NVIDIA GeForce RTX 4090",
        total_memory_bytes=24 * GIB,
        compute_capability="8.9",
        driver="570.86",
        power_limit_watts=450.0,
    )
    processor = Device(device="cpu", name="AMD EPYC 7B13", total_memory_bytes=64 * GIB)
    values: dict[str, Any] = {
        "platform": "Linux-6.8-x86_64",
        "python": "3.11.9",
        "cpu": "AMD EPYC 7B13",
        "cpu_cores": 16,
        "cpu_threads": 8,
        "total_memory_bytes": 64 * GIB,
        "cuda": None if cpu else "13.0",
        "devices": (processor,) if cpu else (card,),
        "versions": {
            "qlora-bench": "0.1.0",
            "torch": "2.14.1",
            "transformers": "5.24.0",
            "peft": "0.21.2",
            "accelerate": "1.15.0",
        },
        "quantization_libraries_imported": (),
        "allocator_settings": None,
        "changed_variables": {},
        "commit": "4f0c1d2e9a7b",
        "dirty": False,
    }
    return Environment(**(values | changes))


def quantization(backend: str, **changes: Any) -> Quantization:
    kernel, bits, *_ = FIGURES[backend]
    values: dict[str, Any] = {
        "kernel": kernel,
        "layers": 196,
        "weights": 6_525_288_448,
        "requested_dtype": "bfloat16",
        "effective_dtype": "bfloat16",
        "storage_bits_per_weight": bits,
        "expected_bits_per_weight": bits,
        "options": {"group_size": 64} if backend in {"hqq", "gptq", "awq"} else {},
        "calibration": "rtn" if backend in {"gptq", "awq"} else None,
    }
    return Quantization(**(values | changes))


def record(
    backend: str = "bf16",
    *,
    repeat: int = 0,
    cpu: bool = False,
    weights: str = "real",
    ask: dict[str, Any] | None = None,
    **changes: Any,
) -> Record:
    """One completed record; ``ask`` changes the request, other keywords change the record."""
    asked = request(backend, repeat=repeat, device="cpu" if cpu else "cuda", weights=weights, **(ask or {}))
    load_seconds = FIGURES[backend][2]
    values: dict[str, Any] = {
        "key": asked.key,
        "command": asked.command,
        "request": asked,
        "status": "completed",
        "stage": None,
        "message": None,
        "exit_code": 0,
        "started_at": f"2026-10-01T12:{repeat:02d}:{list(FIGURES).index(backend):02d}Z",
        "wall_seconds": 60.0 + load_seconds,
        "environment": environment(cpu=cpu),
        "quantization": quantization(backend),
        "load": Load(
            import_seconds=4.2,
            prepare_seconds=31.5 if backend in {"gptq", "awq"} else None,
            load_seconds=load_seconds * (1 + 0.02 * repeat),
            attach_seconds=0.4,
            host_peak_bytes=int(3.4 * GIB),
            weights_digest=digest(f"unquantized{repeat if weights == 'synthetic' else ''}"),
        ),
        "lora": LoraFacts(
            parameters=20_185_088,
            tensors=392,
            dtype="float32",
            initial_digest=digest(f"lora{repeat}"),
            shapes_digest=digest("shapes"),
        ),
        "workload": WorkloadFacts(
            source="generated instructions",
            tokenizer="Qwen/Qwen2-7B-Instruct",
            examples=40,
            digest=digest(f"work{repeat}"),
            tokens=4096,
            loss_tokens=2436,
            batches_without_targets=0,
            attention="sdpa",
            autocast_dtype="bfloat16",
        ),
        "memory": memory(backend, cpu=cpu),
        "proof": Proof(quantized=True, base_frozen=True, gradients_reach_adapters=True),
        "steps": steps(backend, repeat),
        "trainable_weights_finite": True,
    }
    return Record(**(values | changes))


def failed(backend: str, status: str, stage: str, message: str, **changes: Any) -> Record:
    """A record of a run that ended in ``stage``, before anything was observed."""
    nothing: dict[str, Any] = dict.fromkeys(
        ("environment", "quantization", "load", "lora", "workload", "trainable_weights_finite")
    )
    values = nothing | {"memory": Memory(), "proof": Proof(), "steps": (), "exit_code": 1}
    return record(backend, status=status, stage=stage, message=message, **(values | changes))


def eight_backends(*, repeats: int = 1, cpu: bool = False, weights: str = "real") -> list[Record]:
    """All eight, completed, interleaved as the plan orders them; AWQ computed in float16 and says so."""
    float16 = quantization("awq", effective_dtype="float16", notes=(AWQ_NOTE,))
    return [
        record(
            backend,
            repeat=repeat,
            cpu=cpu,
            weights=weights,
            **({"quantization": float16} if backend == "awq" and not cpu else {}),
        )
        for repeat in range(repeats)
        for backend in FIGURES
    ]


# ---- what the probes saw --------------------------------------------------------------------------

LAYERS = 28
TENSORS = tuple(
    f"model.layers.{layer}.{part}.lora_{half}"
    for layer in range(LAYERS)
    for part in ("self_attn.q_proj", "mlp.down_proj")
    for half in "AB"
)
FAILING_MODULE = "model.layers.10.mlp.down_proj"


def probe(index: int = 2, layers: int = LAYERS, **changes: Any) -> StepProbe:
    """What a healthy step shows: A's gradients are exactly zero in step 0, for B is zero there."""
    names = [name for name in TENSORS if int(name.split(".")[2]) < layers]
    at_start = [index == 0 and name.endswith("lora_A") for name in names]
    values: dict[str, Any] = {
        "activation_abs_max": tuple(
            (14.0 + 60 * layer) * (9 if layer == layers // 3 else 1) * (1 + 0.01 * index)
            for layer in range(layers)
        ),
        "gradient_abs_max": tuple(3e-3 * 1.09 ** (layers - layer) for layer in range(layers)),
        "tensor_norms": tuple(0.0 if zero else 0.02 + 0.001 * n for n, zero in enumerate(at_start)),
        "non_finite_values": (0,) * len(names),
        "zero_values": tuple(4096 if zero else 0 for zero in at_start),
    }
    return StepProbe(**(values | changes))


def probed(made: Record, layers: int = LAYERS, **of_steps: StepProbe) -> Record:
    """``made`` with a probe in every step; ``step_3=probe(...)`` replaces that of step 3."""
    names = tuple(name for name in TENSORS if int(name.split(".")[2]) < layers)
    own = {int(name.removeprefix("step_")): seen for name, seen in of_steps.items()}
    looked_at = tuple(
        step.model_copy(update={"probe": own.get(step.index, probe(step.index, layers))})
        for step in made.steps
    )
    lora = made.lora.model_copy(update={"names": names, "tensors": len(names)}) if made.lora else None
    return made.model_copy(update={"steps": looked_at, "lora": lora})


def first_failure(**changes: Any) -> FirstFailure:
    step, micro_batch = changes.get("step", 5), changes.get("micro_batch", 0)
    values: dict[str, Any] = {
        "kind": "forward_overflow",
        "step": step,
        "micro_batch": micro_batch,
        "phase": "forward",
        "module": FAILING_MODULE,
        "tensor": "output",
        "device": "cuda:0",
        "value": math.inf,
        "last_finite_abs_max": 61_440.0,
        "history_abs_max": (20_480.0, 32_000.0, 61_440.0),
        "dtype_max": 65_504.0,
        "loss": math.nan,
        "evidence": f"the output of {FAILING_MODULE} held an infinity in the forward of step {step}, "
        f"micro-batch {micro_batch}; float16 ends at 65504, and the largest value there before was 61440",
    }
    return FirstFailure(**(values | changes))


def replay(**changes: Any) -> Replay:
    values: dict[str, Any] = {
        "reproduced": True,
        "phase": "forward",
        "module": FAILING_MODULE,
        "operation": "aten.mm",
        "description": "a matrix product",
        "value": math.inf,
        "input_abs_max": 22_522.0,
        "remedies": (
            Remedy(
                change="float32_adapters", detail="LoRA weights and products in float32", heals=False,
                loss=math.nan, gradient_norm=math.nan, abs_max_there=math.inf,
            ),
            Remedy(change="attention", detail="attention 'eager' instead of 'sdpa'", heals=None,
                   error="OutOfMemoryError: CUDA out of memory"),
            Remedy(
                change="bfloat16", detail="compute dtype bfloat16 instead of float16", heals=True,
                loss=1.734, gradient_norm=0.912, abs_max_there=141_358.0,
            ),
        ),
    }  # fmt: skip
    return Replay(**(values | changes))


def fidelity(cosine: float = 0.981, count: int = LAYERS, **changes: Any) -> Fidelity:
    """Of a backend whose gradient has this cosine to the reference's."""

    def of_layer(layer: int) -> LayerFidelity:
        angle = min(1.0, (1 - cosine) * (0.7 + 0.6 * layer / count))
        return LayerFidelity(cosine=1 - angle, norm_ratio=1 + angle / 4, relative_error=math.sqrt(2 * angle))

    errors = tuple(
        WeightError(
            projection=name,
            relative_error=error,
            worst_module=f"model.layers.{LAYERS - 1}.{name}",
            worst_relative_error=error * 1.3,
        )
        for name, error in (("q_proj", 0.0921), ("down_proj", 0.1004))
    )
    overall = of_layer(count // 2)
    values: dict[str, Any] = {
        "reference_dtype": "bfloat16",
        "batch_digest": digest("fixed batch"),
        "loss": 1.962,
        "reference_loss": 1.912,
        "overall": overall,
        "layers": tuple(of_layer(layer) for layer in range(count)),
        "weight_errors": errors,
    }
    return Fidelity(**(values | changes))


def overflowing(backend: str = "gptq", **changes: Any) -> Record:
    """A float16 run that overflows in the forward of step 5, with its first failure and replay."""
    broken = tuple(
        made if made.index < 5 else step(made.index, losses=(math.nan,), gradient_norm=math.nan, seconds=0.5)
        for made in steps(backend)
    )
    seen = {
        f"step_{index}": probe(
            index,
            activation_abs_max=(*probe().activation_abs_max[:10], *(math.inf,) * (LAYERS - 10)),
            gradient_abs_max=(math.nan,) * LAYERS,
        )
        for index in (5, 6, 7)
    }
    values: dict[str, Any] = {
        "steps": broken,
        "trainable_weights_finite": False,
        "quantization": quantization(backend, requested_dtype="float16", effective_dtype="float16"),
        "first_failure": first_failure(),
        "replay": replay(),
        "ask": {"dtype": "float16"},
    }
    return probed(record(backend, **(values | changes)), **seen)


def margin_runs(backend: str, bits: int, tried: tuple[int, ...] = (0, 24, 12)) -> list[Record]:
    """The runs of a bisection in float16 that ends at so many ``bits``: 2**bits is finite, the next is not."""
    module = "model.layers.9.mlp.down_proj"
    failure = first_failure(step=0, module=module, evidence=f"the output of {module} held an infinity")
    broken = tuple(step(index, losses=(math.nan,), gradient_norm=math.nan) for index in range(2))
    made = []
    for exponent in sorted({*tried, bits, min(bits + 1, 24)}):
        values: dict[str, Any] = {
            "ask": {"dtype": "float16", "workload": Workload(sequence_length=512, steps=2, warmup_steps=1)},
            "quantization": quantization(backend, requested_dtype="float16", effective_dtype="float16"),
            "steps": steps(backend, count=2),
        }
        if exponent:
            values["ask"]["stress"] = {"model.layers.9.mlp.up_proj": 2.0**exponent}
        if exponent > bits:
            values |= {"steps": broken, "trainable_weights_finite": False, "first_failure": failure}
        made.append(record(backend, **values))
    return made


def triage(text: str | None = None) -> Triage:
    """A ladder whose third rung heals; ``text`` stands in every free string where it is given."""
    bad = Seen(
        key=text or "hqq-float16", outcome="completed", verdict=text or "non_finite", finite=False,
        reason=text or "the loss is NaN at step 0", steps=4, failing_step=0, failing_module=text or FAILING_MODULE,
    )  # fmt: skip
    good = Seen(
        key=text or "hqq-bfloat16", outcome="completed", verdict=text or "healthy", finite=True,
        reason=text or "all losses are finite", steps=4, first_loss=1.93, last_loss=1.71,
    )  # fmt: skip

    def rung(name: str, kind: Any, seen: Seen | None, *, heals: bool | None, note: str | None = None) -> Rung:
        return Rung(name=name, group=text or kind, kind=kind, change=text or name, settings={text or name: text},
                    evidence=seen, heals=heals, note=note and (text or note))  # fmt: skip

    rungs = (
        rung("eager attention", "setting", bad, heals=False),
        rung("no checkpointing", "setting", None, heals=None, note="not enough memory"),
        rung("bfloat16", "precision", good, heals=True),
    )
    settings = Configuration(
        target="python", title=text or "Transformers and PEFT", language="python",
        text=text or "bnb_4bit_compute_dtype=torch.bfloat16",
    )  # fmt: skip
    return Triage(
        command=text or "qlora-bench triage", backend=text or "hqq", model=text or "smollm2", weights="real",
        requested_dtype=text or "float16", base=bad, cause=text or "overflow in the forward", rungs=rungs,
        chosen="bfloat16", configurations=(settings,), ended_at=text or "2026-10-01T12:00:00Z",
        confirmations=tuple(
            Confirmation(rung=text or "bfloat16", seed=seed, unhealed=bad, healed=good) for seed in (0, 1, 2)
        ),
        conclusion=text or "the smallest change that heals it: bfloat16",
    )  # fmt: skip


LITERALS = {
    "status", "stage", "phase", "dtype", "weights", "attention", "checkpointing", "padding", "precision",
    "without_targets", "kind", "change", "placement",
}  # fmt: skip


def planted(text: str, **changes: Any) -> Record:
    """A record whose every free string, and every free key, holds ``text``."""
    found = {"first_failure": first_failure(), "replay": replay(), "fidelity": fidelity(note="")}
    pair = StressedPair(scaled="up", compensated="down", factor=2.0, float32_difference=1e-7)
    made = probed(record("hqq", **(found | {"stress": (pair,)} | changes)))
    body = json.loads(made.model_dump_json())
    literals = {name: body["request"][name] for name in ("device", "calibration")}
    body = _plant(body, text)
    body["request"] |= literals
    body["request"]["lora"]["target_modules"] = ["q_proj"]
    body["request"]["stress"] = {text: 2.0}
    body["environment"]["versions"][text] = text
    body["environment"]["changed_variables"][text] = text
    body["quantization"]["options"][text] = text
    body["workload"]["attention"] = text
    return Record.model_validate(body)


def _plant(value: Any, text: str, key: str = "") -> Any:
    if isinstance(value, dict):
        return {name: _plant(inner, text, name) for name, inner in value.items()}
    if isinstance(value, list):
        texts = key in {"notes", "breaches", "quantization_libraries_imported"}
        return [text] if texts else [_plant(inner, text, key) for inner in value]
    free = {"message", "stderr_tail", "note", "calibration", "commit", "allocator_settings", "data", "error"}
    number = value in ("NaN", "Infinity", "-Infinity")
    if isinstance(value, str) and key not in LITERALS and not number:
        return text
    return text if key in free else value
