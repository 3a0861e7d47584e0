import pytest

from bench.ask.experiment import build_experiment
from bench.ask.preset import choose_preset, load_preset, preset_names
from bench.errors import BadValue, BrokenFile
from bench.load.model import linear_shapes, skeleton

PARAMETERS = {
    "proxy": 494_032_768,  # Qwen2-0.5B
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "smollm2-135m": 134_515_008,
    "tiny": 459_904,
}
GIB = 2**30


def test_this_file_knows_every_preset():
    assert preset_names() == sorted(PARAMETERS)


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_makes_a_valid_experiment(name):
    preset = load_preset(name)
    made = build_experiment(
        {
            **preset.experiment_values,
            "preset": name,
            "backends": ["bf16"],
            "architecture": preset.architecture,
        }
    )
    assert preset.description
    assert preset.model
    assert made.workload.warmup_steps < made.workload.steps


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_the_shape_it_says(name):
    model = skeleton(load_preset(name).architecture, "sdpa")
    assert sum(parameter.numel() for parameter in model.parameters()) == PARAMETERS[name]
    assert all(parameter.is_meta for parameter in model.parameters())


@pytest.mark.parametrize("name", preset_names())
def test_nothing_of_an_architecture_is_lost_on_the_way_into_the_configuration(name):
    architecture = dict(load_preset(name).architecture)
    config = skeleton(architecture, "sdpa").config
    theta = architecture.pop("rope_theta")
    assert config.rope_parameters["rope_theta"] == theta
    for key, value in architecture.items():
        assert getattr(config, key) == value


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_has_seven_projections_in_each_layer(name):
    architecture = load_preset(name).architecture
    assert len(linear_shapes(skeleton(architecture, "sdpa"))) == 7 * architecture["num_hidden_layers"]


@pytest.mark.parametrize(
    ("memory", "chosen"),
    [
        ([], "proxy"),
        ([8 * GIB], "proxy"),
        ([24 * GIB], "qwen2-7b"),
        ([int(23.5 * GIB)], "qwen2-7b"),  # what a 24 GB card reports
        ([77 * GIB], "qwen2-7b"),
        ([80 * GIB], "qwen2-72b"),
        ([int(79.1 * GIB)], "qwen2-72b"),  # what an 80 GB card reports
        ([2**50], "qwen2-72b"),
        ([24 * GIB] * 2, "qwen2-7b"),
        ([int(23.55 * GIB)] * 7, "qwen2-72b"),
    ],
)
def test_the_largest_preset_that_fits_is_chosen(memory, chosen):
    name, why = choose_preset(memory)
    assert name == chosen
    assert why


def test_the_reason_says_what_the_card_has():
    assert "8 GiB" in choose_preset([8 * GIB])[1]
    assert "7 cards have 165 GiB" in choose_preset([int(23.55 * GIB)] * 7)[1]
    assert "no CUDA device" in choose_preset([])[1]


def test_an_unknown_preset_names_the_nearest():
    with pytest.raises(BadValue, match="did you mean 'qwen2-7b'"):
        load_preset("qwen-7b")


def test_a_preset_of_ones_own_is_read_from_its_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('description = "mine"\nmodel = "a/b"\n[lora]\nrank = 4\n')
    preset = load_preset(str(file))
    assert (preset.model, preset.experiment_values) == ("a/b", {"lora": {"rank": 4}})


def test_a_preset_that_is_not_toml_is_a_broken_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text("description = ")
    with pytest.raises(BrokenFile, match="is not TOML"):
        load_preset(str(file))


def test_a_preset_that_is_not_text_is_a_broken_file(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_bytes(b"description = '\xff\xfe'")
    with pytest.raises(BrokenFile):
        load_preset(str(file))


def test_a_preset_without_a_description_is_refused(tmp_path):
    file = tmp_path / "mine.toml"
    file.write_text('model = "a/b"\n')
    with pytest.raises(BadValue, match="description"):
        load_preset(str(file))


def test_a_preset_file_that_does_not_exist_is_a_bad_value(tmp_path):
    with pytest.raises(BadValue, match="unknown preset"):
        load_preset(str(tmp_path / "none.toml"))
