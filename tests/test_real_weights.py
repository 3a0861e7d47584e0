"""Real weights in the layout of Qwen's published checkpoints: found, loaded to the bit, trained, compared."""

from __future__ import annotations

import hashlib
import json
import shlex
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from backends import awq
from bench.ask.models import fingerprint_folder, read_config
from bench.ask.shards import INDEX_NAME, weight_files
from bench.errors import BrokenFile
from bench.load.layout import Layout
from bench.load.model import build_model, skeleton
from bench.load.registry import get_backend
from bench.load.weights import CheckpointWeights
from tests import published
from tests.command import ROOT, Command
from tests.published import AWQ, DENSE, GPTQ, INTERMEDIATE, PADDED, Made

PRESET = f"""
description = "the shape of the published checkpoints, tiny"
model = "{DENSE}"
calibration = "random"

[published]
awq = "{AWQ}"
gptq = "{GPTQ}"

[architecture]
model_type = "qwen2"
hidden_size = {published.HIDDEN}
intermediate_size = {INTERMEDIATE}
num_hidden_layers = {published.LAYERS}
num_attention_heads = {published.HEADS}
num_key_value_heads = {published.KEY_VALUE_HEADS}
vocab_size = {published.VOCABULARY}
max_position_embeddings = 512
tie_word_embeddings = false

[workload]
sequence_length = 32
steps = 2
warmup_steps = 1
"""

LOAD = """
import sys
from pathlib import Path

import torch

from bench.run.arrange import arrange
from bench.run.asked import Asked
from bench.run.building import Builder
from bench.run.events import Channel
from bench.run.isolation import WatchedVariables


class Silent(Channel):
    def __init__(self): pass
    def send(self, event, **content): pass


preset, out, dtype, *backends = sys.argv[1:]
torch.set_num_threads(1)
sweep = arrange(Asked(preset=preset, backends=tuple(backends), dtype=dtype)).sweep
for request in sweep.requests:
    _, built, shapes = Builder(sweep.order(request), Silent(), WatchedVariables()).build(request)
    found = {}
    for name, layer in built.quantized():
        if layer.bias is not None:
            found[f"{name}.bias"] = layer.bias.detach().clone()
            layer.bias = None
        identity = torch.eye(shapes[name].in_features, dtype=getattr(torch, dtype), requires_grad=True)
        found[name] = layer(identity).detach().t().clone()
    layers = tuple(f"{name}." for name in built.layers)
    found |= {n: p.detach() for n, p in built.model.named_parameters() if not n.startswith(layers)}
    torch.save(found, Path(out) / f"{request.backend}-{dtype}.pt")
"""


@dataclass(frozen=True)
class Place:
    """A machine that has the model in its Hub cache: dense, and published packed."""

    command: Command
    preset: Path
    made: dict[str, Made]

    def again(self, line: str) -> dict[str, Any]:
        """The one run that a recorded command line plans."""
        program, *arguments = shlex.split(line)
        assert program == "qlora-bench"
        (planned,) = self.command.json(*arguments, "--dry-run")
        return dict(planned)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("published")
    made = {
        DENSE: published.make_dense(root / "dense"),
        AWQ: published.make_packed(root / "awq", "awq"),
        GPTQ: published.make_packed(root / "gptq", "gptq"),
    }
    command = Command(root / "cache")
    for name, one in made.items():
        published.into_hub_cache(one.folder, command.cache / "hub" / "hub", name)
    preset = root / "mine.toml"
    preset.write_text(PRESET, encoding="utf-8")
    return Place(command, preset, made)


@pytest.fixture(scope="module")
def records(place: Place, tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What ``run`` records for the reference and both packed backends, by backend."""
    out = tmp_path_factory.mktemp("records")
    bodies = place.command.json("run", "--preset", place.preset, "--backend", "bf16,awq,gptq", "--out", out,
                                "--set", "cpu_threads=1", "--set", "fidelity=off")  # fmt: skip
    assert [body["message"] for body in bodies if body["status"] != "completed"] == []
    return {body["request"]["backend"]: body for body in bodies} | {"folder": {"out": out}}


# ---- from the command to the record --------------------------------------------------------------


def test_each_backend_reads_the_checkpoint_that_is_published_for_it(place, records):
    asked = {name: records[name]["request"] for name in ("bf16", "awq", "gptq")}
    assert [r["model"]["name"] for r in asked.values()] == [DENSE, AWQ, GPTQ]
    assert {r["model"]["weights"] for r in asked.values()} == {"real"}
    assert [r["model"]["architecture"]["intermediate_size"] for r in asked.values()] == [384, 512, 512]
    assert [r["calibration"] for r in asked.values()] == [None, "published", "published"]
    wanted = [fingerprint_folder(place.made[name].folder) for name in (DENSE, AWQ, GPTQ)]
    assert [r["model"]["fingerprint"] for r in asked.values()] == wanted


@pytest.mark.parametrize(("backend", "model"), [("bf16", DENSE), ("awq", AWQ), ("gptq", GPTQ)])
def test_what_is_not_quantized_has_the_digest_of_the_written_values(place, records, backend, model):
    made, digest = place.made[model], hashlib.sha256()
    skipped = (*(f"{name}." for name in published.linear_names()), "model.layers.0.self_attn.rotary")
    names = ["model.embed_tokens.weight"]
    for layer in range(published.LAYERS):
        prefix = f"model.layers.{layer}"
        names += [f"{prefix}.input_layernorm.weight", f"{prefix}.post_attention_layernorm.weight"]
    names += ["model.norm.weight", "lm_head.weight"]
    assert set(names) == {name for name in made.tensors if not name.startswith(skipped)}
    for name in names:
        digest.update(name.encode())
        digest.update(made.tensors[name].bfloat16().view(torch.uint8).numpy().tobytes())
    assert records[backend]["load"]["weights_digest"] == digest.hexdigest()


@pytest.mark.parametrize("backend", ["awq", "gptq"])
def test_the_record_says_published_and_the_group_of_the_file(records, backend):
    quantization = records[backend]["quantization"]
    assert quantization["calibration"] == "published"
    assert quantization["options"]["group_size"] == published.GROUP
    assert quantization["notes"] == ([awq.IN_PIECES] if backend == "awq" else [])
    assert quantization["layers"] == 7 * published.LAYERS
    assert records[backend]["load"]["prepare_seconds"] is None


@pytest.mark.parametrize("backend", ["awq", "gptq"])
def test_the_padded_model_is_the_same_function_but_for_its_rounding(records, backend):
    first, reference = (records[name]["steps"][0]["losses"][0] for name in (backend, "bf16"))
    assert records[backend]["workload"]["digest"] == records["bf16"]["workload"]["digest"]
    assert first != reference
    assert first == pytest.approx(reference, rel=0.02)


def test_adapters_of_padded_layers_have_other_shapes_and_the_comparison_says_so(records):
    lora = {name: records[name]["lora"] for name in ("bf16", "awq", "gptq")}
    assert lora["awq"]["shapes_digest"] == lora["gptq"]["shapes_digest"] != lora["bf16"]["shapes_digest"]
    rank = records["bf16"]["request"]["lora"]["rank"]
    wider = 3 * published.LAYERS * rank * (PADDED - INTERMEDIATE)
    assert lora["awq"]["parameters"] - lora["bf16"]["parameters"] == wider
    page = (records["folder"]["out"] / "report.md").read_text()
    assert (
        f"awq, gptq: MLP layers and their adapters are {PADDED} channels wide instead of {INTERMEDIATE} (bf16)"
    ) in page
    assert "Group 2 of 2: apart by" in page or "Group 2 of 3: apart by" in page
    for condition in ("model fingerprint", "LoRA shapes (digest)", "initial LoRA values (digest)"):
        assert condition in page
    assert "--calibration rtn" in page


@pytest.mark.parametrize("backend", ["bf16", "awq", "gptq"])
def test_the_recorded_command_plans_the_same_run(place, records, backend):
    planned = place.again(records[backend]["command"])
    assert planned["model"] == records[backend]["request"]["model"]
    assert planned["calibration"] == records[backend]["request"]["calibration"]


# ---- to the bit ----------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=["float32", "bfloat16"])
def loaded(request: pytest.FixtureRequest, place: Place, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Everything that the builder loaded in a dtype, by backend and name; a layer's weight as what it
    multiplies by."""
    out = tmp_path_factory.mktemp("loaded")
    backends = ("bf16", "awq", "gptq")
    command = [sys.executable, "-c", LOAD, str(place.preset), str(out), request.param, *backends]
    environment = {**place.command.environment, "HF_HUB_OFFLINE": "1", "GPTQMODEL_CPU_WORKERS": "2"}
    done = subprocess.run(
        command, env=environment, cwd=ROOT, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return getattr(torch, request.param), {n: torch.load(out / f"{n}-{request.param}.pt") for n in backends}


@pytest.mark.parametrize(("backend", "model"), [("bf16", DENSE), ("awq", AWQ), ("gptq", GPTQ)])
def test_everything_is_loaded_to_the_bit(place, loaded, backend, model):
    dtype, found = loaded
    made, got = place.made[model], found[backend]
    wanted = {name: weight.to(dtype) for name, weight in made.weights.items()}
    for name, tensor in made.tensors.items():
        owner, _, kind = name.rpartition(".")
        packed = owner in made.weights and (kind != "bias" or not owner.endswith(published.BIASED))
        if not packed and "rotary" not in name:
            wanted[name] = tensor.to(dtype)
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert got[name].dtype == dtype
        assert torch.equal(got[name], tensor), name


# ---- what is refused, and how it is said ---------------------------------------------------------


def copied(made: Made, folder: Path) -> Path:
    """The checkpoint again, to be spoilt: its shards are links until they are replaced."""
    folder.mkdir()
    for file in made.folder.iterdir():
        (folder / file.name).hardlink_to(file)
    return folder


def rewritten(folder: Path, name: str, change: Any) -> Path:
    """The shard that holds the tensor ``name``, with what ``change`` makes of its tensors."""
    shard = weight_files(folder)[name]
    tensors = load_file(shard)
    shard.unlink()
    save_file(change(tensors), shard, metadata={"format": "pt"})
    return shard


def dry_run(place: Place, *flags: str | Path) -> str:
    done = place.command.run("run", "--preset", place.preset, *flags, "--dry-run")
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_a_bias_that_would_be_lost_ends_the_load(place, tmp_path):
    folder = copied(place.made[GPTQ], tmp_path / "m")
    name = "model.layers.1.mlp.down_proj.bias"
    rewritten(folder, name, lambda tensors: {**tensors, name: tensors[name] + 0.5})
    (body,) = place.command.json("run", "--preset", place.preset, "--model", folder, "--backend", "gptq",
                                 "--out", tmp_path / "out")  # fmt: skip
    assert (body["status"], body["stage"]) == ("error", "load")
    assert f"tensor '{name}' is not zero, and the configuration has no bias there" in body["message"]


def build_dense(folder: Path) -> Any:
    """The unquantized model of a folder."""
    backend = get_backend("bf16").create({}, "cpu", "bfloat16")
    model = skeleton(read_config(folder), "sdpa")
    return build_model(model, CheckpointWeights(folder), backend, Layout.on(torch.device("cpu")))


def test_a_tensor_of_another_shape_ends_the_load_and_is_named(place, tmp_path):
    folder = copied(place.made[DENSE], tmp_path / "m")
    assert build_dense(folder)
    name = "model.layers.1.mlp.down_proj.weight"
    rewritten(folder, name, lambda tensors: {**tensors, name: tensors[name][:, :-8].contiguous()})
    with pytest.raises(
        ValueError, match=rf"'{name}' has shape \(256, 376\), the configuration says \(256, 384\)"
    ):
        build_dense(folder)


def test_a_bias_of_another_shape_ends_the_load_and_is_named(place, tmp_path):
    folder = copied(place.made[DENSE], tmp_path / "m")
    name = "model.layers.1.self_attn.q_proj.bias"
    rewritten(folder, name, lambda tensors: {**tensors, name: tensors[name][:-1].contiguous()})
    with pytest.raises(ValueError, match=rf"'{name}' has shape \(255,\), the configuration says \(256,\)"):
        build_dense(folder)


def test_a_tensor_that_no_shard_holds_ends_the_load_and_is_named(place, tmp_path):
    folder = copied(place.made[DENSE], tmp_path / "m")
    (folder / INDEX_NAME).unlink()
    rewritten(folder, "model.norm.weight", lambda tensors: {"x": torch.ones(1), **_without_norm(tensors)})
    with pytest.raises(BrokenFile, match=r"holds no tensor 'model\.norm\.weight'"):
        build_dense(folder)


def _without_norm(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    return {name: tensor for name, tensor in tensors.items() if name != "model.norm.weight"}


def test_a_packed_checkpoint_is_read_by_its_own_backend_only(place):
    text = dry_run(place, "--model", place.made[AWQ].folder, "--backend", "all")
    states = {line.split("-bfloat16-")[0]: line for line in text.splitlines() if "  seed " in line}
    assert states["awq"].endswith("to run")
    assert "quantized already (awq), and 'gptq' reads gptq checkpoints" in states["gptq"]
    assert "quantized already (awq), and 'bnb-nf4' quantizes dense weights" in states["bnb-nf4"]
    assert sum("unavailable" in line for line in states.values()) == len(states) - 1


def test_a_packed_checkpoint_for_backends_that_cannot_read_it_is_one_line(place):
    line = place.command.refused("run", "--preset", place.preset, "--model", place.made[GPTQ].folder,
                                 "--backend", "hqq,awq")  # fmt: skip
    assert "is quantized already (gptq)" in line
    assert line.endswith("possible with: auto-gptq, gptq")


# ---- folders of shards ---------------------------------------------------------------------------


def test_the_layout_is_the_published_one(place):
    dense, awq = (place.made[name].folder for name in (DENSE, AWQ))
    assert len(list(dense.glob("model-000??-of-00037.safetensors"))) == 37
    assert len(list(awq.glob("model-000??-of-00011.safetensors"))) == 11
    index = json.loads((dense / INDEX_NAME).read_text())
    total = 0
    for file in dense.glob("*.safetensors"):
        with safe_open(file, framework="pt") as shard:
            total += sum(shard.get_tensor(name).nbytes for name in shard.keys())  # noqa: SIM118
    assert index["metadata"]["total_size"] == total


def test_a_folder_of_37_shards_is_known_in_well_under_a_second(place):
    began = time.perf_counter()
    for _ in range(3):
        fingerprint_folder(place.made[DENSE].folder)
    assert (time.perf_counter() - began) / 3 < 0.5


def test_every_tensor_is_found_in_the_shard_that_the_index_names(place):
    folder = place.made[DENSE].folder
    index = json.loads((folder / INDEX_NAME).read_text())["weight_map"]
    assert {name: file.name for name, file in weight_files(folder).items()} == index


def test_a_shard_that_is_missing_or_truncated_is_one_line(place, tmp_path):
    folder = copied(place.made[DENSE], tmp_path / "m")
    shard = folder / "model-00020-of-00037.safetensors"
    whole = shard.read_bytes()
    asked = ("run", "--preset", place.preset, "--model", folder, "--backend", "bf16")
    shard.unlink()
    assert f"shard '{shard}' is missing" in place.command.refused(*asked)
    shard.write_bytes(whole[:-3])
    line = place.command.refused(*asked)
    assert f"'{shard}' is truncated: {len(whole) - 3} bytes of {len(whole)}" in line


def with_index(folder: Path, change: Any) -> Path:
    file = folder / INDEX_NAME
    text = change(file.read_text())
    file.unlink()
    file.write_text(text)
    return folder


def test_an_index_that_names_a_tensor_twice_is_refused(place, tmp_path):
    folder = copied(place.made[DENSE], tmp_path / "m")
    entry = '"lm_head.weight": "model-00037-of-00037.safetensors"'
    with_index(folder, lambda text: text.replace(entry, f"{entry}, {entry.replace('00037-', '00001-')}"))
    with pytest.raises(BrokenFile, match=r"names 'lm_head\.weight' twice"):
        weight_files(folder)


def test_an_index_that_leads_to_the_wrong_shard_is_refused(place, tmp_path):
    folder = copied(place.made[DENSE], tmp_path / "m")
    with_index(
        folder, lambda text: text.replace('lm_head.weight": "model-00037', 'lm_head.weight": "model-00001')
    )
    with pytest.raises(BrokenFile, match=r"places tensor 'lm_head\.weight' in model-00001.*does not hold it"):
        weight_files(folder)


def test_a_tensor_that_the_index_forgets_is_found_in_its_shard(place, tmp_path):
    folder = copied(place.made[DENSE], tmp_path / "m")

    def forget(text: str) -> str:
        index = json.loads(text)
        del index["weight_map"]["model.norm.weight"]
        return json.dumps(index)

    with_index(folder, forget)
    assert weight_files(folder) == {
        name: folder / file.name for name, file in weight_files(place.made[DENSE].folder).items()
    }


def test_two_shards_without_an_index_that_hold_one_tensor_are_refused(tmp_path):
    for number in range(2):
        save_file({"a": torch.full((2,), float(number))}, tmp_path / f"model-{number}.safetensors")
    with pytest.raises(BrokenFile, match=r"tensor 'a' in model-0\.safetensors and model-1\.safetensors"):
        weight_files(tmp_path)
    index = {"weight_map": {"a": "model-1.safetensors"}}
    (tmp_path / INDEX_NAME).write_text(json.dumps(index))
    assert weight_files(tmp_path) == {"a": tmp_path / "model-1.safetensors"}
