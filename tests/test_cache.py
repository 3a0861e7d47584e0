"""Quantized once, loaded again: to the bit the same model, and nothing broken is ever taken for it."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

import backends._blocks
from bench.ask.plan import RunRequest
from bench.ask.quantized_cache import MANIFEST, QuantizedKey
from bench.judge.comparison import compare
from bench.load import stored_model
from bench.load.cache import QuantizedCache, key_of
from bench.load.contract import Backend
from bench.load.lora import attach
from bench.load.model import DTYPES, unquantized_digest
from bench.load.proof import layer_bits, quantization_breaches
from bench.load.registry import get_backend
from bench.load.stored_model import BrokenCache, ModelWriter, StoredModel, checksum
from bench.record.store import read_record
from bench.run.building import Builder
from bench.run.isolation import WatchedVariables
from bench.run.order import Order
from bench.run.workload import Batch
from bench.show.columns import COLUMNS, sections
from bench.show.tables import csv, markdown
from tests.command import ROOT, Command
from tests.record_factory import record
from tests.rig import Kept, ask, quiet, settled  # noqa: F401 - settled is a fixture

CACHEABLE = ("bnb-nf4", "bnb-nf4-dq", "bnb-int8", "hqq", "eetq")
pytestmark = quiet


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where entries are."""
    monkeypatch.setenv("QLORA_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "quantized"


def built(asked: RunRequest, cache: QuantizedCache | None) -> SimpleNamespace:
    """A model with its adapters as a run builds it, its logits and its adapters' gradients on one batch."""
    builder = Builder(Order(request=asked, model_folder=None), Kept(), WatchedVariables())
    backend, model, shapes = builder.build(asked, cache)
    if cache:
        cache.finish(1.5)
    assert quantization_breaches(model, shapes, backend) == []
    bits = {n: layer_bits(layer, shapes[n], backend.codes) for n, layer in model.quantized()}
    kernels = {backend.kernel(layer) for _, layer in model.quantized()}
    digest = unquantized_digest(model)
    adapters = attach(model.model, asked.lora, 0, DTYPES[backend.dtype], builder.pairs)
    with torch.no_grad():
        for name, tensor in adapters.tensors.items():
            if name.endswith("lora_B"):  # while B is zero, so is the gradient of A
                tensor.copy_(torch.linspace(-0.02, 0.02, tensor.numel()).view_as(tensor))
    batch: Batch = builder.reader().next_batch()
    with torch.autocast("cpu", torch.bfloat16, enabled=backend.dtype == "bfloat16"):
        logits = adapters.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
    logits.float().pow(2).mean().backward()
    gradients = {name: tensor.grad for name, tensor in adapters.tensors.items()}
    return SimpleNamespace(
        backend=backend,
        logits=logits.detach(),
        gradients=gradients,
        bits=bits,
        kernels=kernels,
        digest=digest,
    )


def cached(asked: RunRequest) -> tuple[SimpleNamespace, QuantizedCache]:
    cache = QuantizedCache(lambda: 0.0)
    return built(asked, cache), cache


def same(one: SimpleNamespace, other: SimpleNamespace) -> None:
    assert torch.equal(one.logits, other.logits)
    assert one.gradients.keys() == other.gradients.keys()
    assert all(torch.equal(one.gradients[name], other.gradients[name]) for name in one.gradients)
    assert (one.bits, one.kernels, one.digest) == (other.bits, other.kernels, other.digest)


def refuse(monkeypatch: pytest.MonkeyPatch, identifier: str) -> None:
    """From here on, quantizing with this backend is an error."""

    def linear(self: Backend, layer: object) -> None:
        raise AssertionError("quantized again")

    monkeypatch.setattr(get_backend(identifier).backend, "linear", linear)


# ---- the same model ------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("backend", CACHEABLE)
def test_logits_and_gradients_are_those_of_the_freshly_quantized_model(
    backend: str, dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ask(backend, dtype=dtype)
    plain = built(asked, None)
    first, writing = cached(asked)
    refuse(monkeypatch, backend)
    again, reading = cached(asked)
    same(plain, first)
    same(plain, again)
    assert all(bool(gradient.any()) for gradient in again.gradients.values())
    assert (writing.load["from_cache"], reading.load["from_cache"]) == (False, True)
    assert writing.notes == reading.notes == []


@pytest.mark.parametrize("options", [{"bits": 2}, {"bits": 8}, {"axis": 0}, {"group_size": 32}], ids=str)
def test_hqq_is_the_same_with_other_options(options: dict[str, int]) -> None:
    asked = ask("hqq")
    asked = asked.model_copy(update={"options": {**asked.options, **options}})
    same(cached(asked)[0], cached(asked)[0])


@pytest.mark.parametrize("backend", CACHEABLE)
def test_layers_quantized_in_pieces_are_the_same(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the large ones of a real model are."""
    monkeypatch.setattr(backends._blocks, "WEIGHTS_AT_ONCE", 2048)
    asked = ask(backend)
    first, _ = cached(asked)
    refuse(monkeypatch, backend)
    same(first, cached(asked)[0])


def test_a_rescaled_model_is_another_entry_and_the_same_again(monkeypatch: pytest.MonkeyPatch) -> None:
    plain, stressed = ask("bnb-nf4"), ask("bnb-nf4", stress={"model.layers.1.mlp.up_proj": 2.0**12})
    cached(plain)
    first, writing = cached(stressed)
    assert writing.load["from_cache"] is False
    refuse(monkeypatch, "bnb-nf4")
    same(first, cached(stressed)[0])


def test_a_model_spread_over_places_reads_what_one_place_wrote(monkeypatch: pytest.MonkeyPatch) -> None:
    first, _ = cached(ask("hqq"))
    refuse(monkeypatch, "hqq")
    again, reading = cached(ask("hqq", placement="split", device_count=2))
    assert reading.load["from_cache"] is True
    same(first, again)


def test_many_shards_are_read_like_one(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(stored_model, "SHARD_BYTES", 20_000)
    first, writing = cached(ask("bnb-int8"))
    files = sorted(folder.glob("*/*.safetensors"))
    assert len(files) > 5
    for file in files:
        tensors = load_file(file)
        assert len(tensors) == 1 or sum(tensor.nbytes for tensor in tensors.values()) <= 20_000
    assert writing.load["cache_bytes"] == sum(file.stat().st_size for file in files)
    same(first, cached(ask("bnb-int8"))[0])


# ---- what the key is made of ---------------------------------------------------------------------


def key(asked: RunRequest) -> QuantizedKey:
    backend = get_backend(asked.backend).create(asked.options, asked.device, asked.dtype)
    return key_of(backend, asked, [])


@pytest.mark.parametrize(
    "changes",
    [
        {"dtype": "float16"},
        {"options": {"quant_type": "fp4", "double_quantization": False}},
        {"versions": {"torch": "0"}},
        {"versions": {"bitsandbytes": "0"}},
        {"versions": {"qlora-bench": "0"}},
        {"placement": "fsdp"},
        *({"model": {name: value}} for name, value in
          (("fingerprint", "x"), ("weights", "synthetic"), ("architecture", {"num_hidden_layers": 1}))),
    ],
    ids=str,
)  # fmt: skip
def test_what_changes_the_codes_changes_the_entry(changes: dict[str, object]) -> None:
    asked = ask("bnb-nf4")
    for name in ("model", "versions"):
        if isinstance(part := changes.get(name), dict):
            given = getattr(asked, name)
            whole = {**given, **part} if name == "versions" else given.model_copy(update=part)
            changes = {**changes, name: whole}
    assert key(asked.model_copy(update=changes)).folder != key(asked).folder


@pytest.mark.parametrize(
    "changes", [{"seed": 9}, {"repeat": 3}, {"attention": "eager"}, {"placement": "split"}, {"trace": True}]
)
def test_what_does_not_change_the_codes_reads_the_same_entry(changes: dict[str, object]) -> None:
    asked = ask("bnb-nf4")
    assert key(asked.model_copy(update=changes)).folder == key(asked).folder


def test_the_key_has_the_adapters_code_and_the_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = ask("eetq")
    before = key(asked)
    monkeypatch.setattr(get_backend("eetq").backend, "stored_form", lambda self: "native 2")
    assert key(asked).folder != before.folder
    assert before.adapter != key(ask("hqq")).adapter


def test_the_threads_of_the_process_are_in_the_key(monkeypatch: pytest.MonkeyPatch) -> None:
    before = key(ask("bnb-nf4-dq"))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    assert key(ask("bnb-nf4-dq")).folder != before.folder


def test_a_group_size_that_was_fitted_is_in_the_key() -> None:
    asked = ask("hqq")
    backend = get_backend("hqq").create({"group_size": 64}, "cpu", "bfloat16")
    before = key_of(backend, asked, [])
    backend.options = backend.options.model_copy(update={"group_size": 32})
    assert key_of(backend, asked, []).folder != before.folder


# ---- broken, interrupted, at once ----------------------------------------------------------------


def without_a_shard(entry: Path) -> None:
    next(entry.glob("*.safetensors")).unlink()


def truncated(entry: Path) -> None:
    file = next(entry.glob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:-100])


def of_other_shapes(entry: Path) -> None:
    file = next(entry.glob("*.safetensors"))
    save_file({name: tensor.reshape(1, -1) for name, tensor in load_file(file).items()}, file)


def with_a_flipped_bit(entry: Path) -> None:
    file = next(entry.glob("*.safetensors"))
    data = bytearray(file.read_bytes())
    data[-100] ^= 4
    file.write_bytes(data)


def with_swapped_checksums(entry: Path) -> None:
    said = json.loads((entry / MANIFEST).read_text())
    names = list(said["checksums"])
    said["checksums"][names[0]] = said["checksums"][names[1]]
    (entry / MANIFEST).write_text(json.dumps(said))


def without_a_layer(entry: Path) -> None:
    said = json.loads((entry / MANIFEST).read_text())
    gone = next(iter(said["checksums"])).rpartition(".")[0]
    said["checksums"] = {n: v for n, v in said["checksums"].items() if not n.startswith(gone)}
    (entry / MANIFEST).write_text(json.dumps(said))


def without_its_manifest(entry: Path) -> None:
    (entry / MANIFEST).unlink()


def with_a_manifest_cut_short(entry: Path) -> None:
    (entry / MANIFEST).write_text((entry / MANIFEST).read_text()[:200])


def of_another_model(entry: Path) -> None:
    text = (entry / MANIFEST).read_text()
    (entry / MANIFEST).write_text(text.replace('"fingerprint": "rig"', '"fingerprint": "other"'))


BREAKAGES = (
    without_a_shard, truncated, of_other_shapes, with_a_flipped_bit, with_swapped_checksums, without_a_layer,
    without_its_manifest, with_a_manifest_cut_short, of_another_model,
)  # fmt: skip


@pytest.mark.parametrize("damage", BREAKAGES, ids=lambda f: f.__name__)
def test_what_is_broken_is_made_again_and_the_record_says_so(damage, folder: Path) -> None:  # type: ignore[no-untyped-def]
    asked = ask("bnb-nf4")
    first, _ = cached(asked)
    (entry,) = folder.iterdir()
    damage(entry)
    again, repaired = cached(asked)
    same(first, again)
    (note,) = repaired.notes
    assert note.startswith("the quantized model in the cache was not used, and is made again: ")
    assert repaired.load["from_cache"] is False
    assert [path.name for path in folder.iterdir()] == [entry.name]
    third, reading = cached(asked)
    same(first, third)
    assert (reading.load["from_cache"], reading.notes) == (True, [])


@pytest.mark.parametrize("count", [1, 7, 8, 9, 4096])
def test_every_changed_byte_changes_the_checksum(count: int) -> None:
    tensor = torch.arange(count).to(torch.uint8)
    before = checksum(tensor)
    for place in {0, count // 2, count - 1}:
        changed = tensor.clone()
        changed[place] ^= 128
        assert checksum(changed) != before
    assert checksum(torch.cat([torch.zeros(3, dtype=torch.uint8), tensor])[3:]) == before


KILLED = """
import os, signal, torch
from bench.load.cache import QuantizedCache
from bench.load.stored_model import ModelWriter
from bench.run.building import Builder
from bench.run.isolation import WatchedVariables
from bench.run.order import Order
from tests.rig import Kept, ask
import bench.load.stored_model
bench.load.stored_model.SHARD_BYTES = 10_000
plain = ModelWriter.add
def add(self, layer, tensors):
    plain(self, layer, tensors)
    if "layers.1." in layer:
        os.kill(os.getpid(), signal.SIGKILL)
ModelWriter.add = add
torch.set_num_threads(1)
asked = ask("bnb-nf4")
builder = Builder(Order(request=asked, model_folder=None), Kept(), WatchedVariables())
builder.build(asked, QuantizedCache(lambda: 0.0))
"""


def test_a_process_killed_in_the_middle_leaves_nothing_complete_and_its_rest_is_swept(folder: Path) -> None:
    done = subprocess.run([sys.executable, "-c", KILLED], cwd=ROOT, env=dict(os.environ), check=False,
                          capture_output=True, text=True, timeout=120)  # fmt: skip
    assert done.returncode == -signal.SIGKILL, done.stderr
    (left,) = folder.iterdir()
    assert left.name.startswith(".bnb-nf4-")
    assert list(left.glob("*.safetensors"))
    first, cache = cached(ask("bnb-nf4"))
    assert cache.load["from_cache"] is False
    assert cache.notes == []
    (entry,) = folder.iterdir()
    assert entry.name.startswith("bnb-nf4-")
    same(first, cached(ask("bnb-nf4"))[0])


def test_a_build_that_fails_leaves_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def add(self: ModelWriter, layer: str, tensors: object) -> None:
        raise RuntimeError("planted")

    monkeypatch.setattr(ModelWriter, "add", add)
    with pytest.raises(RuntimeError, match="planted"), QuantizedCache(lambda: 0.0) as cache:
        built(ask("bnb-nf4"), cache)
    assert list(folder.iterdir()) == []


def test_two_that_write_the_same_entry_do_no_harm(folder: Path) -> None:
    """Neither sweeps what the other writes; the first to finish puts it there, the second leaves it."""
    asked = key(ask("bnb-nf4"))
    tensors = {"codes": torch.arange(100, dtype=torch.uint8)}
    one, two = ModelWriter(asked, ["q"]), ModelWriter(asked, ["q"])
    one.add("q", tensors)
    two.add("q", tensors)
    assert one.finish(1.0) == two.finish(2.0)
    assert list(folder.iterdir()) == [asked.folder]
    stored = StoredModel(asked, ["q"])
    assert stored.manifest.quantize_seconds == 1.0
    assert torch.equal(stored.tensors("q", torch.device("cpu"))["codes"], tensors["codes"])
    with pytest.raises(BrokenCache, match="holds no 'k'"):
        StoredModel(asked, ["q", "k"])


def test_a_full_disk_costs_the_run_nothing_but_the_cache(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*arguments: object, **keywords: object) -> None:
        raise OSError(28, "No space left on device")

    plain = built(ask("bnb-nf4"), None)
    monkeypatch.setattr(stored_model, "save_file", full)
    first, cache = cached(ask("bnb-nf4"))
    same(plain, first)
    (note,) = cache.notes
    assert "could not be kept in the cache: [Errno 28] No space left" in note
    assert cache.load == {"from_cache": False}
    assert list(folder.iterdir()) == []


def test_of_several_processes_only_the_first_fills_the_cache_and_all_read_it(folder: Path) -> None:
    cache = QuantizedCache(lambda: 0.0, fills=False)
    built(ask("bnb-nf4"), cache)
    assert not folder.exists()
    cached(ask("bnb-nf4"))
    cache = QuantizedCache(lambda: 0.0, fills=False)
    built(ask("bnb-nf4"), cache)
    assert cache.load["from_cache"] is True


@pytest.mark.parametrize("backend", ["bf16", "bnb-nf4"])
def test_what_cannot_be_stored_is_quantized_each_time_and_says_so(
    backend: str, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend != "bf16":  # as a third party's adapter is, which writes `linear` and `expected_bits` alone
        monkeypatch.setattr(get_backend(backend).backend, "uncached", Backend.uncached)
    first, cache = cached(ask(backend))
    again, _ = cached(ask(backend))
    same(first, again)
    (note,) = cache.notes
    assert note.startswith("--cache changes nothing: ")
    assert cache.load == {"from_cache": False}
    assert not folder.exists()


def test_writing_is_kept_apart_from_the_load(monkeypatch: pytest.MonkeyPatch) -> None:
    """A clock that only writing moves: the load itself takes no time on it."""
    now = 0.0
    plain = ModelWriter.add

    def add(self: ModelWriter, layer: str, tensors: dict[str, torch.Tensor]) -> None:
        nonlocal now
        now += 2.0
        plain(self, layer, tensors)

    monkeypatch.setattr(ModelWriter, "add", add)
    cache = QuantizedCache(lambda: now)
    built(ask("bnb-nf4"), cache)
    assert now == 28.0  # 2 decoder layers of 7
    assert cache.seconds_apart == now
    assert cache.load["quantize_seconds"] == 1.5
    assert cache.load["cache_write_seconds"] == now


# ---- through the front door ----------------------------------------------------------------------

FLAGS = ("--preset", "tiny", "--device", "cpu", "--steps", "3", "--set", "workload.warmup_steps=1",
         "--set", "cpu_threads=1", "--backend", "hqq", "--cache")  # fmt: skip


@pytest.mark.parametrize("names", [("one",), pytest.param(("one", "two"), marks=pytest.mark.soak)], ids=len)
def test_commands_at_once_quantize_and_the_next_one_loads_from_the_cache(tmp_path: Path, names: tuple[str, ...]) -> None:
    command = Command(tmp_path / "cache")
    outs = [tmp_path / name for name in names]
    running = [
        subprocess.Popen(command.arguments("run", *FLAGS, "--out", out, "--quiet"), env=command.environment,
                         stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
        for out in outs
    ]  # fmt: skip
    for process in running:
        _, said = process.communicate(timeout=200)
        assert process.returncode == 0, said
    (path,) = outs[0].glob("hqq-*.json")
    first = [read_record(out / path.name) for out in outs]
    assert not all(made.load.from_cache for made in first if made.load)
    (entry,) = (tmp_path / "cache" / "quantized").iterdir()
    assert entry.name.startswith("hqq-")
    done = command.run("run", *FLAGS, "--out", outs[0], "--force")
    assert done.returncode == 0, done.stderr
    assert "3 steps, loaded from cache" in done.stdout
    again = read_record(path)
    manifest = json.loads((entry / MANIFEST).read_text())
    assert again.load
    assert again.load.from_cache is True
    assert again.load.reload_seconds == again.load.load_seconds
    assert again.load.quantize_seconds == manifest["quantize_seconds"] != again.load.load_seconds
    assert again.load.cache_bytes == sum(file.stat().st_size for file in entry.glob("*.safetensors"))
    assert again.load.cache_write_seconds is None
    assert again.proof.quantized
    for made in first:
        assert made.load
        assert made.load.weights_digest == again.load.weights_digest
        assert [step.losses for step in made.steps] == [step.losses for step in again.steps]
        assert [step.gradient_norm for step in made.steps] == [step.gradient_norm for step in again.steps]
        assert made.quantization == again.quantization


# ---- what is shown -------------------------------------------------------------------------------


def loaded(backend: str, seconds: float | None = None, **keywords: object):  # type: ignore[no-untyped-def]
    """A record of a run with a cache; ``seconds``: it came from there in that time."""
    made = record(backend, ask={"cache": True}, **keywords)  # type: ignore[arg-type]
    facts = {"from_cache": seconds is not None, "quantize_seconds": made.load.load_seconds}
    if seconds is not None:
        facts |= {"load_seconds": seconds, "reload_seconds": seconds, "cache_bytes": 10**9}
    return made.model_copy(update={"load": made.load.model_copy(update=facts)})


def load_cells(records: list) -> list[tuple[str, str]]:  # type: ignore[type-arg]
    (column,) = (column for column in COLUMNS if column.title == "Load (s)")
    assert column.brief
    lines = [line for part in sections(compare(records)) for line in part.lines]
    return [(column.text(line), column.brief(line)) for line in lines]


def test_a_load_from_the_cache_is_marked_and_never_ranked_among_those_that_quantized() -> None:
    comparison = compare([loaded("bf16"), loaded("bnb-nf4"), loaded("hqq", 0.25)])
    (group,) = comparison.groups
    assert group.best["load_seconds"]
    assert "hqq" not in group.best["load_seconds"]
    assert any("quantized model loaded from cache (no: bf16, bnb-nf4; yes: hqq)" in w
               for w in comparison.warnings)  # fmt: skip
    assert "0.250 (from cache)" in markdown(comparison)
    lines = csv(comparison).splitlines()
    at = lines[0].split(",").index("from_cache")
    assert [line.split(",")[at] for line in lines[1:]] == ["False", "False", "True"]


def test_repeats_that_reload_stand_beside_the_one_that_quantized() -> None:
    repeats = [loaded("hqq", None if repeat == 0 else repeat / 4, repeat=repeat) for repeat in range(3)]
    assert load_cells(repeats[:2])[0][0].endswith("(from cache 0.250)")
    text, brief = load_cells(repeats)[0]
    assert text.endswith("(from cache 0.375, 0.250 to 0.500)")
    assert brief.splitlines()[1:] == ["cached 0.375", "0.250–0.500"]  # noqa: RUF001
    assert load_cells(repeats[1:])[0][0] == "0.375 (from cache, 0.250 to 0.500)"


def test_a_record_from_before_there_was_a_cache_says_none_was_asked_for() -> None:
    plain = record("hqq")
    assert plain.load
    text = plain.load.model_dump_json(exclude={"from_cache", "quantize_seconds", "reload_seconds"})
    assert type(plain.load).model_validate_json(text) == plain.load
    old = replace(compare([plain, record("bf16")]).conditions[0])  # the conditions are there at all
    assert old
    (condition,) = (c for c in compare([plain]).conditions if "from cache" in c.name)
    assert [value.text for value in condition.values] == ["no cache asked for"]
