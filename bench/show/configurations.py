"""A run as settings of the tools that people train with: transformers and PEFT, LLaMA-Factory, axolotl.

``configurations(request)`` fills the templates ``healed.*.jinja`` beside this file. Option names were read in
the sources of the tools: transformers and PEFT as installed here (a test holds every keyword against the
signatures), LLaMA-Factory and axolotl at the commits that their templates name. What a tool has no setting
for stands there as a comment, "No equivalent: ..."; a name is never made up.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from bench.ask.plan import RunRequest
from bench.record.triage import Configuration

CHECKED_TRANSFORMERS = "5.24"
"""Version in which HqqConfig was seen to raise NotImplementedError."""
KINDS: Mapping[str, str] = {
    "bnb-nf4": "4bit",
    "bnb-nf4-dq": "4bit",
    "bnb-int8": "int8",
    "hqq": "hqq",
    "gptq": "gptq",
    "awq": "awq",
    "eetq": "eetq",
    "bf16": "none",
}
"""Backend -> how the tools would be told; one that is not here is unknown to them."""
CONFIG_CLASSES: Mapping[str, str] = {
    "4bit": "BitsAndBytesConfig",
    "int8": "BitsAndBytesConfig",
    "gptq": "GPTQConfig",
    "eetq": "EetqConfig",
}


OPTIONS: Mapping[str, frozenset[str]] = {
    "4bit": frozenset(("quant_type", "double_quantization")),
    "int8": frozenset(("outlier_threshold",)),
    "hqq": frozenset(("bits", "group_size", "axis", "optimize")),
    "gptq": frozenset(("group_size",)),
    "awq": frozenset(("group_size",)),
}
"""How the tools would be told -> the backend's options that the settings name."""


def has_configurations(request: RunRequest) -> bool:
    """Whether the record holds every option that the settings name; an older one may not."""
    return OPTIONS.get(KINDS.get(request.backend, ""), frozenset()) <= set(request.options)


def configurations(request: RunRequest) -> tuple[Configuration, ...]:
    """The run as Python and as YAML, ready to paste but for the dataset, which is the reader's own."""
    values = _values(request)

    def filled(template: str) -> str:
        return _environment().from_string(_text(template)).render(values)

    return (
        Configuration(
            target="python",
            title="transformers and PEFT (Python)",
            language="python",
            text=filled("healed.py.jinja"),
        ),
        Configuration(
            target="llamafactory",
            title="LLaMA-Factory (YAML)",
            language="yaml",
            text=filled("healed.llamafactory.jinja"),
        ),
        Configuration(
            target="axolotl", title="axolotl (YAML)", language="yaml", text=filled("healed.axolotl.jinja")
        ),
    )


def _environment() -> Environment:
    # No HTML here: every value goes through the filter of its own language instead.
    environment = Environment(
        autoescape=False,  # noqa: S701
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"py": as_python, "yaml": as_yaml, "comment": in_one_line}
    return environment


def _text(template: str) -> str:
    return files("bench.show").joinpath(template).read_text("utf-8")


def _values(request: RunRequest) -> dict[str, Any]:
    """Everything that the templates name."""
    kind, alpha = KINDS.get(request.backend, "unknown"), request.lora.alpha
    attention, limit = request.attention, request.optimizer.max_gradient_norm
    return {
        "notes": [in_one_line(note) for note in _notes(request)],
        "imports": list(_imports(kind, published=request.calibration == "published")),
        "transformers": CHECKED_TRANSFORMERS,
        "kind": kind,
        "published": request.calibration == "published",
        "backend": request.backend,
        "model": request.model.name,
        "options": request.options,
        "dtype": request.dtype,
        "device": request.device,
        "attention": attention,
        "kernel": attention.removeprefix("sdpa_") if attention.startswith("sdpa_") else None,
        "checkpointing": request.checkpointing,
        "padding": request.workload.padding,
        "length": request.workload.sequence_length,
        "workload": request.workload,
        "lora": request.lora,
        # The tools want a whole number where it is one.
        "alpha": int(alpha) if alpha == int(alpha) else alpha,
        "optimizer": request.optimizer,
        # Trainer clips where the norm is above 0.
        "clipping": 0.0 if limit is None else limit,
        "seed": request.seed,
    }


def _notes(request: RunRequest) -> Iterator[str]:
    """What the reader must know of the run that this stands for."""
    yield f"Of the run on {request.backend}, in {request.dtype}, on {request.device}."
    if request.model.weights == "synthetic":
        yield "Its weights were synthetic, in this model's shape: try it on the real ones first."
    if request.model.layers is not None:
        yield f"Only the first {request.model.layers} decoder layers were kept."
    if request.stress:
        yield "The run rescaled layers on purpose (--stress), which is a test and has no setting here."
    if request.calibration in ("rtn", "calibrated"):
        yield f"Its {request.backend} checkpoint was made by qlora-bench ({request.calibration})."


def _imports(kind: str, *, published: bool) -> Iterator[str]:
    """Import lines, sorted as isort sorts them."""
    yield "import torch"
    if kind == "hqq":
        yield "from hqq.core.quantize import BaseQuantizeConfig"
        yield "from hqq.models.hf.base import AutoHQQHFModel"
    yield "from peft import LoraConfig, get_peft_model"
    names = ["AutoModelForCausalLM", "AutoTokenizer", "Trainer", "TrainingArguments"]
    if kind in CONFIG_CLASSES and not published:
        names.append(CONFIG_CLASSES[kind])
    yield f"from transformers import {', '.join(sorted(names))}"


def as_python(value: object) -> str:
    """A value of plain types as Python source, with the quotes that formatters prefer."""
    if isinstance(value, list):
        return f"[{', '.join(map(as_python, value))}]"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{as_python(key)}: {as_python(inner)}" for key, inner in value.items()) + "}"
    text = repr(value)
    return f'"{text[1:-1]}"' if text.startswith("'") and '"' not in text else text


def as_yaml(value: object) -> str:
    """One scalar as YAML 1.1 and 1.2 read it alike. Raises TypeError for anything but a plain scalar."""
    if value is None or isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, float):
        # PyYAML takes 1e-05 for a string: it wants a point before the exponent.
        mantissa, sign, exponent = repr(value).partition("e")
        return f"{mantissa}.0{sign}{exponent}" if sign and "." not in mantissa else repr(value)
    if isinstance(value, str):
        # A JSON string is a YAML string, but for characters that YAML wants escaped and JSON does not.
        text = json.dumps(value, ensure_ascii=False)
        return "".join(sign if sign.isprintable() else f"\\U{ord(sign):08X}" for sign in text)
    raise TypeError(f"no scalar: {value!r}")


def in_one_line(text: str) -> str:
    """Text that stays within the comment it stands in."""
    return " ".join("".join(sign if sign.isprintable() else " " for sign in text).split())
