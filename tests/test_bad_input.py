"""Each bug that the fuzz tests found, once, by name: the smallest input that showed it."""

from __future__ import annotations

import json
import math
import tomllib
from pathlib import Path
from typing import Any

import pytest

from bench.ask.conversations import read_conversations
from bench.ask.documents import parsed
from bench.ask.experiment import Workload
from bench.ask.shapes import MOST_LAYERS
from bench.cli.forecast import command_line
from bench.errors import LONGEST_LINE, BrokenFile, UserError, printable
from bench.judge.comparison import compare
from bench.judge.rows import make_rows
from bench.judge.stability import judge_stability
from bench.record.stability import LayerFidelity, StressedPair
from bench.record.store import Store, read_record
from bench.show.heat_map import headroom_maps
from bench.show.heat_map_cells import ROWS
from bench.show.page import page
from bench.show.plots import plots
from bench.show.stability_view import factor_in_words
from tests.forecast_factory import SIX
from tests.front import Front
from tests.mutation import DEPTH, spelt_toml
from tests.record_factory import fidelity, probe, record, step, steps
from tests.shards import write_safetensors

LONG = "x" * 5000
DEEP = "[" * DEPTH + "]" * DEPTH
TINY = ("--preset", "tiny", "--backend", "hqq")


# ---- what is asked ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments",
    [
        ("run", "--dry-run", *TINY, "--model", LONG), ("run", "--dry-run", *TINY, "--model", f"local/{LONG}"), ("run", "--dry-run", "--preset", f"{LONG}.toml"),
        ("runs", LONG), ("report", LONG), ("diagnose", LONG), ("run", *TINY, "--out", LONG), ("run", "--dry-run", *TINY, "--data", LONG),
    ],
)  # fmt: skip
def test_a_name_that_is_too_long_for_a_path_is_refused(front: Front, arguments: tuple[str, ...]) -> None:
    ended = front.holds(arguments, "xxxx")
    assert ended.code == 2
    assert len(ended.err) <= LONGEST_LINE + 20


@pytest.mark.parametrize(
    ("text", "why"),
    [
        (f"description = {DEEP}", "nested too deeply"),
        (f'description = "x"\nseed = {"9" * 5000}', "digits"),
        ('description = "x"\n"" = 1', "unknown key ''"),
        ('description = "x"\nmodel = "local/six"\n[workload]\nsteps = 1', "warmup_steps"),
    ],
)  # fmt: skip
def test_a_preset_that_cannot_be_is_refused_by_name(front: Front, text: str, why: str) -> None:
    Path("mine.toml").write_text(text, encoding="utf-8")
    # Flags on top of it do not make up for what it says itself: the command that repeats a run starts from it.
    ended = front.holds(["run", "--dry-run", "--backend", "hqq", "--preset", "mine.toml", "--steps", "8"], "mine.toml")
    assert ended.code == 2
    assert why in ended.err


@pytest.mark.parametrize("value", ["", "\r", "  "])
def test_an_empty_path_of_training_text_is_not_the_folder_one_stands_in(front: Front, value: str) -> None:
    ended = front.holds(["run", "--dry-run", *TINY, "--set", f"workload.data={value}"], "workload.data is empty")
    assert ended.code == 2


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        (("run", *TINY, "--out", ""), "--out"), (("forecast", *TINY, "--out", ""), "--out"), (("report", ""), "DIR"), (("runs", ""), "FOLDER"),
        (("watch", ""), "FOLDER"), (("compare", "", "."), "BASE"), (("compare", ".", "."), "'.' holds no records"), (("diagnose", ""), "FILE"),
        (("run", *TINY, "--model", ""), "--model"), (("run", "--preset", "tiny", "--backend", ""), "--backend"),
        (("run", "--preset", "tiny", "--backend", ","), "--backend"),
    ],
)  # fmt: skip
def test_what_is_empty_is_not_left_out(front: Front, arguments: tuple[str, ...], named: str) -> None:
    """A shell's variable that was not set: it trained every backend, or wrote into the folder one stands in."""
    assert front.holds(arguments, named).code == 2
    assert list(Path().iterdir()) == []


@pytest.mark.parametrize("seconds", ["nan", "inf", "1e10", "0"])
def test_an_interval_that_cannot_be_waited_for_is_refused(front: Front, seconds: str) -> None:
    assert front.holds(["watch", ".", "--every", seconds], "--every").code == 2


def test_links_in_a_ring_are_no_folder(front: Front) -> None:
    Path("ring").symlink_to("ring")
    assert front.holds(["report", "ring"], "'ring' is not a folder of records").code == 2


def test_more_cards_than_python_reads_are_refused(front: Front) -> None:
    assert front.holds(["plan", "--preset", "tiny", "--cards", f"{'9' * 5000}x24GB"], "--cards").code == 2


@pytest.mark.parametrize("line", ["released = 2024-06-07", f"{'.'.join('a' * 4000)} = 1"])
def test_a_shape_that_no_config_json_can_hold_is_refused(front: Front, line: str) -> None:
    Path("mine.toml").write_text(SIX.replace("[architecture]\n", f"[architecture]\n{line}\n"), encoding="utf-8")
    assert front.holds(["run", "--dry-run", "--backend", "hqq", "--preset", "mine.toml"], "architecture").code == 2


@pytest.mark.parametrize("setting", ["hqq.group_size=99999999999999999999", "cpu_threads=18446744073709551616"])
def test_a_number_that_no_record_can_hold_is_refused_before_the_run(front: Front, setting: str) -> None:
    ended = front.holds(["run", *TINY, "--set", setting], "more than 64 bits")
    assert ended.code == 2


def test_the_command_of_a_forecast_is_text_whatever_the_folder_is_called() -> None:
    told = command_line({"out": Path("/tmp/\udcff"), "preset": "six"})
    assert told.encode() == b"qlora-bench forecast --out '/tmp/\\udcff' --preset six"


@pytest.mark.parametrize("table", ["options", "synthetic_options"])
def test_options_of_a_backend_that_does_not_exist_are_refused(front: Front, table: str) -> None:
    """They were passed over, and the run had the defaults."""
    Path("mine.toml").write_text(f"{SIX}\n[{table}.hq]\ngroup_size = 32\n", encoding="utf-8")
    ended = front.holds(["run", "--dry-run", "--preset", "mine.toml", "--backend", "hqq"], "mine.toml")
    assert "'hq'; did you mean 'hqq'?" in ended.err


@pytest.mark.parametrize(
    ("command", "field", "value"),
    [
        ("margin", "num_hidden_layers", None), ("margin", "num_hidden_layers", 0), ("run", "num_hidden_layers", "6"), ("run", "num_hidden_layers", 10**12),
        ("run", "num_hidden_layers", True), ("forecast", "num_hidden_layers", None), ("plan", "num_key_value_heads", "two"), ("plan", "head_dim", "x"),
        ("plan", "max_position_embeddings", "x"), ("plan", "hidden_size", -64), ("forecast", "vocab_size", 1.5),
    ],
)  # fmt: skip
def test_a_size_of_a_model_that_is_none_is_refused_by_name(front: Front, command: str, field: str, value: Any) -> None:
    preset = tomllib.loads(SIX)
    preset["architecture"][field] = value
    if value is None:
        del preset["architecture"][field]
    Path("mine.toml").write_text(spelt_toml(preset), encoding="utf-8")
    cards = ("--cards", "24GB") if command == "plan" else ()
    stress = ("--stress", "*.up_proj=2", "--dry-run") if command == "run" else ()
    assert front.holds([command, "--backend", "hqq", "--preset", "mine.toml", *cards, *stress], field).code == 2


def test_as_many_layers_as_are_believed_are_named_in_a_moment(front: Front) -> None:
    text = SIX.replace("num_hidden_layers = 6", f"num_hidden_layers = {MOST_LAYERS}")
    Path("mine.toml").write_text(text, encoding="utf-8")
    ended = front.holds(["run", "--dry-run", "--backend", "hqq", "--preset", "mine.toml", "--stress", "model.layers.3.mlp.up_proj=2"])
    assert ended.code == 0, ended.err


@pytest.mark.parametrize("command", [("run", *TINY), ("margin", *TINY), ("triage", *TINY), ("forecast", "--preset", "six.toml", "--backend", "hqq")])
def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_is_printed(front: Front, command: tuple[str, ...]) -> None:
    Path("six.toml").write_text(SIX, encoding="utf-8")
    Path("file").write_text("", encoding="utf-8")
    assert front.holds([*command, "--out", "file/below"], "file/below").code == 2


# ---- files that are read ---------------------------------------------------------------------------


@pytest.mark.parametrize("broken", ["config.json", "model.safetensors.index.json", "a.safetensors"])
def test_a_checkpoint_that_is_nested_too_deeply_is_refused_by_name(front: Front, broken: str) -> None:
    folder = Path("model")
    folder.mkdir()
    write_safetensors(folder / "a.safetensors", {"model.norm.weight": [4]})
    (folder / "config.json").write_text('{"model_type": "qwen2", "num_hidden_layers": 2}', encoding="utf-8")
    deep = f'{{"weight_map": {DEEP}}}'.encode()
    (folder / broken).write_bytes((len(deep).to_bytes(8, "little") if broken == "a.safetensors" else b"") + deep)
    assert front.holds(["run", "--dry-run", *TINY, "--model", "model"], broken).code == 2


@pytest.mark.parametrize("text", [DEEP, '"\\ud800"', '{"\\udfff": 1}', "NaN1", "9" * 5000])
def test_json_that_cannot_be_read_is_a_value_error(text: str) -> None:
    with pytest.raises(ValueError, match=r"deep|surrogate|Extra data|digits|Expecting"):
        parsed(text)


def test_half_of_a_surrogate_pair_is_no_training_text(tmp_path: Path) -> None:
    """It passed the check before the run and failed in the tokenizer, after the model was loaded."""
    (tmp_path / "text.jsonl").write_text('{"prompt": "a", "response": "\\ud800"}', encoding="utf-8")
    with pytest.raises(BrokenFile, match=r"text.jsonl' line 1: .*surrogate"):
        read_conversations(tmp_path / "text.jsonl")


def test_a_nul_in_the_name_of_a_training_text_is_refused() -> None:
    with pytest.raises(UserError, match="not readable"):
        read_conversations(Path("a\0b"))


@pytest.mark.parametrize("value", [10**400, 2**63, -(2**63) - 1])
def test_a_number_of_more_than_64_bits_is_refused_in_a_record(tmp_path: Path, value: int) -> None:
    """A mean over such a number left the range of floats."""
    path = Store(tmp_path).save(record("hqq"))
    body = json.loads(path.read_text(encoding="utf-8"))
    body["steps"][3]["tokens"] = value
    path.write_text(json.dumps(body), encoding="utf-8")
    with pytest.raises(BrokenFile, match="64 bits"):
        read_record(path)


def test_a_record_that_is_nested_too_deeply_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.record.json"
    path.write_text(DEEP, encoding="utf-8")
    with pytest.raises(BrokenFile, match=r"a\.record\.json"):
        read_record(path)


# ---- what is shown ---------------------------------------------------------------------------------


def test_control_characters_are_spelt_out() -> None:
    assert printable("a\x1b[31m\x9b\x00\x7f\u202e\ud800b\n\tc") == "a\\x1b[31m\\x9b\\x00\\x7f\\u202e\\ud800b\n\tc"


def test_a_long_refusal_keeps_its_beginning_and_its_end() -> None:
    line = str(UserError(f"unknown preset '{LONG}'", "did you mean 'tiny'?"))
    assert len(line) <= LONGEST_LINE
    assert line.startswith("unknown preset 'xxx")
    assert line.endswith("'; did you mean 'tiny'?")


def test_a_name_in_any_script_is_drawn_without_a_warning() -> None:
    """The font that measures text has no sign for most scripts, and said so on stderr for each."""
    work = Workload(sequence_length=512, steps=8, warmup_steps=2, data="/数据/训练.jsonl")
    two = [record("hqq", ask={"workload": work}), record("hqq")]
    assert any("训练" in plot.svg for plot in plots(compare(two)))


# ---- numbers at the end of their range ---------------------------------------------------------------


def test_losses_whose_sum_is_no_float_are_judged() -> None:
    found = judge_stability(record("hqq", steps=tuple(step(i, losses=(1.7e308, 1.7e308)) for i in range(8))))
    assert found.verdict in ("healthy", "spiking")


@pytest.mark.parametrize("factor", [math.inf, math.nan])
def test_a_factor_that_is_not_finite_is_written_out(factor: float) -> None:
    pair = StressedPair(scaled="up", compensated="down", factor=factor, float32_difference=None)
    assert factor_in_words(factor) in ("Infinity", "NaN")
    assert factor_in_words(factor) in page(compare([record("hqq", stress=(pair,))]), ())


@pytest.mark.parametrize("value", [1.7e308, 5e-324, -1.0, math.inf])
def test_a_number_that_no_axis_can_hold_is_a_marker_on_its_edge(value: float) -> None:
    """Figures ended in an overflow inside matplotlib."""
    odd = step(3, losses=(abs(value),), gradient_norm=value, seconds=abs(value))
    errors = tuple(LayerFidelity(cosine=1.0, norm_ratio=1.0, relative_error=abs(v)) for v in (0.1, value, 0.2))
    made = record("hqq", steps=(*steps("hqq")[:3], odd, *steps("hqq")[4:]), fidelity=fidelity(layers=errors))
    drawn = {plot.name: plot for plot in plots(compare([made, record("bf16")]))}
    plain = {plot.name: plot for plot in plots(compare([record("hqq", fidelity=fidelity(count=3)), record("bf16")]))}
    assert drawn.keys() == plain.keys()
    for name in ("gradient-norm", "gradient-fidelity"):
        assert drawn[name].svg.count("<use") >= plain[name].svg.count("<use")


def test_more_layers_than_the_axis_of_the_heat_map_was_made_for() -> None:
    many = probe(activation_abs_max=(1.0,) * 5000, gradient_abs_max=(1.0,) * 5000)
    made = record("hqq", steps=(step(2, probe=many),))
    assert "decoder layer" in headroom_maps(make_rows([made]))[0].svg


def test_steps_that_tell_of_different_numbers_of_layers_share_a_heat_map() -> None:
    """From `ROWS` steps on several share a row."""
    seen = [probe(activation_abs_max=(1.0,) * (1 + index % 3)) for index in range(3 * ROWS)]
    made = record("hqq", steps=tuple(step(index, probe=one) for index, one in enumerate(seen)))
    assert len(headroom_maps(make_rows([made]))) == 2
