"""Which model each backend of a sweep loads: the published packed one, the dense one, or a drawn one."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.ask import models
from bench.ask.packing import RANDOM_NOTE
from bench.ask.plan import RunRequest
from bench.ask.preset import load_preset
from bench.cli import cli
from bench.errors import BadValue, BrokenFile, MissingModel
from bench.record.store import read_record
from bench.run.arrange import arrange
from bench.run.asked import Asked
from bench.run.margin import arrange_margin
from bench.run.sweep import Sweep, run_sweep
from bench.run.triage import arrange_triage

SHAPE = {"model_type": "qwen2", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
         "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": 128}  # fmt: skip
PUBLISHED = {"awq": "local/mine-awq", "gptq": "local/mine-gptq"}
DENSE = "local/mine"


@pytest.fixture
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A preset that names published checkpoints; nothing is on this disk."""
    monkeypatch.setenv("QLORA_BENCH_CACHE", str(tmp_path / "cache"))
    architecture = "\n".join(f"{key} = {json.dumps(value)}" for key, value in SHAPE.items())
    named = "\n".join(f'{method} = "{name}"' for method, name in PUBLISHED.items())
    file = tmp_path / "mine.toml"
    file.write_text(
        f'description = "mine"\nmodel = "{DENSE}"\ncalibration = "random"\n'
        f"[published]\n{named}\n[architecture]\n{architecture}\n"
    )
    return str(file)


@pytest.fixture
def put(tmp_path: Path) -> Callable[..., Path]:
    """Puts models on this disk: their files are headers without a tensor that anyone reads."""

    def put(*names: str) -> Path:
        for name in names:
            folder = tmp_path / "cache" / "models" / name.removeprefix("local/")
            folder.mkdir(parents=True)
            config = dict(SHAPE)
            for method, published in PUBLISHED.items():
                if name == published:
                    config |= {"intermediate_size": 128, "quantization_config": {"quant_method": method}}
            (folder / "config.json").write_text(json.dumps(config))
            header = json.dumps({"w": {"dtype": "U8", "shape": [4], "data_offsets": [0, 4]}}).encode()
            file = folder / "model.safetensors"
            file.write_bytes(len(header).to_bytes(8, "little") + header + name.encode()[-4:])
        return tmp_path / "cache" / "models"

    return put


def arranged(preset: str, backends: str = "bf16,awq,gptq", **flags: object) -> Sweep:
    return arrange(Asked(preset=preset, backends=(backends,), **flags)).sweep  # type: ignore[arg-type]


def seen(sweep: Sweep) -> dict[str, tuple[str, str, str | None]]:
    """Backend -> name of its model, kind of weights, calibration."""
    return {r.backend: (r.model.name, r.model.weights, r.calibration) for r in sweep.requests}


def test_the_presets_of_qwen2_know_what_is_published():
    assert load_preset("qwen2-72b").published == {
        "awq": "Qwen/Qwen2-72B-Instruct-AWQ",
        "gptq": "Qwen/Qwen2-72B-Instruct-GPTQ-Int4",
    }
    assert load_preset("qwen2-7b").published == {
        "awq": "Qwen/Qwen2-7B-Instruct-AWQ",
        "gptq": "Qwen/Qwen2-7B-Instruct-GPTQ-Int4",
    }


def test_where_nothing_is_on_this_disk_all_are_drawn_and_a_note_says_so(preset):
    sweep = arranged(preset)
    assert seen(sweep) == {
        "bf16": (DENSE, "synthetic", None),
        "awq": (DENSE, "synthetic", "random"),
        "gptq": (DENSE, "synthetic", "random"),
    }
    note = sweep.order(sweep.requests[1]).note
    assert note == f"the published checkpoint 'local/mine-awq' is not on this disk; {RANDOM_NOTE}"
    assert sweep.order(sweep.requests[0]).note is None


def test_a_published_checkpoint_is_used_where_it_is(preset, put):
    root = put(DENSE, *PUBLISHED.values())
    sweep = arranged(preset)
    assert seen(sweep) == {
        "bf16": (DENSE, "real", None),
        "awq": ("local/mine-awq", "real", "published"),
        "gptq": ("local/mine-gptq", "real", "published"),
    }
    orders = [sweep.order(request) for request in sweep.requests]
    assert [order.model_folder for order in orders] == [root / "mine", root / "mine-awq", root / "mine-gptq"]
    assert [order.packed_folder for order in orders] == [None, root / "mine-awq", root / "mine-gptq"]
    assert len({request.model.fingerprint for request in sweep.requests}) == 3
    assert sweep.model.request.name == DENSE


def test_the_line_of_a_run_says_who_reads_another_model(preset, put):
    put(DENSE, "local/mine-awq")
    assert "; awq reads local/mine-awq" in arrange(Asked(preset=preset, backends=("bf16,awq",))).headline


def test_a_published_checkpoint_is_used_beside_drawn_weights(preset, put):
    put("local/mine-awq")
    assert seen(arranged(preset)) == {
        "bf16": (DENSE, "synthetic", None),
        "awq": ("local/mine-awq", "real", "published"),
        "gptq": (DENSE, "synthetic", "random"),
    }


def test_a_published_checkpoint_is_cut_like_any_model(preset, put):
    put("local/mine-awq")
    (request,) = arranged(preset, "awq", layers=1).requests
    assert (request.model.layers, request.model.architecture["num_hidden_layers"]) == (1, 1)
    assert request.calibration == "published"


@pytest.mark.parametrize("layers", [None, 1])
def test_dense_weights_are_not_calibrated_unasked(preset, put, layers, tmp_path):
    put(DENSE)
    sweep = arranged(preset, layers=layers, out=tmp_path / "out")
    assert sweep.obstacle(sweep.requests[0]) is None
    for request in sweep.requests[1:]:
        reason = sweep.obstacle(request)
        assert reason is not None
        assert PUBLISHED[request.backend] in reason
        assert "--download" in reason
        assert "--calibration rtn" in reason


def test_what_is_not_calibrated_becomes_a_row_that_says_what_brings_it(preset, put, tmp_path):
    put(DENSE)
    done = CliRunner().invoke(
        cli, ["run", "--preset", preset, "--backend", "awq", "--out", str(tmp_path / "out"), "--quiet"]
    )
    assert done.exit_code == 1, done.output
    (file,) = (tmp_path / "out").glob("*.record.json")
    record = read_record(file)
    assert record.status == "unavailable"
    assert "fetch it with --download, or have them rounded with --calibration rtn" in str(record.message)
    assert "--calibration" not in record.command  # the same command decides anew


@pytest.mark.parametrize("how", ["rtn", "calibrated"])
def test_dense_weights_are_packed_where_that_was_asked(preset, put, how):
    put(DENSE, *PUBLISHED.values())
    sweep = arranged(preset, calibration=how)
    assert {name: kind for name, (_, _, kind) in seen(sweep).items()} == {
        "bf16": None,
        "awq": how,
        "gptq": how,
    }
    assert {request.model.name for request in sweep.requests} == {DENSE}
    assert not any(sweep.obstacle(request) for request in sweep.requests)


def test_a_model_without_a_published_checkpoint_is_calibrated_as_before(preset, put, tmp_path):
    put(DENSE)
    bare = tmp_path / "bare.toml"
    bare.write_text(f'description = "mine"\nmodel = "{DENSE}"\n')
    assert seen(arranged(str(bare), "gptq")) == {"gptq": (DENSE, "real", "calibrated")}


def test_synthetic_weights_that_were_asked_for_are_drawn_for_all(preset, put):
    put(DENSE, *PUBLISHED.values())
    sweep = arranged(preset, weights="synthetic")
    assert {(name, weights) for name, weights, _ in seen(sweep).values()} == {(DENSE, "synthetic")}


def test_another_model_is_not_replaced(preset, put):
    put("local/other", *PUBLISHED.values())
    assert seen(arranged(preset, "awq", model="local/other")) == {
        "awq": ("local/other", "real", "calibrated")
    }


def test_the_presets_own_model_given_by_name_is_its_own_model(preset, put):
    put(DENSE, *PUBLISHED.values())
    assert seen(arranged(preset, "awq", model=DENSE)) == {"awq": ("local/mine-awq", "real", "published")}


def test_a_published_checkpoint_needs_no_dense_weights(preset, put):
    put("local/mine-awq")
    assert seen(arranged(preset, "awq", weights="real")) == {"awq": ("local/mine-awq", "real", "published")}
    with pytest.raises(MissingModel, match="'local/mine' is not in the cache"):
        arranged(preset, "awq,bf16", weights="real")


def test_real_weights_that_are_nowhere_are_missing_by_the_name_of_what_would_be_read(preset):
    with pytest.raises(MissingModel, match="'local/mine-awq' is not in the cache"):
        arranged(preset, "awq", weights="real")


@pytest.mark.parametrize(
    ("backends", "there", "fetched"),
    [
        ("awq", (), ["local/mine-awq"]),
        ("bf16,bnb-nf4", (), [DENSE]),
        ("bf16,awq,gptq", (DENSE,), ["local/mine-awq", "local/mine-gptq"]),
        ("bf16,awq", (DENSE, "local/mine-awq"), []),
    ],
)
def test_download_fetches_what_is_read_and_no_more(preset, put, monkeypatch, backends, there, fetched):
    put(*there)
    asked: list[str] = []

    def fetch(name: str) -> Path:
        asked.append(name)
        return put(name) / name.removeprefix("local/")

    monkeypatch.setattr(models, "_download", fetch)
    sweep = arranged(preset, backends, download=True)
    assert asked == fetched
    assert not any(sweep.obstacle(request) for request in sweep.requests)


def test_a_download_that_was_interrupted_is_taken_up_again(preset, put, tmp_path, monkeypatch):
    whole = put(DENSE) / "mine"
    snapshot = tmp_path / "snapshot"
    snapshot.mkdir()
    (snapshot / "config.json").write_text((whole / "config.json").read_text())
    (snapshot / "model-00001-of-00002.safetensors").write_bytes((whole / "model.safetensors").read_bytes())
    shards = {"w": "model-00001-of-00002.safetensors", "v": "model-00002-of-00002.safetensors"}
    (snapshot / "model.safetensors.index.json").write_text(json.dumps({"weight_map": shards}))
    monkeypatch.setattr(models, "find_on_disk", lambda name: snapshot)
    monkeypatch.setattr(models, "_download", lambda name: whole)
    with pytest.raises(BrokenFile, match="is missing"):
        arranged(preset, "bf16", model="owner/name")
    assert arranged(preset, "bf16", model="owner/name", download=True).model.folder == whole


def test_an_unknown_kind_of_quantization_is_one_line(preset, put, tmp_path):
    folder = put("local/other") / "other"
    config = SHAPE | {"quantization_config": {"quant_method": "fp8"}}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(BadValue, match=r"'local/other' is quantized already \(fp8\)"):
        arranged(preset, "all", model="local/other")


def test_triage_runs_its_other_backends_on_what_is_published_for_them(preset, put):
    root = put(DENSE, *PUBLISHED.values())
    plan = arrange_triage(Asked(preset=preset, backends=("bnb-nf4",)))
    others = {change.request.backend: change.request for change in plan.changes if change.kind == "backend"}
    assert plan.sweep.order(others["awq"]).packed_folder == root / "mine-awq"
    assert plan.sweep.order(others["hqq"]).model_folder == root / "mine"
    assert plan.sweep.order(plan.base).model_folder == root / "mine"


def test_margin_knows_the_model(preset, put):
    put(DENSE, *PUBLISHED.values())
    plan = arrange_margin(Asked(preset=preset, backends=("awq,bnb-nf4",)), dtypes=(), module=None, max_bits=4)
    assert plan.module == "model.layers.0.mlp.up_proj"
    assert DENSE in plan.headline


def test_the_command_of_a_published_run_plans_the_same_run(preset, put):
    import shlex

    put(DENSE, *PUBLISHED.values())
    (asked,) = arranged(preset, "gptq").requests
    done = CliRunner().invoke(cli, [*shlex.split(asked.command)[1:], "--dry-run", "--json"])
    assert done.exit_code == 0, done.output
    (body,) = json.loads(done.stdout)
    assert RunRequest.model_validate(body).key == asked.key


class Quiet:
    """A watcher that is told and says nothing."""

    def skipped(self, request): ...

    def listener(self, place, total, request):
        return lambda event: None

    def ended(self, record): ...


def test_an_obstacle_does_not_stand_once_it_is_gone(preset, put, tmp_path):
    put(DENSE)
    (record,) = run_sweep(arranged(preset, "awq", out=tmp_path / "out"), Quiet())
    assert record.status == "unavailable"
    put("local/mine-awq")
    sweep = arranged(preset, "awq", out=tmp_path / "out")
    assert sweep.waiting() == list(sweep.requests)
    assert sweep.obstacle(sweep.requests[0]) is None
