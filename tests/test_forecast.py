"""The forecast: its lines, its cards, what it refuses, and the whole command on real workers."""

from __future__ import annotations

import io
import json
import math
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from bench.ask.cards import parse_cards
from bench.ask.footprint import CardNeed, PhaseNeed
from bench.ask.preset import load_preset
from bench.cli.forecast import command_line
from bench.errors import BadValue, BrokenFile
from bench.judge.forecast import HIGHEST, backend_forecast, excess, peak_memory
from bench.judge.forecast_lines import RESERVED, Question
from bench.judge.forecast_notes import assumptions
from bench.load.allowance import ALLOCATOR_SHARE, CONTEXT_BYTES
from bench.load.fit import outlooks
from bench.record.forecast import Forecast, forecasts_below, read_forecast, save_forecast
from bench.run.asked import Asked
from bench.run.forecast_plan import (
    RETURN_MEMORY,
    RETURN_NOTE,
    arrange_forecast,
    parse_depths,
    parse_subsets,
)
from bench.run.outlooks import card_outlooks, measured_need, planned_peaks
from bench.show.forecast import forecast_table, percent, weights, weights_error
from tests.command import Command
from tests.footprint_factory import asked
from tests.forecast_factory import repeat_of, six, slice_record, times

ROOT = Path(__file__).resolve().parents[1]
PAIR = Question("bnb-nf4", (2, 4), 24)


def rendered(forecast: Forecast) -> str:
    text = io.StringIO()
    Console(file=text, width=170).print(forecast_table(forecast))
    return text.getvalue()


def made(*backends: Any, **changes: Any) -> Forecast:
    values = {
        "command": "qlora-bench forecast",
        "model": "local/six",
        "weights": "synthetic",
        "full_layers": 24,
        "asked": {},
        "device": "a processor",
        "repeats": 1,
        "backends": backends,
        "assumptions": assumptions(backends, "synthetic", "cpu"),
        "ended_at": "2026-10-01T12:00:00+00:00",
        "wall_seconds": 60.0,
    }
    return Forecast(**(values | changes))


# ---- lines ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("repeats", [1, 2, 3])
def test_tensor_bytes_are_exact_whole_numbers(repeats):
    found = backend_forecast(PAIR, [repeat_of((2, 4, 24), index=i) for i in range(repeats)], None)
    expected = {"quantized_weights": 7 * 24, "quantization_metadata": 3 * 24, "unquantized_weights": 101 + 13 * 24,
                "lora": 5 * 24, "gradients": 5 * 24, "optimizer_state": 11 * 24}  # fmt: skip
    for kind, size in expected.items():
        line = found.line("weights", kind)
        assert (line.predicted, line.measured, line.low, line.high) == (size, size, None, None)
        assert line.error == 0
    assert found.line("weights", "unquantized_weights").fixed == 101
    assert found.line("weights", "unquantized_weights").per_layer == 13
    assert weights(found.lines, "predicted") == (7 + 3 + 13) * 24 + 101


def test_each_phase_and_the_highest_have_a_line():
    def peaks(depth, phase):
        return {"forward": 500 + 20 * depth, "backward": 600 + 10 * depth}.get(phase, 100 + depth)

    found = backend_forecast(PAIR, [repeat_of((2, 4, 24), peaks=peaks)], None)
    assert found.line("peak", "forward").predicted == 980
    assert found.line("peak", "backward").predicted == 840
    assert found.line("peak", "attached").predicted == 124
    # Backward is the fullest at 2 and 4 layers, forward at 24: without arithmetic nobody knows.
    assert found.line("peak", HIGHEST).predicted == 840
    assert found.line("peak", HIGHEST).measured == 980
    assert found.line("peak", HIGHEST).error == pytest.approx(840 / 980 - 1)


def test_arithmetic_corrects_what_is_not_straight():
    """The plan has the same kink as the measurement, 70 bytes lower: the forecast is exact."""

    def peaks(depth, phase):
        return max(600 + 10 * depth, 500 + 20 * depth)

    planned = {
        d: dict.fromkeys(("forward", "backward", "optimizer_step", HIGHEST), peaks(d, "") - 70)
        for d in (2, 4, 24)
    }
    found = backend_forecast(PAIR, [repeat_of((2, 4, 24), peaks=peaks)], planned)
    line = found.line("peak", HIGHEST)
    assert (line.predicted, line.measured, line.correction) == (980, 980, 140)
    assert line.fixed + 24 * line.per_layer + line.correction == line.predicted
    # The plan speaks of steps; what is there after the load it does not correct.
    assert found.line("peak", "loaded").correction == 0
    assert not any("straight lines without correction" in note for note in found.notes)


def test_repeats_give_peaks_and_load_an_interval_and_one_repeat_gives_none():
    shaken = [repeat_of((2, 4), index=i, peaks=lambda d, p, i=i: 1000 + (10 + i) * d) for i in range(3)]
    (one, three) = (backend_forecast(PAIR, shaken[:count], None).line("peak", HIGHEST) for count in (1, 3))
    assert (one.low, one.high) == (None, None)
    # Predictions of 1240, 1264 and 1288: 4.303 * 24 / sqrt(3) around the line of the medians.
    assert three.predicted == 1264
    assert three.high - three.predicted == pytest.approx(4.303 * 24 / 3**0.5)
    assert three.predicted - three.low == pytest.approx(three.high - three.predicted)
    assert three.measured is None
    assert three.error is None


def test_no_interval_of_seconds_goes_below_zero():
    shaken = [repeat_of((2, 4), index=i, load_seconds=seconds) for i, seconds in enumerate((0.1, 3.0, 0.2))]
    line = backend_forecast(PAIR, shaken, None).line("load", "load")
    assert line.low == 0
    assert line.high - line.predicted > line.predicted


def test_the_step_line_comes_from_the_turns():
    rounds = [
        {2: 9.9, 4: 9.9, 24: 9.9},
        {2: 0.4, 4: 0.6, 24: 2.7},
        {2: 0.41, 4: 0.61},
        {2: 0.39, 4: 0.59, 24: 2.5},
    ]
    repeat = repeat_of((2, 4, 24))
    repeat = type(repeat)(0, repeat.records, times(rounds, warmup=1))
    found = backend_forecast(PAIR, [repeat], None)
    line = found.line("step", "step")
    assert line.at_slices == (0.4, 0.6)
    assert line.predicted == pytest.approx(2.6)
    assert line.low == pytest.approx(2.59, abs=0.011)
    assert line.high == pytest.approx(2.61, abs=0.011)
    assert line.measured == pytest.approx(2.6)
    assert found.tokens_per_step == 512
    (raw,) = found.step_seconds
    assert (raw.warmup_rounds, raw.seconds[24]) == (1, (9.9, 2.7, None, 2.5))


def test_checks_take_each_set_of_slices_and_each_repeat_by_itself():
    question = Question("bnb-nf4", (2, 4, 8), 24, subsets=((2, 4), (2, 8)))
    kinked = [repeat_of((2, 4, 8, 24), index=i, load_seconds=1.0 + i) for i in range(2)]
    found = backend_forecast(question, kinked, None)
    assert [(check.slices, check.repeat) for check in found.checks] == [
        ((2, 4), 0), ((2, 4), 1), ((2, 8), 0), ((2, 8), 1)]  # fmt: skip
    loads = [next(line for line in check.lines if line.group == "load") for check in found.checks]
    assert [line.measured for line in loads] == [1.0, 2.0, 1.0, 2.0]
    assert all(len(line.at_slices) == 2 for check in found.checks for line in check.lines)


def test_cuda_records_give_lines_of_both_allocator_figures():
    repeats = [repeat_of((2, 4, 24), cuda=True)]
    found = backend_forecast(PAIR, repeats, None)
    assert found.line("peak", "backward").predicted == 1240
    assert found.line("peak", "backward" + RESERVED).predicted == 1340
    assert found.line("peak", HIGHEST + RESERVED).measured == 1340
    assert peak_memory(repeats[0].records.values()) == "peak_allocated_bytes"
    assert peak_memory([slice_record(2)]) == "peak_resident_bytes"
    assert peak_memory([]) is None


# ---- what goes wrong -----------------------------------------------------------------------------


def test_a_slice_that_failed_is_a_message_and_what_it_left_is_kept():
    found = backend_forecast(PAIR, [repeat_of((2, 4), fails_at=4)], None)
    assert found.message == "4 layers, repeat 0: out of memory: not enough memory"
    assert found.failures == (found.message,)
    assert len(found.slice_keys) == 2
    line = found.line("weights", "lora")
    assert (line.at_slices, line.predicted, line.per_layer) == ((10.0, None), None, None)
    text = rendered(made(found))
    assert "did not complete: 4 layers, repeat 0: out of memory" in text
    assert "0.000" not in text


def test_a_repeat_that_failed_leaves_the_others():
    found = backend_forecast(PAIR, [repeat_of((2, 4)), repeat_of((2, 4), index=1, fails_at=2)], None)
    assert found.message is None
    assert found.line("weights", "lora").predicted == 120
    assert found.failures == ("2 layers, repeat 1: out of memory: not enough memory",)


def test_a_full_depth_that_failed_leaves_a_forecast_without_a_measurement():
    repeat = repeat_of((2, 4, 24), fails_at=24)
    repeat = type(repeat)(0, repeat.records, times([{2: 0.4, 4: 0.6}] * 3))
    found = backend_forecast(Question("bnb-nf4", (2, 4), 24, subsets=((2, 4),)), [repeat], None)
    assert (found.message, found.full_key, found.checks) == (None, None, ())
    assert found.line("step", "step").predicted == pytest.approx(2.6)
    assert all(line.measured is None for line in found.lines)
    assert found.failures == ("24 layers, repeat 0: out of memory: not enough memory",)


def test_turns_that_compute_something_else_are_doubted():
    repeat = repeat_of((2, 4))
    first = {depth: record.steps[0].losses[0] for depth, record in repeat.records.items()}
    same = times([{2: 0.4, 4: 0.6}], losses={depth: (loss,) for depth, loss in first.items()})
    other = times([{2: 0.4, 4: 0.6}], losses={2: (first[2],), 4: (first[4] * 1.01,)})
    (no_doubt, doubt) = (
        backend_forecast(PAIR, [type(repeat)(0, repeat.records, t)], None) for t in (same, other)
    )
    assert not any("timed in turns" in note for note in no_doubt.notes)
    assert [note for note in doubt.notes if "timed in turns, 4 layers" in note]


# ---- cards ---------------------------------------------------------------------------------------


def test_planned_peaks_are_those_of_the_plan_without_the_allowance():
    request = asked()
    planned = planned_peaks(request, (2, 80))
    (outlook,) = outlooks([request], [parse_cards("80GB")])
    (card,) = outlook.footprint.cards
    for phase in card.phases:
        if phase.phase != "loaded":
            assert planned[80][phase.phase] == phase.total_bytes - phase.terms["allowance"]
    assert planned[80][HIGHEST] == max(
        planned[80][phase] for phase in ("forward", "backward", "optimizer_step")
    )
    assert planned[2][HIGHEST] < planned[80][HIGHEST]


def test_shapes_that_nobody_knows_are_not_planned():
    request = asked()
    unknown = request.model.model_copy(update={"architecture": {"model_type": "mystery"}})
    assert planned_peaks(request.model_copy(update={"model": unknown}), (2, 4)) is None


def test_without_cuda_the_cards_are_those_of_the_plan():
    cards = [parse_cards("7x24GB"), parse_cards("24GB")]
    found = card_outlooks(asked(), cards, {})
    planned = outlooks([asked()], cards)
    assert [(one.cards, one.fits, one.longest_sequence) for one in found] == [
        (one.cards.label, one.fits, one.longest) for one in planned]  # fmt: skip
    assert found[0].peak_bytes == tuple(card.peak.total_bytes for card in planned[0].footprint.cards)
    assert {one.basis for one in found} == {"arithmetic"}


def test_what_was_measured_above_the_plan_comes_on_top_of_every_card():
    """30 MB a layer and 500 MB besides, measured at 2 and 4 layers: on one card of 80 layers, 2.9 GB more."""
    request, mb = asked(), 10**6
    planned = planned_peaks(request, (2, 4, 80))

    def peaks(depth, phase):
        return planned[depth].get(phase, 0) + 500 * mb + 30 * mb * depth

    question = Question("bnb-nf4", (2, 4), 80)
    repeats = [repeat_of((2, 4), peaks=peaks, cuda=True)]
    lines = {phase: line.at for phase, line in excess(question, repeats, planned).items()}
    assert lines["backward"](80) == 2900 * mb
    one, seven = card_outlooks(request, [parse_cards("80GB"), parse_cards("7x24GB")], lines)
    forecast = backend_forecast(question, repeats, planned)
    # On one card the tensors are the forecast's own peak line.
    tensors = forecast.line("peak", HIGHEST).predicted
    assert tensors == planned[80][HIGHEST] + 2900 * mb
    assert one.peak_bytes == (round(CONTEXT_BYTES + tensors * (1 + ALLOCATOR_SHARE)),)
    assert one.basis == seven.basis == "measured"
    assert len(seven.peak_bytes) == 7
    plain = card_outlooks(request, [parse_cards("80GB"), parse_cards("7x24GB")], {})
    assert all(more > less for more, less in zip(seven.peak_bytes, plain[1].peak_bytes, strict=True))
    assert seven.longest_sequence < plain[1].longest_sequence


def test_a_card_that_no_longer_fits_says_so():
    lines = dict.fromkeys(("forward", "backward", "optimizer_step"), lambda depth: 60 * 2**30)
    (found,) = card_outlooks(asked(), [parse_cards("80GB")], lines)
    assert (found.fits, found.longest_sequence) == (False, None)


def test_the_fullest_phase_decides():
    card = CardNeed(3, (PhaseNeed("forward", {"a": 10, "allowance": 99}), PhaseNeed("backward", {"a": 20})))
    lines = {"forward": lambda depth: 100 * depth, "backward": lambda depth: 0}
    assert measured_need(card, lines) == round(CONTEXT_BYTES + 310 * (1 + ALLOCATOR_SHARE))


# ---- what is refused -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "why"),
    [
        ("4,2", "must rise"),
        ("2,2", "must rise"),
        ("2", "two slices or more"),
        ("0,2", "at least one layer"),
        ("two,4", "not a list"),
        ("", "not a list"),
    ],
)
def test_slices_that_are_none(text, why):
    with pytest.raises(BadValue, match=why) as caught:
        parse_depths(text, "--slices")
    assert "--slices 2,4" in str(caught.value)


def test_pairs_are_among_the_slices():
    assert parse_subsets((), (2, 4, 8), verify=True) == ((2, 4), (2, 8), (4, 8), (2, 4, 8))
    assert parse_subsets((), (2, 4), verify=True) == ((2, 4),)
    assert parse_subsets(("2,8", "2,8"), (2, 4, 8), verify=True) == ((2, 8),)
    assert parse_subsets((), (2, 4), verify=False) == ()
    with pytest.raises(BadValue, match="6 is not among --slices 2,4"):
        parse_subsets(("2,6",), (2, 4), verify=True)
    with pytest.raises(BadValue, match="--verify"):
        parse_subsets(("2,4",), (2, 4), verify=False)


@pytest.fixture
def preset(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setenv("QLORA_BENCH_CACHE", str(tmp_path / "cache"))
    return str(six(tmp_path))


def planned_forecast(preset: str, **changes: Any):
    values = {"slices": "1,2", "verify": False, "rounds": 4, "warmup_rounds": 1}
    return arrange_forecast(Asked(preset=preset, backends=("bf16", "gptq"), repeats=2), **(values | changes))


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"slices": "2,6"}, "6 decoder layers"),
        ({"slices": "2,7"}, "6 decoder layers"),
        ({"rounds": 0}, "--rounds 0"),
        ({"warmup_rounds": -1}, "--warmup-rounds -1"),
    ],
)
def test_what_cannot_be_forecast_is_refused_before_anything_is_written(preset, changes, why):
    with pytest.raises(BadValue, match=why):
        planned_forecast(preset, **changes)


def test_slices_are_ordinary_runs_of_the_same_seeds(preset):
    plan = planned_forecast(preset, verify=True)
    assert plan.backends == ("bf16", "gptq")
    assert plan.repeats == (0, 1)
    assert (plan.full_layers, plan.depths) == (6, (1, 2, 6))
    assert len(plan.by_depth) == 12
    for (_, repeat, depth), request in plan.by_depth.items():
        assert request.model.layers == (None if depth == 6 else depth)
        assert request.model.architecture["num_hidden_layers"] == depth
        assert request.seed == repeat
        assert (request.workload.steps, request.workload.warmup_steps, request.fidelity) == (3, 2, False)
    assert {request.calibration for request in plan.by_depth.values()} == {None, "rtn"}
    assert plan.sweep.store.folder == Path("results/local/forecast-six/slices")


def test_runs_give_memory_back_and_say_so(preset):
    plan = planned_forecast(preset, verify=True)
    for sweep in (plan.sweep, plan.full):
        order = sweep.order(plan.by_depth["bf16", 0, 1])
        assert order.variables == RETURN_MEMORY
        assert RETURN_NOTE in order.note
    on_a_card = plan.by_depth["bf16", 0, 1].model_copy(update={"device": "cuda"})
    assert (plan.sweep.order(on_a_card).variables, plan.sweep.order(on_a_card).note) == ({}, None)


def test_the_whole_model_is_packed_as_its_slices_are(tmp_path, preset):
    """Real weights would be calibrated whole and rounded cut: then nothing would be alike."""
    from tests.checkpoint import make_checkpoint

    folder = make_checkpoint(tmp_path / "real", preset)
    asked_for = Asked(preset=preset, model=str(folder), backends=("gptq",))
    plan = arrange_forecast(asked_for, slices="1,2", verify=True, rounds=4, warmup_rounds=1)
    assert {request.model.weights for request in plan.by_depth.values()} == {"real"}
    assert {request.calibration for request in plan.by_depth.values()} == {"rtn"}


def test_the_command_that_asks_again():
    given = {"slices": "2,4", "cards": ("7x24GB", "80GB"), "rounds": 8, "verify": True, "pairs": (), "preset": "proxy",
             "backends": ("all",), "dtype": None, "settings": ("lora.rank=16",), "timeout_seconds": 60.0, "force": True,
             "download": False}  # fmt: skip
    assert shlex.split(command_line(given)) == [
        "qlora-bench", "forecast", "--slices", "2,4", "--cards", "7x24GB", "--cards", "80GB", "--rounds", "8", "--verify",
        "--preset", "proxy", "--backend", "all", "--set", "lora.rank=16", "--timeout-seconds", "60.0"]  # fmt: skip


def test_the_parents_side_of_a_forecast_never_imports_torch():
    code = "import sys, bench.cli.forecast, bench.run.forecast, bench.run.outlooks, bench.judge.forecast, bench.show.forecast"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print('torch' in sys.modules)"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == "False"


# ---- words and files -----------------------------------------------------------------------------


def test_errors_in_words():
    assert [percent(error) for error in (None, 0, 0.01234, -0.5)] == ["–", "0", "+1.23", "-50.00"]  # noqa: RUF001
    assert percent(math.nan) == "NaN"
    two = backend_forecast(PAIR, [repeat_of((2, 4, 24))], None).lines
    off = [
        line.model_copy(update={"measured": line.predicted * 2}) if line.name == "lora" else line
        for line in two
    ]
    assert weights_error(two) == 0
    assert weights_error(off) == -0.5
    assert weights_error([]) is None


@pytest.mark.parametrize(
    ("asked_for", "said"),
    [
        ({"workload": ""}, "'workload' must be a mapping"),
        ({"lora": [1]}, "'lora' must be a mapping"),
        ({"lora": {"target_modules": 5}}, "'lora.target_modules' must be a list"),
    ],
)
def test_a_forecast_of_another_shape_is_refused_when_it_is_read(tmp_path, asked_for, said):
    path = save_forecast(tmp_path, made())
    path.write_text(json.dumps({**json.loads(path.read_text()), "asked": asked_for}))
    with pytest.raises(BrokenFile, match=said):
        read_forecast(tmp_path)


def test_a_forecast_comes_back_from_its_file(tmp_path):
    rounds = [{2: 0.4, 4: 0.6, 24: 2.6}, {2: 0.4, 4: 0.6}]
    found = backend_forecast(
        Question("bnb-nf4", (2, 4), 24, ((2, 4),)), [repeat_of((2, 4, 24), rounds=rounds)], None
    )
    forecast = made(found)
    save_forecast(tmp_path / "inner", forecast)
    assert read_forecast(tmp_path / "inner") == forecast
    assert forecasts_below(tmp_path)[0].slice_keys == {"bnb-nf4-2-0", "bnb-nf4-4-0"}
    text = rendered(forecast)
    assert "(+0.00 %)" in text or "(0 %)" in text
    assert "on the CPU" in text


# ---- the command, for real -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def forecast(command: Command, tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path, Any]:
    """Two backends at 1 and 2 of six layers, and at all six: the command, its folder and its document."""
    folder = tmp_path_factory.mktemp("forecast")
    arguments = [
        "forecast", "--preset", str(six(folder)), "--backend", "bf16", "--backend", "bnb-nf4", "--slices", "1,2",
        "--verify", "--rounds", "4", "--cards", "7x24GB", "--set", "cpu_threads=1", "--out", str(folder / "out"),
    ]  # fmt: skip
    return arguments, folder / "out", command.json(*arguments)


def test_a_real_forecast_is_exact_in_bytes_and_has_every_line(forecast):
    _, folder, body = forecast
    found = Forecast.model_validate(body)
    assert found == read_forecast(folder)
    assert (found.full_layers, found.peak_memory, found.weights) == (6, "peak_resident_bytes", "synthetic")
    for backend in found.backends:
        assert (backend.message, backend.failures) == (None, ())
        kinds = [line for line in backend.lines if line.group == "weights"]
        assert len(kinds) == 6
        for line in kinds:
            assert line.predicted == line.measured
            assert line.predicted.is_integer()
        for group, name in (("peak", HIGHEST), ("peak", "backward"), ("load", "load"), ("step", "step")):
            line = backend.line(group, name)
            assert line.predicted > 0 or group == "load"
            assert line.measured > 0
            assert line.error is not None
        # An interpreter with torch in it dwarfs six layers of 64: within 5 % is what is left to check here.
        assert abs(backend.line("peak", HIGHEST).error) < 0.05
        assert backend.line("step", "step").low <= backend.line("step", "step").high
        assert [check.slices for check in backend.checks] == [(1, 2)]
        assert [len(values) for values in backend.step_seconds[0].seconds.values()] == [6, 6, 6]
        assert [outlook.basis for outlook in backend.outlooks] == ["arithmetic"]
        assert RETURN_NOTE in backend.notes[0]
        # The turns computed what the runs did.
        assert not any("timed in turns" in note for note in backend.notes)


def test_slices_stand_in_the_forecast_and_the_full_depth_in_the_comparison(forecast, command):
    _, folder, body = forecast
    found = Forecast.model_validate(body)
    assert len(list((folder / "slices").glob("*.record.json"))) == 4
    assert len(list((folder / "slices").glob("*.depths.json"))) == 2
    assert {path.name for path in folder.glob("*.record.json")} == {
        f"{backend.full_key}.record.json" for backend in found.backends}  # fmt: skip
    listed = (folder / "report.csv").read_text()
    assert all(backend.full_key in listed for backend in found.backends)
    assert not any(key in listed for key in found.slice_keys)
    # Where there is nothing else, slices are shown all the same.
    command.run("report", folder / "slices")
    assert all(key in (folder / "slices" / "report.csv").read_text() for key in found.slice_keys)


def test_the_same_command_measures_nothing_again_and_says_the_same(forecast, command):
    arguments, folder, body = forecast
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*.*.json")}
    done = command.run(*arguments)
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("recorded already") == 8
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*.*.json")} == before
    again = json.loads((folder / "forecast.json").read_text())
    assert again["backends"] == body["backends"]
    assert "95 %" in done.stdout
    assert "On 7x24GB" in done.stdout
    assert "measured" in done.stdout


def test_the_recorded_command_asks_for_the_same(forecast, command):
    _, _, body = forecast
    program, *arguments = shlex.split(body["command"])
    assert program == "qlora-bench"
    assert command.run(*arguments).stdout.count("recorded already") == 8


def test_a_backend_that_fails_is_a_row_and_the_others_go_on(command_with_strangers, tmp_path):
    arguments = ["forecast", "--preset", six(tmp_path), "--backend", "bad-out-of-memory", "--backend", "bad-library",
                 "--slices", "1,2", "--rounds", "1", "--set", "cpu_threads=1", "--out", tmp_path / "out"]  # fmt: skip
    done = command_with_strangers.run(*arguments)
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    first, second = read_forecast(tmp_path / "out").backends
    assert first.message.startswith("1 layer, repeat 0: out of memory: OutOfMemoryError")
    assert "surely_not_installed" in second.message
    assert "did not complete: 1 layer" in done.stdout


def test_bad_requests_are_one_line(command, tmp_path):
    line = command.refused(
        "forecast", "--preset", six(tmp_path), "--slices", "2,9", "--out", tmp_path / "out"
    )
    assert line.startswith("qlora-bench: --slices 2,9: the model has 6 decoder layers")
    assert not (tmp_path / "out").exists()
    assert "--cards" in command.refused("forecast", "--preset", six(tmp_path), "--cards", "lots")


def test_the_presets_of_the_issue_can_be_asked_about():
    assert load_preset("proxy").architecture["num_hidden_layers"] == 24
    assert load_preset("qwen2-72b").architecture["num_hidden_layers"] == 80
