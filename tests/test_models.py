import json
import shutil

import pytest

from bench.ask.experiment import Experiment
from bench.ask.models import (
    SYNTHETIC_NOTE,
    _reachable,
    cache_folder,
    find_on_disk,
    fingerprint_folder,
    read_config,
    resolve_model,
)
from bench.ask.shards import safetensors_header, weight_files
from bench.errors import BadValue, BrokenFile, MissingModel

SHAPE = {"model_type": "qwen2", "num_hidden_layers": 2, "layer_types": ["full_attention"] * 2}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_BENCH_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def safetensors(path, **values):
    """Write a safetensors file by hand: each name gets its bytes as uint8."""
    header, place = {"__metadata__": {"format": "pt"}}, 0
    for name, data in values.items():
        header[name] = {"dtype": "U8", "shape": [len(data)], "data_offsets": [place, place + len(data)]}
        place += len(data)
    text = json.dumps(header).encode()
    path.write_bytes(len(text).to_bytes(8, "little") + text + b"".join(values.values()))
    return path


def model(folder, config=SHAPE):
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    safetensors(folder / "model.safetensors", a=b"123", b=b"4567")
    return folder


def sharded(folder):
    model(folder)
    (folder / "model.safetensors").unlink()
    for number, name in enumerate("ab"):
        safetensors(folder / f"model-{number}.safetensors", **{name: b"12345"})
    index = {"weight_map": {"a": "model-0.safetensors", "b": "model-1.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def resolved(name=None, preset_model="local/tiny", architecture=SHAPE, **changes):
    experiment = Experiment(
        preset="tiny", backends=("bf16",), model=name and str(name), architecture=architecture, **changes
    )
    return resolve_model(experiment, preset_model=preset_model, download=False)


def test_a_folder_is_read_as_real_weights(tmp_path):
    folder = model(tmp_path / "m")
    found = resolved(folder)
    assert found.folder == folder
    assert (found.request.weights, found.request.architecture, found.request.note) == ("real", SHAPE, None)


def test_a_model_of_the_projects_cache_is_found(cache):
    folder = model(cache / "models" / "tiny")
    assert cache_folder() == cache
    assert resolved().folder == folder


def test_a_cached_model_is_known_by_its_name_and_not_by_its_place(cache):
    model(cache / "models" / "tiny")
    assert resolved().request.name == "local/tiny"
    assert str(cache) not in resolved().request.model_dump_json()


def test_a_preset_falls_back_on_synthetic_weights_and_says_why():
    found = resolved()
    assert (found.folder, found.request.weights) == (None, "synthetic")
    assert found.request.note.startswith("'local/tiny' is not on this disk")


def test_synthetic_weights_that_were_asked_for_are_drawn_also_where_real_ones_are(cache):
    model(cache / "models" / "tiny")
    found = resolved(weights="synthetic")
    assert (found.folder, found.request.note) == (None, SYNTHETIC_NOTE)


def test_synthetic_weights_in_the_shape_of_a_folder(tmp_path):
    found = resolved(model(tmp_path / "m"), architecture=None, weights="synthetic")
    assert (found.request.weights, found.request.architecture) == ("synthetic", SHAPE)


def test_real_weights_that_are_not_here_are_missing():
    with pytest.raises(MissingModel, match="not in the cache"):
        resolved(weights="real")


def test_a_hub_model_that_is_not_here_is_missing_and_says_how_to_go_on():
    with pytest.raises(MissingModel, match="--download"):
        resolved("nobody/no-such-model-here")


def test_the_hub_is_asked_for_where_its_address_says(monkeypatch):
    asked = []

    class Connection:
        def close(self):
            pass

    def connect(address, timeout):
        asked.append(address)
        return Connection()

    monkeypatch.setattr("socket.create_connection", connect)
    monkeypatch.setattr("urllib.request.getproxies", dict)
    assert _reachable("https://hub") and _reachable("http://mirror") and _reachable("http://mirror:8080/hub")
    assert asked == [("hub", 443), ("mirror", 80), ("mirror", 8080)]
    assert not _reachable("http://mirror:80x")
    monkeypatch.setattr("urllib.request.getproxies", lambda: {"https": "http://proxy:3128"})
    assert _reachable("https://hub")
    assert len(asked) == 3, "only the proxy can tell"


def test_a_name_that_can_be_no_model_is_missing():
    with pytest.raises(MissingModel, match="neither a folder here nor a Hub id"):
        resolved("a/b/c/d")


def test_the_shape_of_a_preset_is_not_used_for_another_model():
    with pytest.raises(MissingModel):
        resolved("nobody/no-such-model-here", weights="synthetic")


def test_a_preset_without_a_model_needs_one():
    with pytest.raises(BadValue, match="--model"):
        resolved(preset_model=None)


def test_synthetic_weights_in_the_shape_of_a_quantized_checkpoint_are_refused(tmp_path):
    folder = model(tmp_path / "m", {**SHAPE, "quantization_config": {"bits": 4}})
    with pytest.raises(BadValue, match="quantized checkpoint"):
        resolved(folder, weights="synthetic")


def test_layers_are_cut_in_the_architecture(tmp_path):
    found = resolved(model(tmp_path / "m"), layers=1).request
    assert (found.architecture["num_hidden_layers"], found.architecture["layer_types"]) == (
        1,
        ["full_attention"],
    )
    assert found.layers == 1


@pytest.mark.parametrize("weights", ["auto", "synthetic"])
def test_more_layers_than_there_are_are_refused(tmp_path, weights):
    with pytest.raises(BadValue, match="the model has 2 decoder layers"):
        resolved(model(tmp_path / "m"), layers=3, weights=weights)


def test_synthetic_models_of_different_depth_have_different_fingerprints():
    assert resolved(layers=1).request.fingerprint != resolved(layers=2).request.fingerprint


def test_a_local_name_without_its_configuration_is_not_on_disk(cache):
    (cache / "models" / "tiny").mkdir(parents=True)
    assert find_on_disk("local/tiny") is None


def test_a_folder_without_configuration_is_broken(tmp_path):
    folder = model(tmp_path / "m")
    (folder / "config.json").unlink()
    with pytest.raises(BrokenFile, match=r"holds no config\.json"):
        resolved(folder)


@pytest.mark.parametrize("text", ["{", "", "[]", "{}", '{"model_type": 3}', "\0"])
def test_a_corrupt_configuration_is_broken(tmp_path, text):
    folder = model(tmp_path / "m")
    (folder / "config.json").write_text(text)
    with pytest.raises(BrokenFile, match=r"config\.json"):
        read_config(folder)


def test_a_configuration_that_is_no_text_is_broken(tmp_path):
    folder = model(tmp_path / "m")
    (folder / "config.json").write_bytes(b"\xff\xfe{}")
    with pytest.raises(BrokenFile):
        read_config(folder)


def test_a_folder_without_weights_is_broken(tmp_path):
    folder = model(tmp_path / "m")
    (folder / "model.safetensors").unlink()
    with pytest.raises(BrokenFile, match=r"holds no \*\.safetensors"):
        resolved(folder)


@pytest.mark.parametrize("length", range(0, 168, 7))
def test_a_truncated_weight_file_is_broken_wherever_it_ends(tmp_path, length):
    folder = model(tmp_path / "m")
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    assert length < len(whole)
    file.write_bytes(whole[:length])
    with pytest.raises(BrokenFile):
        resolved(folder)


def test_a_weight_file_that_lacks_its_last_byte_is_truncated(tmp_path):
    folder = model(tmp_path / "m")
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(BrokenFile, match="truncated"):
        resolved(folder)


@pytest.mark.parametrize(
    "header",
    [b"not json!", b"[1]", b"3 ", b'{"a": 3}', b'{"a": {}}', b'{"a": {"data_offsets": []}}', b"\xff\xff\xff"],
)
def test_a_file_whose_header_is_none_is_broken(tmp_path, header):
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(BrokenFile):
        safetensors_header(file)


@pytest.mark.parametrize("end", ['"x"', "null", "[1]"])
def test_a_header_whose_offsets_are_no_numbers_is_broken(tmp_path, end):
    header = f'{{"a": {{"data_offsets": [0, {end}]}}}}'.encode()
    file = tmp_path / "x.safetensors"
    file.write_bytes(len(header).to_bytes(8, "little") + header + bytes(64))
    with pytest.raises(BrokenFile):
        safetensors_header(file)


def test_a_pickle_that_was_renamed_is_broken(tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(b"PK\x03\x04" + bytes(range(200)))
    with pytest.raises(BrokenFile, match="no safetensors file"):
        safetensors_header(file)


def test_tensors_of_all_shards_are_found(tmp_path):
    folder = sharded(tmp_path / "m")
    assert weight_files(folder) == {"a": folder / "model-0.safetensors", "b": folder / "model-1.safetensors"}


def test_a_missing_shard_is_named(tmp_path):
    folder = sharded(tmp_path / "m")
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(BrokenFile, match=r"model-1\.safetensors' is missing"):
        resolved(folder)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"a": [1]}}'])
def test_a_corrupt_index_of_shards_is_broken(tmp_path, text):
    folder = sharded(tmp_path / "m")
    (folder / "model.safetensors.index.json").write_text(text)
    with pytest.raises(BrokenFile, match="index"):
        weight_files(folder)


def test_an_index_cannot_lead_out_of_its_folder(tmp_path):
    folder = sharded(tmp_path / "m")
    safetensors(tmp_path / "outside.safetensors", a=b"1")
    (folder / "model.safetensors.index.json").write_text('{"weight_map": {"a": "../outside.safetensors"}}')
    with pytest.raises(BrokenFile, match="is missing"):
        weight_files(folder)


def test_the_fingerprint_does_not_depend_on_the_place(tmp_path):
    folder = model(tmp_path / "m")
    other = shutil.copytree(folder, tmp_path / "other")
    assert fingerprint_folder(folder) == fingerprint_folder(other)


def test_the_fingerprint_changes_when_a_weight_changes(tmp_path):
    folder = model(tmp_path / "m")
    before = fingerprint_folder(folder)
    safetensors(folder / "model.safetensors", a=b"123", b=b"4568")
    assert fingerprint_folder(folder) != before


def test_the_fingerprint_changes_when_a_tensor_is_renamed(tmp_path):
    folder = model(tmp_path / "m")
    before = fingerprint_folder(folder)
    safetensors(folder / "model.safetensors", a=b"123", c=b"4567")
    assert fingerprint_folder(folder) != before


def test_the_fingerprint_changes_with_the_configuration(tmp_path):
    folder = model(tmp_path / "m")
    before = fingerprint_folder(folder)
    (folder / "config.json").write_text(json.dumps({**SHAPE, "rms_norm_eps": 1e-5}))
    assert fingerprint_folder(folder) != before


def test_the_fingerprint_of_shards_changes_with_any_of_them(tmp_path):
    folder = sharded(tmp_path / "m")
    before = fingerprint_folder(folder)
    safetensors(folder / "model-0.safetensors", a=b"12346")
    assert fingerprint_folder(folder) != before
