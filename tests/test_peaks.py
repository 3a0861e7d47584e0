"""The planned peaks against the tensors that really live while the training loop runs, byte by byte."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.ask.experiment import Lora
from bench.ask.shapes import decoder_of
from bench.load.activations import Work
from bench.load.footprint import Plan
from bench.load.registry import get_backend
from bench.load.sized import SizedModel, layer_shapes
from tests.live_bytes import ARCHITECTURE, DEFAULTS

ROOT = Path(__file__).resolve().parents[1]
LONG, WIDE = {"length": 384}, {"architecture": {"vocab_size": 6000, "num_hidden_layers": 2}}
CLOSE = [
    {"backend": "bf16"},
    {"backend": "bf16", **LONG},
    {"backend": "bf16", **LONG, **WIDE},
    {"backend": "bf16", "rows": 2, "accumulation": 2, "rank": 64},
    {"backend": "bf16", **LONG, "checkpointing": "none"},
    {"backend": "bf16", **LONG, "checkpointing": "reentrant"},
    {"backend": "bf16", **LONG, "padding": "right"},
    {"backend": "bf16", **LONG, "attention": "eager"},
    {"backend": "bf16", **LONG, "precision": "compute"},
    {"backend": "bf16", **LONG, "dtype": "float32"},
    {"backend": "eetq", "length": 64},
    {"backend": "eetq", **LONG},
    {"backend": "hqq", "options": {"optimize": False}, "length": 64},
    {"backend": "hqq", "options": {"optimize": False}, **LONG},
    {"backend": "gptq", "options": {"kernel": "gptq_torch"}, "length": 64},
    {"backend": "gptq", "options": {"kernel": "gptq_torch"}, **LONG, "checkpointing": "none"},
]
ABOVE = [
    {"backend": "bf16", **LONG, "attention": "sdpa_math"},
    {"backend": "bf16", **LONG, "precision": "float32"},
    {"backend": "hqq", "options": {"optimize": False}, **LONG, "precision": "float32"},
]
"""Cases that the arithmetic is on the safe side of."""
QUICK = [*CLOSE[:5], CLOSE[11], CLOSE[13], CLOSE[14], ABOVE[0]]
"""One of each kind; `make soak` has them all."""
PHASES = ("forward", "backward", "optimizer_step")


def measured(cases):
    """Peaks of these cases, from one process."""
    pytest.importorskip("hqq")
    pytest.importorskip("optimum")
    done = subprocess.run(
        [sys.executable, "-m", "tests.live_bytes", json.dumps(cases)],
        cwd=ROOT, capture_output=True, text=True, timeout=500, check=False, env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.strip().splitlines()[-1])


def planned(case):
    """The same case by arithmetic: what each phase holds, and what of it lies there before it begins."""
    case = DEFAULTS | case
    entry = get_backend(case["backend"])
    backend = entry.backend(entry.options(case["options"]), "cpu", case["dtype"])
    decoder = decoder_of(ARCHITECTURE | case["architecture"])
    backend.fit(list(layer_shapes(decoder).values()))
    model = SizedModel.of(decoder, backend)
    work = Work(
        rows=case["rows"],
        length=case["length"],
        width=model.width,
        attention=case["attention"],
        masked=case["padding"] != "packed",
        lora=Lora(rank=case["rank"], precision=case["precision"]),
        casts_input=backend.adapter_casts_input,
        checkpointed=case["checkpointing"] != "none",
        accumulated=case["accumulation"] > 1,
    )
    (card,) = Plan(model, work).single().cards
    resting = ("quantized_weights", "unquantized_weights", "lora", "optimizer_state")
    return {
        phase.phase: (phase.total_bytes, sum(phase.terms[name] for name in resting))
        for phase in card.phases[1:]
    }


def moving_error(case, peaks, phase):
    """Relative error of what a step adds to weights, adapters and optimizer: the hard part of a peak."""
    total, resting = planned(case)[phase]
    return (total - resting) / (peaks[phase] - resting) - 1


@pytest.mark.parametrize(
    "cases", [QUICK, pytest.param([*CLOSE, *ABOVE], marks=pytest.mark.soak)], ids=["quick", "all"]
)
def test_planned_peaks_are_those_of_the_real_loop(cases):
    """One test, since all cases come from one process."""
    peaks = measured(cases)
    missed = []
    for place, case in enumerate(cases):
        for phase in PHASES:
            error = moving_error(case, peaks[place], phase)
            # With the weights in it, as an allocator tells it.
            whole = planned(case)[phase][0] / peaks[place][phase] - 1
            allowed = abs(error) < 0.04 and abs(whole) < 0.03 if case in CLOSE else -0.02 < error < 0.15
            if not allowed:
                missed.append((case, phase, f"{error:+.1%}", f"{whole:+.1%}"))
    assert not missed
    assert len(peaks) == len(cases)


# Llama-2-70B and Mistral-7B, LoRA of rank 16 on the attention's projections, rows of 4096 tokens, on one A100, by
# torch's allocator: foundation-model-stack/fms-acceleration, scripts/benchmarks/refs/a100_80gb.csv at 04702cc (rows 12,
# 14, 36, 38, 44). Another loop (transformers' Trainer), the same layers and loss. Columns: backend, rows, peak bytes,
# bytes with model, adapters and optimizer at rest.
PUBLISHED = [
    ("mistral", "bf16", 4, 26_108_963_328, 15_119_590_912),
    ("mistral", "bf16", 8, 37_098_695_168, 15_119_984_128),
    ("mistral", "bnb-nf4-dq", 4, 15_860_019_712, 4_843_384_320),
    ("mistral", "bnb-nf4-dq", 8, 26_849_751_552, 4_843_777_536),
    ("llama", "bnb-nf4-dq", 4, 68_159_977_472, 37_346_815_488),
]
SHAPES = {
    "mistral": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
    },
    "llama": {
        "hidden_size": 8192,
        "intermediate_size": 28672,
        "num_hidden_layers": 80,
        "num_attention_heads": 64,
    },
}


@pytest.mark.parametrize(("kind", "backend_id", "rows", "peak", "rest"), PUBLISHED)
def test_peaks_published_of_a_card_are_met(kind, backend_id, rows, peak, rest):
    decoder = decoder_of(SHAPES[kind] | {"model_type": kind, "num_key_value_heads": 8, "vocab_size": 32000})
    entry = get_backend(backend_id)
    model = SizedModel.of(decoder, entry.backend(entry.defaults, "cuda", "float16"))
    lora = Lora(rank=16, target_modules=("q_proj", "k_proj", "v_proj", "o_proj"))
    work = Work(rows, 4096, model.width, "sdpa_flash", masked=False, lora=lora, casts_input=True)
    (card,) = Plan(model, work).single().cards
    tensors = card.peak.total_bytes - card.peak.terms["allowance"]
    resting = sum(
        card.peak.terms[n] for n in ("quantized_weights", "unquantized_weights", "lora", "optimizer_state")
    )
    assert tensors == pytest.approx(peak, rel=0.05)
    assert tensors - resting == pytest.approx(peak - rest, rel=0.02)
