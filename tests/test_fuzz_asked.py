"""Bad input in what is asked for: presets, flags of every command, settings, stress, backends, training text,
checkpoints. None ends in a traceback; each refusal is one line that names the thing, with exit code 2."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path
from typing import Any

import click
from hypothesis import strategies as st

from bench import cli
from bench.ask.experiment import SETTABLE
from bench.ask.preset import load_preset
from bench.errors import one_line, printable
from tests.forecast_factory import SIX
from tests.front import Front
from tests.fuzzing import budgets, fuzzed
from tests.mutation import NUMBERS, ODD, TEXTS, Raw, damaged, mutants, spelt, spelt_toml
from tests.shards import write_safetensors

QUICK, SOAK = budgets(presets=(150, 2500), flags=(400, 4000), settings=(250, 2000), stress=(150, 800), backends=(80, 400),
                      data=(250, 1500), checkpoints=(200, 2000))  # fmt: skip

# ---- presets --------------------------------------------------------------------------------------

WHOLE = tomllib.loads(SIX) | {
    "calibration": "random", "needs_cuda_gib": 3.5, "published": {"awq": "someone/six-awq", "gptq": "someone/six-gptq"},
    "synthetic_options": {"hqq": {"optimize": False, "group_size": 32}}, "options": {"hqq": {"group_size": 64}},
    "dtype": "float16", "attention": "eager", "checkpointing": "none", "weights": "synthetic", "layers": 4, "seed": 3, "repeats": 2,
    "workload": {"sequence_length": 64, "micro_batch_size": 2, "steps": 6, "warmup_steps": 1, "padding": "left"},
    "lora": {"rank": 4, "alpha": 8.0, "target_modules": ["q_proj", "up_proj"], "precision": "float32"},
    "optimizer": {"learning_rate": 1e-4, "max_gradient_norm": 0.5}, "timeout_seconds": 60.0, "cpu_threads": 1, "fidelity": "off",
    "backends": ["hqq"], "first_repeat": 1, "trace": True, "cache": False, "placement": "single", "device": "cpu",
    "stress": {"model.layers.0.mlp.up_proj": 4.0},
}  # fmt: skip
ASKING = st.sampled_from((
    ("run", "--dry-run", "--backend", "hqq"), ("run", "--dry-run", "--backend", "hqq,awq", "--json"), ("plan", "--cards", "24GB", "--backend", "hqq"),
    ("plan", "--cards", "2x24GB", "--backend", "bf16,awq", "--json"), ("forecast", "--backend", "hqq", "--cards", "24GB"), ("margin", "--backend", "hqq"),
    ("triage", "--backend", "hqq"), ("run", "--backend", "hqq", "--quiet"),
))  # fmt: skip


@fuzzed("presets", QUICK, SOAK)
def test_presets(front: Front, data: st.DataObject) -> None:
    document = data.draw(st.sampled_from([WHOLE, tomllib.loads(SIX)]))
    text = spelt_toml(data.draw(mutants(document)))
    Path("mine.toml").write_bytes(data.draw(damaged(text)))
    front.holds([*data.draw(ASKING), "--preset", "mine.toml"], "mine.toml", *_keys(document))


def _keys(document: Any) -> list[str]:
    """Names of everything in a document, of which a refusal must have one."""
    if not isinstance(document, dict):
        return []
    return [str(name) for key, inner in document.items() for name in (key, *_keys(inner))]


# ---- flags ----------------------------------------------------------------------------------------

VALID: dict[str, tuple[str, ...]] = {
    "preset": ("tiny", "auto", "proxy", "qwen2-72b"), "backends": ("hqq", "all", "bf16,awq"), "dtype": ("float16",), "dtypes": ("float16",),
    "device": ("cpu", "auto"), "placement": ("split", "single"), "device_count": ("2",), "weights": ("synthetic", "auto"), "layers": ("1",),
    "steps": ("3",), "repeats": ("2",), "seed": ("7",), "calibration": ("rtn",), "timeout_seconds": ("60",), "settings": ("lora.rank=4",),
    "stress": ("model.layers.0.mlp.up_proj=2",), "out": ("records",), "cards": ("24GB",), "slices": ("1,2",), "rounds": ("3",), "warmup_rounds": ("1",),
    "pairs": ("1,2",), "module": ("model.layers.0.mlp.up_proj",), "max_bits": ("4",), "only": ("attention",), "logging_steps": ("10",),
    "accumulation": ("2",), "finite_loss": ("2.3",), "file": ("state.json",), "folder": ("records",), "name": ("hqq",),
}  # fmt: skip
SPELT = (*TEXTS[:-7], "x" * 3000, *(str(number) for number in NUMBERS), *(spelt(odd) if not isinstance(odd, Raw) else odd.text[:9000] for odd in ODD),
         "a,b", ",", "--", "-", "=", "a=b", "1,2,3", "0x24GB", "1e3", "٣", "1_000", "tiny.toml", "~", "./", "hqq,hqq", "proxy ", "TINY", "bnb-n4")  # fmt: skip
COMMANDS = dict(cli.cli.commands)
NEVER = {"help"}


@fuzzed("flags", QUICK, SOAK)
def test_flags_of_every_command(front: Front, data: st.DataObject) -> None:
    name = data.draw(st.sampled_from(sorted(COMMANDS)))
    command = COMMANDS[name]
    options = [p for p in command.params if isinstance(p, click.Option) and p.name not in NEVER]
    chosen = data.draw(st.lists(st.sampled_from(options), min_size=1, max_size=4, unique_by=id)) if options else []
    arguments: list[str] = []
    named: list[str] = [name]
    for option in chosen:
        value = data.draw(_value(option))
        flag = max(option.opts, key=len)
        arguments += [flag] if option.is_flag else [flag, value]
        named += [flag, flag.lstrip("-").replace("-", "_"), *_parts(value)]
    for argument in (p for p in command.params if isinstance(p, click.Argument)):
        value = data.draw(_value(argument))
        arguments.insert(data.draw(st.integers(0, len(arguments))), value) if not chosen else arguments.append(value)
        named += [argument.human_readable_name, "folder", "file", "backend", "No such option", *_parts(value)]
    if "preset" not in {option.name for option in chosen} and name not in ("backends", "check", "diagnose", "report", "runs", "schema", "compare", "watch"):
        arguments += ["--preset", "tiny"]
    if name == "run" and data.draw(st.booleans()):
        arguments.append("--dry-run")
    front.holds([name, *arguments], *named, "got", "unexpected", "model", "steps")


def _parts(value: str) -> list[str]:
    words = printable(value).split()
    if words and words[0] != "./":
        return [words[0][:20].removeprefix("./")]
    return ["'.'", one_line(f"'{value}'")]  # of blanks alone, too


def _value(parameter: click.Parameter) -> st.SearchStrategy[str]:
    valid = VALID.get(str(parameter.name), ("x",))
    return st.one_of(st.sampled_from(valid), st.sampled_from(SPELT), st.sampled_from(SPELT), st.text(max_size=12)).map(_as_argument)


def _as_argument(value: str) -> str:
    """As a system hands an argument over: no NUL ends up in one, and bytes that are no text become low halves
    of surrogate pairs."""
    return value.replace("\0", "").replace("\ud800", "\udcff")


@fuzzed("settings", QUICK, SOAK)
def test_settings(front: Front, data: st.DataObject) -> None:
    known = [*SETTABLE, "hqq.group_size", "hqq.optimize", "awq.kernel", "gptq.group_size", "bnb-nf4.double", "hqq.", ".", "lora", "options", "preset"]
    arguments: list[str] = []
    keys: list[str] = []
    for _ in range(data.draw(st.integers(1, 3))):
        key = data.draw(st.sampled_from(known))
        value = data.draw(st.one_of(st.sampled_from(("1", "8", "0.5", "none", "eager", "true", "float32")), st.sampled_from(SPELT), st.text(max_size=8)))
        mangled = data.draw(st.sampled_from((key, key, key, key, key.upper(), f" {key} ", f"{key}.x", key[1:], f"{key}=")))
        arguments += ["--set", f"{mangled}={value}"]
        # Of a backend's option, what stands behind the backend's name; it may begin with a point itself.
        option = mangled.strip(" =").partition(".")[2] or "--set"
        shown = printable(value.strip().strip('"').strip()[:20])
        keys += [*filter(None, [shown]), mangled.strip(" ="), option, key.rpartition(".")[2] or "--set", key.replace("_", "-")]
        # Named as what it is, with its path as TOML spells it.
        keys += ["training text"] if key == "workload.data" else []
    start = data.draw(st.sampled_from((("run", "--dry-run"), ("run", "--dry-run", "--json"), ("plan", "--cards", "24GB"), ("margin",))))
    front.holds([*start, "--preset", "tiny", "--backend", "hqq", *arguments], "--set", *keys)


@fuzzed("stress", QUICK, SOAK)
def test_stress(front: Front, data: st.DataObject) -> None:
    names = ("model.layers.0.mlp.up_proj", "model.layers.*.mlp.up_proj", "*", "model.layers.1.self_attn.v_proj", "[", "[!a]*", "*gate*", "lm_head", "")
    factors = (*SPELT, "2", "16384", "1e-300", "nan", "inf", "-1", "1e400", "٢")
    arguments: list[str] = []
    for _ in range(data.draw(st.integers(1, 3))):
        name = data.draw(st.one_of(st.sampled_from(names), st.sampled_from(names), st.sampled_from(TEXTS), st.text(max_size=6)))
        arguments += ["--stress", data.draw(st.sampled_from((f"{name}={{}}", f"{name}={{}}", f"{name}={{}}", "{}", f"{name}", f"{name}=={{}}"))).replace("{}", data.draw(st.one_of(st.just("2"), st.sampled_from(factors))))]
    front.holds(["run", "--preset", "tiny", "--backend", "hqq", "--dry-run", *arguments], "--stress", "stress")


@fuzzed("backends", QUICK, SOAK)
def test_backends(front: Front, data: st.DataObject) -> None:
    known = ("hqq", "all", "bf16", "bnb-nf4", "HQQ", "bnb-nf", "hqq ", ",", "*")
    parts = data.draw(st.lists(st.one_of(st.sampled_from(known), st.sampled_from(SPELT), st.text(max_size=6)), min_size=1, max_size=4))
    text = ",".join(parts)
    command = data.draw(st.sampled_from(("run", "plan", "check", "triage")))
    if command == "check":
        front.holds(["check", "--", text], "backend")
        return
    start = {"run": ("run", "--dry-run"), "plan": ("plan", "--cards", "24GB"), "triage": ("triage",)}[command]
    front.holds([*start, "--preset", "tiny", "--backend", text], "backend")


# ---- training text ---------------------------------------------------------------------------------

TALKS = (
    {"prompt": "two and two?", "response": "four"},
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}]},
    {"prompt": "again", "response": "no", "id": 7},
)  # fmt: skip


@fuzzed("data", QUICK, SOAK)
def test_training_text(front: Front, data: st.DataObject) -> None:
    lines = [spelt(talk) for talk in TALKS]
    place = data.draw(st.integers(0, len(lines) - 1))
    lines[place] = spelt(data.draw(st.one_of(mutants(TALKS[place]), st.sampled_from(ODD).map(lambda odd: odd))))
    Path("text.jsonl").write_bytes(data.draw(damaged(data.draw(st.sampled_from(("\n", "\r\n", "\n\n", "\x1e", "\r"))).join(lines))))
    front.holds(["run", "--preset", "tiny", "--backend", "hqq", "--dry-run", "--data", "text.jsonl"], "text.jsonl")


# ---- checkpoints -----------------------------------------------------------------------------------

CONFIG = dict(load_preset("tiny").architecture or {}) | {"layer_types": ["full_attention", "full_attention"], "head_dim": 32, "attention_bias": False}
PACKED = CONFIG | {"quantization_config": {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True, "version": "gemm"}}
SHARDS = {"a.safetensors": {"model.norm.weight": [4]}, "b.safetensors": {"lm_head.weight": [2, 4], "model.embed_tokens.weight": [2, 4]}}
INDEX = {"metadata": {"total_size": 80}, "weight_map": {name: file for file, tensors in SHARDS.items() for name in tensors}}


@fuzzed("checkpoints", QUICK, SOAK)
def test_checkpoints(front: Front, data: st.DataObject) -> None:
    folder = Path("model")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    for file, tensors in SHARDS.items():
        write_safetensors(folder / file, tensors)
    config, index = data.draw(st.sampled_from((CONFIG, PACKED))), INDEX
    broken = data.draw(st.sampled_from(("config.json", "config.json", "model.safetensors.index.json", "a.safetensors")))
    if broken == "config.json":
        config = data.draw(mutants(config))
    if broken == "model.safetensors.index.json":
        index = data.draw(mutants(index))
    (folder / "config.json").write_bytes(data.draw(damaged(spelt(config))) if broken == "config.json" else spelt(config).encode())
    text = spelt(index)
    (folder / "model.safetensors.index.json").write_bytes(data.draw(damaged(text)) if broken.endswith("index.json") else text.encode())
    if broken == "a.safetensors":
        header = {"__metadata__": {"format": "pt"}, "model.norm.weight": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}
        body = data.draw(damaged(spelt(data.draw(mutants(header)))))
        length = data.draw(st.sampled_from((len(body), 0, 1, 2**63, len(body) + 1, 2**64 - 1, 10**7)))
        (folder / "a.safetensors").write_bytes(length.to_bytes(8, "little") + body + bytes(16))
    start = data.draw(st.sampled_from((("run", "--dry-run"), ("run", "--dry-run", "--layers", "1"), ("plan", "--cards", "24GB"),
                                       ("run", "--dry-run", "--weights", "synthetic"), ("margin",), ("forecast", "--slices", "1,2", "--cards", "24GB"))))  # fmt: skip
    backend = data.draw(st.sampled_from(("hqq", "awq", "bf16")))
    front.holds([*start, "--preset", "tiny", "--model", "model", "--backend", backend], "model", "layer")
