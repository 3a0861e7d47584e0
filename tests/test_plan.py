import json
import tomllib

import pytest
from click.testing import CliRunner

from bench.ask.experiment import Experiment, Lora, Optimizer, Workload
from bench.ask.plan import ModelRequest, RunRequest, plan
from bench.ask.versions import HARNESS_LIBRARIES, installed_versions
from bench.cli import cli
from tests.record_factory import request

MODEL = ModelRequest(
    name="local/tiny", weights="synthetic", fingerprint="f", architecture={"model_type": "qwen2"}
)


@pytest.fixture(autouse=True)
def nothing_on_this_disk(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")


def planned(backends=("bf16", "hqq"), **changes):
    experiment = Experiment(preset="tiny", backends=backends, **changes)
    return plan(
        experiment,
        dict.fromkeys(backends, MODEL),
        device="cpu",
        cpu_threads=2,
        options={name: {} for name in backends},
        environments=dict.fromkeys(backends, "current"),
        versions={name: installed_versions(HARNESS_LIBRARIES) for name in backends},
        calibrations=dict.fromkeys(backends),
    )


def dry_run(*flags):
    """What ``run --dry-run --json`` plans for these flags."""
    done = CliRunner().invoke(cli, ["run", *flags, "--dry-run", "--json"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    return [RunRequest.model_validate(body) for body in json.loads(done.stdout)]


def again(asked):
    """The one run that the recorded command line of ``asked`` plans."""
    import shlex

    program, command, *flags = shlex.split(asked.command)
    assert (program, command) == ("qlora-bench", "run")
    (found,) = dry_run(*flags)
    return found


def test_runs_are_interleaved_round_by_round():
    assert [(run.backend, run.repeat) for run in planned(repeats=3)] == [
        ("bf16", 0),
        ("hqq", 0),
        ("bf16", 1),
        ("hqq", 1),
        ("bf16", 2),
        ("hqq", 2),
    ]


def test_repeats_of_all_backends_share_their_seed():
    assert [run.seed for run in planned(repeats=3, seed=7)] == [7, 7, 8, 8, 9, 9]


def test_every_run_has_a_key_of_its_own():
    runs = planned(("bf16", "hqq", "bnb-nf4"), repeats=4)
    assert len({run.key for run in runs}) == 12


def test_a_key_can_be_read_and_names_a_file():
    key = planned(repeats=2)[3].key
    assert key.startswith("hqq-bfloat16-r1-")
    assert all(letter.isalnum() or letter == "-" for letter in key)


def test_a_key_depends_on_values_and_not_on_the_order_they_were_given_in():
    first = request("hqq", options={"a": 1, "b": 2}, versions={"x": "1", "y": "2"})
    second = request("hqq", options={"b": 2, "a": 1}, versions={"y": "2", "x": "1"})
    assert first.key == second.key


def test_a_key_is_the_same_after_a_request_went_through_json():
    asked = request("gptq")
    assert RunRequest.model_validate_json(asked.model_dump_json()).key == asked.key


@pytest.mark.parametrize(
    "changes",
    [
        {"options": {"group_size": 32}},
        {"dtype": "float16"},
        {"device": "cpu"},
        {"attention": "eager"},
        {"checkpointing": "none"},
        {"workload": Workload(sequence_length=512, steps=9, warmup_steps=2)},
        {"data_digest": "0"},
        {"lora": Lora(rank=9)},
        {"lora": Lora(target_modules=("q_proj",))},
        {"optimizer": Optimizer(beta2=0.99)},
        {"optimizer": Optimizer(max_gradient_norm=None)},
        {"seed": 5},
        {"repeat": 1},
        {"cpu_threads": 4},
        {"versions": {"torch": "2.14.2", "qlora-bench": "0.1.0"}},
        {"versions": {"torch": None, "qlora-bench": "0.1.0"}},
        {"model": MODEL},
    ],
)
def test_the_key_changes_with_whatever_the_result_depends_on(changes):
    changed = request("hqq").model_copy(update=changes)
    assert changed.key != request("hqq").key


def test_the_key_changes_with_the_backend():
    digests = {request("hqq").model_copy(update={"backend": name}).key[-10:] for name in ("hqq", "awq")}
    assert len(digests) == 2


@pytest.mark.parametrize(
    "changes",
    [{"weights": "real"}, {"fingerprint": "g"}, {"architecture": {"model_type": "llama"}}, {"layers": 1}],
)
def test_the_key_changes_with_the_model(changes):
    assert request(model=MODEL.model_copy(update=changes)).key != request(model=MODEL).key


@pytest.mark.parametrize("changes", [{"timeout_seconds": 1.0}, {"preset": "other"}])
def test_the_key_does_not_change_with_what_the_result_does_not_depend_on(changes):
    assert request(**changes).key == request().key


def test_the_key_does_not_change_with_a_note():
    assert request(model=MODEL.model_copy(update={"note": "why"})).key == request(model=MODEL).key


def test_a_library_that_is_not_installed_has_no_version():
    found = installed_versions(["click", "no-such-distribution-anywhere"])
    assert found["click"]
    assert found["no-such-distribution-anywhere"] is None


@pytest.mark.parametrize(
    "flags",
    [
        (),
        ("--dtype", "float32", "--seed", "3", "--steps", "5"),
        ("--layers", "1"),
        ("--set", "lora.rank=16", "--set", 'lora.target_modules=["q_proj", "v_proj"]'),
        ("--set", "optimizer.max_gradient_norm=null", "--set", "optimizer.learning_rate=1e-05"),
        ("--set", "attention=eager", "--set", "checkpointing=none", "--set", "workload.padding=right"),
        ("--backend", "hqq", "--set", "hqq.group_size=32", "--set", "hqq.optimize=false"),
        ("--backend", "gptq", "--set", "gptq.kernel=gptq_torch"),
        ("--backend", "bnb-int8", "--set", "bnb-int8.outlier_threshold=0.0"),
        ("--set", "workload.sequence_length=256", "--set", "workload.warmup_steps=2", "--steps", "8"),
    ],
)
def test_the_recorded_command_plans_the_same_run(flags):
    backend = () if "--backend" in flags else ("--backend", "bf16")
    (asked,) = dry_run("--preset", "tiny", "--weights", "synthetic", *backend, *flags)
    assert again(asked).key == asked.key


def test_the_recorded_command_names_training_text_with_spaces(tmp_path):
    file = tmp_path / "my text.jsonl"
    file.write_text('{"prompt": "a", "response": "b"}')
    (asked,) = dry_run("--preset", "tiny", "--weights", "synthetic", "--backend", "bf16", "--data", str(file))
    found = again(asked)
    assert (found.key, found.data_digest) == (asked.key, asked.data_digest)
    assert found.data_digest


def test_the_command_of_a_run_that_fell_back_on_synthetic_weights_plans_the_same_run():
    (asked,) = dry_run("--preset", "tiny", "--backend", "bf16")
    assert again(asked).key == asked.key


def test_the_recorded_command_keeps_the_number_of_threads():
    (asked,) = dry_run(
        "--preset", "tiny", "--weights", "synthetic", "--backend", "bf16", "--set", "cpu_threads=77"
    )
    assert again(asked).cpu_threads == 77


def test_the_recorded_command_overrides_what_a_preset_set(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'description = "mine"\nmodel = "local/tiny"\nattention = "eager"\n[lora]\nrank = 4\n'
        '[architecture]\nmodel_type = "qwen2"\nnum_hidden_layers = 2\n'
    )
    (asked,) = dry_run(
        "--preset",
        str(file),
        "--weights",
        "synthetic",
        "--backend",
        "bf16",
        "--set",
        "lora.rank=8",
        "--set",
        "attention=sdpa",
    )
    found = again(asked)
    assert (found.lora.rank, found.attention) == (8, "sdpa")


def test_the_command_of_a_later_repeat_plans_its_seed():
    asked = dry_run("--preset", "tiny", "--weights", "synthetic", "--backend", "bf16", "--repeats", "3")[2]
    assert again(asked) == asked
    assert (asked.seed, asked.repeat) == (2, 2)


def test_more_repeats_of_what_was_run_before_are_paired_with_it():
    flags = ("--preset", "tiny", "--weights", "synthetic", "--backend", "bf16", "--seed", "5")
    whole = dry_run(*flags, "--repeats", "4")
    assert dry_run(*flags, "--first-repeat", "2", "--repeats", "2") == whole[2:]


@pytest.mark.parametrize(
    "values",
    [
        'repeats = 3\nfirst_repeat = 2\nseed = 7',
        'cache = true\ntimeout_seconds = 60.0\ntrace = true',
        'placement = "split"\ndevice_count = 2',
        '[stress]\n"model.layers.*.mlp.up_proj" = 16.0',
    ],
)
def test_what_a_preset_of_ones_own_sets_is_in_the_run_and_in_its_command(tmp_path, values):
    file = tmp_path / "mine.toml"
    shape = '[architecture]\nmodel_type = "qwen2"\nnum_hidden_layers = 2\nhidden_size = 64\n'
    shape += "num_attention_heads = 4\nintermediate_size = 128\nvocab_size = 512\n"
    file.write_text(f'description = "mine"\nmodel = "local/tiny"\nbackends = ["bf16"]\n{values}\n{shape}')
    asked = dry_run("--preset", str(file), "--weights", "synthetic")
    given = tomllib.loads(values)
    for name in given.keys() - {"repeats", "first_repeat", "seed"}:
        assert getattr(asked[0], name) == given[name]
    assert [one.repeat for one in asked] == ([2, 3, 4] if "repeats" in given else [0])
    assert {one.backend for one in asked} == {"bf16"}
    for one in asked:
        assert again(one) == one


def test_flags_override_what_a_preset_of_ones_own_sets(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text(
        'description = "mine"\nmodel = "local/tiny"\nbackends = ["hqq"]\ncache = true\ntimeout_seconds = 60.0\n'
        'placement = "split"\n[stress]\n"model.layers.0.mlp.up_proj" = 16.0\n'
        '[architecture]\nmodel_type = "qwen2"\nnum_hidden_layers = 2\nhidden_size = 64\n'
        "num_attention_heads = 4\nintermediate_size = 128\nvocab_size = 512\n"
    )
    (asked,) = dry_run(
        "--preset", str(file), "--weights", "synthetic", "--backend", "bf16", "--timeout-seconds", "90",
        "--set", "cache=false", "--placement", "single", "--stress", "model.layers.1.mlp.up_proj=4",
    )  # fmt: skip
    assert (asked.backend, asked.cache, asked.timeout_seconds, asked.placement) == ("bf16", False, 90.0, "single")
    assert asked.stress == {"model.layers.1.mlp.up_proj": 4.0}
    assert again(asked) == asked


def test_another_calibration_is_another_run(tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text('{"model_type": "qwen2", "num_hidden_layers": 2}')
    header = json.dumps({"w": {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}}).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(4))
    keys = {
        dry_run("--preset", "tiny", "--backend", "gptq", "--model", str(folder), "--calibration", how)[0].key
        for how in ("rtn", "calibrated")
    }
    assert len(keys) == 2


def test_hqqs_solver_is_off_for_large_synthetic_weights_unless_it_is_asked_for():
    (large,) = dry_run("--preset", "qwen2-72b", "--weights", "synthetic", "--backend", "hqq")
    assert large.options["optimize"] is False
    (asked,) = dry_run("--preset", "qwen2-72b", "--backend", "hqq", "--set", "hqq.optimize=true")
    assert asked.options["optimize"] is True
    (small,) = dry_run("--preset", "proxy", "--backend", "hqq")
    assert small.options["optimize"] is True
    assert again(large) == large
