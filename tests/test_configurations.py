"""The healed run as settings of other tools: every name exists there, every value is the run's."""

from __future__ import annotations

import ast
import inspect
import json
from typing import Any

import pytest
import yaml

from bench.ask.experiment import Lora, Optimizer, Workload
from bench.ask.plan import RunRequest
from bench.show.configurations import KINDS, as_python, as_yaml, configurations, in_one_line
from tests.record_factory import request

OPTIONS: dict[str, dict[str, Any]] = {
    "bnb-nf4": {"quant_type": "nf4", "double_quantization": False},
    "bnb-nf4-dq": {"quant_type": "nf4", "double_quantization": True},
    "bnb-int8": {"outlier_threshold": 6.0},
    "hqq": {"bits": 4, "group_size": 64, "axis": 1, "optimize": True},
    "gptq": {"group_size": 128, "kernel": "auto"},
    "awq": {"group_size": 128, "kernel": "auto"},
    "eetq": {"kernel": "auto"},
    "bf16": {},
    "stranger": {"what": 1},
}
# Read in the sources of LLaMA-Factory (src/llamafactory/hparams, commit ff6d4d12e) and of transformers'
# TrainingArguments, which its own extend.
LLAMAFACTORY = {
    "model_name_or_path", "quantization_method", "quantization_bit", "quantization_type", "double_quantization",
    "flash_attn", "disable_gradient_checkpointing", "use_reentrant_gc", "stage", "finetuning_type", "lora_rank",
    "lora_alpha", "lora_dropout", "lora_target", "cutoff_len", "packing",
}  # fmt: skip
# Read in axolotl's src/axolotl/utils/schemas, commit 067b021c8.
AXOLOTL = {
    "base_model", "adapter", "load_in_4bit", "load_in_8bit", "bnb_config_kwargs", "gptq", "attn_implementation",
    "gradient_checkpointing", "gradient_checkpointing_kwargs", "lora_r", "lora_alpha", "lora_dropout",
    "lora_target_modules", "peft_autocast_adapter_dtype", "sequence_len", "sample_packing", "micro_batch_size",
    "gradient_accumulation_steps", "optimizer", "learning_rate", "lr_scheduler", "adam_beta1", "adam_beta2",
    "adam_epsilon", "weight_decay", "max_grad_norm", "bf16", "fp16", "seed",
}  # fmt: skip


def of(backend: str, **changes: Any) -> RunRequest:
    return request(backend, **({"options": OPTIONS[backend]} | changes))


def texts(asked: RunRequest) -> dict[str, str]:
    return {found.target: found.text for found in configurations(asked)}


def variants() -> list[RunRequest]:
    """Every backend, and every setting at a value that is not the default."""
    return [
        *(of(backend) for backend in OPTIONS),
        of("bf16", dtype="float16", attention="eager", checkpointing="none"),
        of("bf16", dtype="float32", attention="sdpa_math", checkpointing="reentrant"),
        of("bf16", attention="sdpa_flash", lora=Lora(precision="float32", alpha=12.5, rank=3)),
        of("bf16", attention="sdpa_efficient", lora=Lora(precision="compute", target_modules=("q_proj",))),
        of("bf16", workload=Workload(padding="left"), optimizer=Optimizer(max_gradient_norm=None)),
        of(
            "hqq",
            options=OPTIONS["hqq"] | {"optimize": False},
            device="cpu",
            workload=Workload(padding="right"),
        ),
        of("bnb-int8", options={"outlier_threshold": 0.5}, stress={"model.layers.1.mlp.up_proj": 4.0}),
        of("gptq", calibration="published"),
        of("awq", calibration="published"),
        of("gptq", calibration="rtn"),
    ]


def ids(asked: RunRequest) -> str:
    return asked.key


# ---- Python --------------------------------------------------------------------------------------


def calls(tree: ast.AST) -> list[tuple[str, list[str]]]:
    """Name of each called thing and the names of its keyword arguments."""
    return [
        (ast.unparse(node.func), [keyword.arg for keyword in node.keywords if keyword.arg])
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


def signature_of(name: str) -> inspect.Signature | None:
    import peft
    import transformers

    if name.startswith("AutoHQQHFModel") or name == "BaseQuantizeConfig":
        from hqq.core.quantize import hqq_base_quant_config
        from hqq.models.hf.base import AutoHQQHFModel

        return inspect.signature(
            AutoHQQHFModel.quantize_model if name.endswith("quantize_model") else hqq_base_quant_config
        )
    found = getattr(transformers, name, None) or getattr(peft, name, None)
    return inspect.signature(found) if found is not None else None


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("asked", variants(), ids=ids)
def test_python_compiles_and_every_keyword_exists(asked: RunRequest) -> None:
    tree = ast.parse(texts(asked)["python"])
    compile(tree, "healed", "exec")
    held = set()
    for name, keywords in calls(tree):
        signature = signature_of(name) if "." not in name or name.startswith("AutoHQQ") else None
        if signature is None:
            continue
        held.add(name)
        for keyword in keywords:
            assert keyword in signature.parameters, f"{name} has no {keyword}"
    assert {"LoraConfig", "TrainingArguments", "get_peft_model", "Trainer"} <= held
    wanted = {"4bit": "BitsAndBytesConfig", "int8": "BitsAndBytesConfig", "eetq": "EetqConfig",
              "hqq": "AutoHQQHFModel.quantize_model"}.get(KINDS.get(asked.backend, ""))  # fmt: skip
    assert wanted is None or wanted in held


def test_the_check_of_keywords_can_fail() -> None:
    signature = signature_of("TrainingArguments")
    assert signature is not None
    assert "max_gradient_norm" not in signature.parameters


@pytest.mark.parametrize("asked", variants(), ids=ids)
def test_python_imports_what_it_uses(asked: RunRequest) -> None:
    tree = ast.parse(texts(asked)["python"])
    imported = {
        alias.name
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    stored = {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)
    }
    used = {
        node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load)
    }
    defined = {node.name for node in ast.walk(tree) if isinstance(node, ast.ClassDef)} | {
        "self",
        "x",
        "list",
        "str",
    }
    assert used <= imported | stored | defined
    assert imported <= used


def test_python_says_what_the_run_was() -> None:
    asked = of("bnb-nf4", dtype="float16", attention="sdpa_math", checkpointing="reentrant",
               optimizer=Optimizer(learning_rate=2e-5, max_gradient_norm=None))  # fmt: skip
    text = texts(asked)["python"]
    for line in ("dtype=torch.float16,", "bnb_4bit_compute_dtype=torch.float16,", "bnb_4bit_use_double_quant=False,",
                 "learning_rate=2e-05,", "max_grad_norm=0.0,", "fp16=True,", "bf16=False,",
                 "torch.backends.cuda.enable_math_sdp(True)", "torch.backends.cuda.enable_flash_sdp(False)",
                 'gradient_checkpointing_kwargs={"use_reentrant": True},'):  # fmt: skip
        assert line in text, line


def test_adapters_in_float32_are_float32() -> None:
    """The class that the text defines multiplies in float32 under autocast, and the plain one does not."""
    import torch

    text = texts(of("bf16", lora=Lora(precision="float32")))["python"]
    tree = ast.parse(text)
    (definition,) = [node for node in tree.body if isinstance(node, ast.ClassDef)]
    space: dict[str, Any] = {"torch": torch}
    exec(compile(ast.Module([definition], []), "healed", "exec"), space)
    with torch.autocast("cpu", torch.bfloat16):
        assert space["Float32Linear"](2, 2)(torch.ones(1, 2)).dtype == torch.float32
        assert torch.nn.Linear(2, 2)(torch.ones(1, 2)).dtype == torch.bfloat16


# ---- YAML ----------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("asked", variants(), ids=ids)
def test_llamafactory_names_exist(asked: RunRequest) -> None:
    from transformers import TrainingArguments

    body = yaml.safe_load(texts(asked)["llamafactory"])
    inherited = set(inspect.signature(TrainingArguments).parameters)
    assert set(body) <= LLAMAFACTORY | inherited, set(body) - LLAMAFACTORY - inherited


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("asked", variants(), ids=ids)
def test_axolotl_names_exist(asked: RunRequest) -> None:
    from transformers import BitsAndBytesConfig

    body = yaml.safe_load(texts(asked)["axolotl"])
    assert set(body) <= AXOLOTL, set(body) - AXOLOTL
    if asked.backend in ("bnb-nf4", "bnb-nf4-dq"):
        made = BitsAndBytesConfig(load_in_4bit=True, **body["bnb_config_kwargs"])
        assert made.bnb_4bit_use_double_quant is asked.options["double_quantization"]
        assert str(made.bnb_4bit_quant_storage) == "torch.uint8"


@pytest.mark.parametrize("target", ["llamafactory", "axolotl"])
@pytest.mark.parametrize("rate", [2e-4, 2e-5, 1e-8, 3.5e-07, 1.0])
def test_numbers_are_numbers_in_yaml(target: str, rate: float) -> None:
    body = yaml.safe_load(texts(of("bf16", optimizer=Optimizer(learning_rate=rate, epsilon=rate)))[target])
    assert body["learning_rate"] == rate
    assert body["adam_epsilon"] == rate


def test_yaml_says_what_the_run_was() -> None:
    asked = of("bnb-nf4-dq", dtype="float16", attention="eager", checkpointing="reentrant",
               lora=Lora(rank=4, alpha=8, target_modules=("q_proj", "up_proj")))  # fmt: skip
    factory, axolotl = (yaml.safe_load(texts(asked)[target]) for target in ("llamafactory", "axolotl"))
    assert (factory["quantization_bit"], factory["double_quantization"]) == (4, True)
    assert (factory["flash_attn"], factory["use_reentrant_gc"], factory["fp16"]) == ("disabled", True, True)
    assert (factory["lora_target"], factory["lora_alpha"]) == ("q_proj,up_proj", 8)
    assert (axolotl["adapter"], axolotl["load_in_4bit"], axolotl["bf16"]) == ("qlora", True, False)
    assert axolotl["gradient_checkpointing_kwargs"] == {"use_reentrant": True}
    assert axolotl["lora_target_modules"] == ["q_proj", "up_proj"]


@pytest.mark.parametrize(
    ("change", "targets"),
    [
        ({"attention": "sdpa_math"}, ("llamafactory", "axolotl")),
        ({"lora": Lora(precision="float32")}, ("llamafactory", "axolotl")),
        ({"workload": Workload(padding="left")}, ("llamafactory", "axolotl")),
    ],
)
def test_what_has_no_equivalent_is_said(change: dict[str, Any], targets: tuple[str, ...]) -> None:
    plain, without = texts(of("bf16")), texts(of("bf16", **change))
    for target in targets:
        assert "No equivalent" not in plain[target]
        assert "No equivalent" in without[target]


def test_axolotl_never_seems_to_quantize_with_what_it_does_not_know() -> None:
    for backend in ("hqq", "eetq", "stranger"):
        text = texts(of(backend))["axolotl"]
        assert "No equivalent" in text
        assert "load_in" not in text


# ---- what a person may have typed ----------------------------------------------------------------

NASTY = [
    'a"b', "it's", "a: b # c", "x\ny: 1", "tab\there", "\u2028line", "{{ 7 * 7 }}", "\U0001f600", "\x7f", "\\n", "~",
    "2e-4", "null", "",
]  # fmt: skip


@pytest.mark.parametrize("name", NASTY, ids=repr)
def test_a_model_name_comes_back_as_it_was(name: str) -> None:
    asked = of("bf16")
    asked = asked.model_copy(update={"model": asked.model.model_copy(update={"name": name})})
    found = texts(asked)
    assert yaml.safe_load(found["llamafactory"])["model_name_or_path"] == name
    assert yaml.safe_load(found["axolotl"])["base_model"] == name
    (assigned,) = [
        node.value
        for node in ast.parse(found["python"]).body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "name"
    ]
    assert ast.literal_eval(assigned) == name


def test_a_backend_name_stays_in_its_comment() -> None:
    asked = of("bf16").model_copy(update={"backend": "evil\nlearning_rate: 5", "options": {}})
    for target in ("llamafactory", "axolotl"):
        assert yaml.safe_load(texts(asked)[target])["learning_rate"] == asked.optimizer.learning_rate
    compile(texts(asked)["python"], "healed", "exec")
    assert in_one_line("a\n b\u2028c") == "a b c"


def test_scalars() -> None:
    assert [as_yaml(value) for value in (True, None, 3, 1e-05, 1.5, 1e16)] == [
        "true", "null", "3", "1.0e-05", "1.5", "1.0e+16"]  # fmt: skip
    with pytest.raises(TypeError):
        as_yaml([1])
    for value in (True, None, 1.5, ["a", 'b"', "c'", "d'\""], {"e": 1}, "\u2028"):
        assert ast.literal_eval(as_python(value)) == value
    assert as_python(["a"]) == '["a"]'


def test_synthetic_weights_and_the_dial_are_said() -> None:
    asked = of("bf16", weights="synthetic", stress={"model.layers.1.mlp.up_proj": 4.0})
    for text in texts(asked).values():
        assert "synthetic" in text
        assert "--stress" in text
    for text in texts(of("bf16")).values():
        assert "synthetic" not in text
        assert "--stress" not in text


def test_they_can_be_recorded() -> None:
    for found in configurations(of("hqq")):
        assert json.loads(found.model_dump_json())["text"].endswith("\n")
