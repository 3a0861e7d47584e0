"""What fits where, and ``qlora-bench plan``."""

import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from bench.ask.cards import GIB, Cards, parse_cards
from bench.ask.experiment import Workload
from bench.ask.footprint import PHASES, TERMS, TIGHT_SHARE, CardNeed, Footprint, Outlook, PhaseNeed
from bench.ask.preset import load_preset
from bench.ask.versions import CURRENT
from bench.cli.plan import plan as command
from bench.errors import BadValue, UserError
from bench.load.fit import LENGTH_STEP, assumptions, outlooks
from bench.load.registry import find_backends
from bench.show.footprint import plan_document, plan_table
from tests.footprint_factory import asked, planned

ROOT = Path(__file__).resolve().parents[1]
PRESETS = ("tiny", "proxy", "smollm2-135m", "qwen2-7b", "qwen2-72b")
IDS = [name for name, entry in find_backends().items() if CURRENT in entry.backend.environments]


# ---- outlooks ------------------------------------------------------------------------------------


@pytest.mark.parametrize("label", ["7x24GB", "1x80GB", "2x24GB", "1x24GB"])
@pytest.mark.parametrize("backend", ["bf16", "bnb-nf4", "gptq", "eetq"])
def test_the_longest_sequence_fits_and_the_next_does_not(backend, label):
    made, cards = asked(backend), parse_cards(label)
    (outlook,) = outlooks([made], [cards])

    def peak(length):
        return planned(made.model_copy(update={"workload": Workload(sequence_length=length)})).split(
            cards.count
        )

    assert outlook.fits is (peak(512).peak_bytes <= cards.capacity_bytes)
    if outlook.longest is not None:
        assert peak(outlook.longest).peak_bytes <= cards.capacity_bytes
    if not outlook.longest_is_limit:
        assert peak((outlook.longest or 0) + LENGTH_STEP).peak_bytes > cards.capacity_bytes


def test_72b_fits_in_four_bits_where_people_run_it_and_not_elsewhere():
    cards = [parse_cards(text) for text in ("24GB", "2x24GB", "3x24GB", "80GB")]
    (one, two, three, big) = outlooks([asked("bnb-nf4")], cards)
    assert (one.fits, one.longest) == (False, None)
    assert two.longest is not None
    assert two.longest < 2048
    assert three.fits
    assert big.fits
    assert not outlooks([asked("bf16")], cards[3:])[0].fits


def test_a_small_model_is_searched_up_to_its_own_limit():
    (outlook,) = outlooks([asked(preset="proxy")], [parse_cards("8x141GB")])
    assert (outlook.longest, outlook.longest_is_limit) == (32768, True)


def test_what_a_backend_changes_stands_beside_its_numbers():
    (awq,) = outlooks([asked("awq", preset="smollm2-135m")], [parse_cards("24GB")])
    assert awq.dtype == "float16"
    assert len(awq.notes) == 2
    assert any("group size 64 instead of 128" in note for note in awq.notes)


def test_a_backend_that_cannot_train_the_model_says_why():
    made = asked("gptq", preset="tiny")
    odd = dict(made.model.architecture) | {"intermediate_size": 388}
    made = made.model_copy(update={"model": made.model.model_copy(update={"architecture": odd})})
    (outlook,) = outlooks([made], [parse_cards("24GB")])
    assert (outlook.fits, outlook.longest, outlook.footprint, outlook.tight) == (None, None, None, None)
    assert "8 to a word" in outlook.reason


def outlook_with(peak, capacity):
    need = Footprint((CardNeed(1, (PhaseNeed("backward", {"logits": peak}),)),))
    return Outlook("x", Cards(1, "1x1GB", capacity), "float16", 64, need, 64)


def test_tight_is_a_fit_that_fragmentation_could_undo():
    peak = 1000
    edge = peak + int(TIGHT_SHARE * peak)
    assert [outlook_with(peak, size).fits for size in (peak - 1, peak, edge)] == [False, True, True]
    assert [outlook_with(peak, size).tight for size in (peak - 1, peak, edge - 1, edge)] == [
        False,
        True,
        True,
        False,
    ]
    assert outlook_with(peak, peak - 1).spare_bytes == -1


def test_80_layers_of_every_backend_are_planned_in_two_seconds():
    began = time.process_time()
    found = outlooks([asked(name) for name in IDS], [parse_cards("7x24GB")])
    assert time.process_time() - began < 2
    assert len(found) == len(IDS)


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture
def plan(tmp_path, monkeypatch):
    """``qlora-bench plan`` on a disk with nothing on it."""
    monkeypatch.setenv("QLORA_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("COLUMNS", "160")

    def run(*arguments):
        done = CliRunner().invoke(command, list(arguments), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return done.stdout

    return run


@pytest.mark.parametrize("preset", PRESETS)
def test_every_preset_can_be_planned(plan, preset):
    document = json.loads(plan("--preset", preset, "--cards", "80GB", "--json"))
    assert [entry["backend"] for entry in document["plans"]] == IDS


def test_the_document_holds_every_card_phase_and_term(plan):
    document = json.loads(plan("--preset", "qwen2-72b", "--cards", "7x24GB", "--backend", "gptq", "--json"))
    (entry,) = document["plans"]
    assert (entry["cards"], entry["card_count"], entry["sequence_length"]) == ("7x24GB", 7, 512)
    assert entry["fits"] is True
    assert len(entry["on_cards"]) == 7
    assert sum(card["decoder_layers"] for card in entry["on_cards"]) == 80
    for card in entry["on_cards"]:
        assert list(card["phases"]) == list(PHASES)
        for phase in card["phases"].values():
            assert phase["total_bytes"] == sum(phase["terms"].values())
            assert phase["terms"][phase["largest_term"]] == max(phase["terms"].values())
    peaks = [max(p["total_bytes"] for p in card["phases"].values()) for card in entry["on_cards"]]
    assert entry["peak_bytes"] == max(peaks) == peaks[entry["fullest_card"]]
    assert entry["spare_bytes"] == entry["card_capacity_bytes"] - entry["peak_bytes"]
    assert set(document["terms"]) == set(TERMS)
    assert (document["asked"]["model"], document["asked"]["decoder_layers"]) == (
        "Qwen/Qwen2-72B-Instruct",
        80,
    )
    assert document["asked"]["lora"]["rank"] == 8
    assert any("nothing was loaded" in line for line in document["assumptions"])


def test_the_table_says_what_fits_what_dominates_and_what_is_assumed(plan):
    text = plan("--preset", "qwen2-72b", "--cards", "7x24GB", "--cards", "24GB", "--backend", "bnb-nf4,eetq")
    assert "1 x 512 tokens, LoRA rank 8" in text
    assert text.count("7x24GB, 23.5 GiB each") == text.count("1x24GB, 23.5 GiB each") == 1
    lines = [line.split() for line in text.splitlines() if line.startswith("bnb-nf4 ")]
    assert len(lines) == 4
    assert "yes" in lines[0]
    assert "packed weights, 76 %" in " ".join(lines[0])
    assert "no" in lines[2]
    assert "none" in lines[2]
    assert "Computed, not measured" in text
    assert "0.73 GiB for the CUDA context" in text
    assert "published checkpoint" not in text


def test_settings_of_run_are_taken(plan):
    def terms(*settings):
        flags = [part for setting in settings for part in ("--set", setting)]
        document = plan("--preset", "qwen2-72b", "--cards", "80GB", "--backend", "hqq", *flags, "--json")
        return json.loads(document)["plans"][0]["on_cards"][0]["phases"]["optimizer_step"]["terms"]

    plain = terms()
    assert terms("lora.rank=16")["lora"] == 2 * plain["lora"]
    assert terms("hqq.group_size=128")["quantized_weights"] < plain["quantized_weights"]
    assert terms('lora.target_modules=["q_proj"]')["optimizer_state"] < plain["optimizer_state"]


def test_layers_and_dtype_are_taken(plan):
    document = json.loads(
        plan("--preset", "qwen2-72b", "--cards", "80GB", "--backend", "bf16", "--layers", "2", "--dtype", "float32", "--json")
    )  # fmt: skip
    (entry,) = document["plans"]
    loaded = entry["on_cards"][0]["phases"]["loaded"]["terms"]
    assert loaded["quantized_weights"] == 2 * 877_658_112 * 4
    assert entry["dtype"] == "float32"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--cards", "seven"], "--cards 7x24GB"),
        (["--cards", "24GB", "--backend", "hqqq"], "did you mean 'hqq'"),
        (["--cards", "24GB", "--preset", "qwen2-27b"], "did you mean 'qwen2-7"),
        (["--cards", "24GB", "--set", "lora.rnk=4"], "did you mean 'lora.rank'"),
        (["--cards", "24GB", "--set", "device=cpu"], "always for CUDA cards"),
        (["--cards", "24GB", "--layers", "81"], "80 decoder layers"),
        (["--cards", "24GB", "--model", "no/such-model"], "not on this disk"),
    ],
)
def test_what_cannot_be_planned_is_refused_in_one_line(plan, arguments, words):
    with pytest.raises(UserError) as refusal:
        plan("--preset", "qwen2-72b", *arguments)
    assert words in str(refusal.value)
    assert "\n" not in str(refusal.value)


def test_without_cards_named_those_of_the_machine_are_taken(plan, monkeypatch):
    from bench.probe import machine
    from bench.record.environment import Device

    monkeypatch.setattr(machine, "cuda_devices", tuple)
    with pytest.raises(BadValue, match="no CUDA card was found here"):
        plan("--preset", "tiny")
    card = Device(device="cuda:0", name="a card", total_memory_bytes=24 * GIB)
    monkeypatch.setattr(machine, "cuda_devices", lambda: (card, card))
    assert "2x24.0GiB" in plan("--preset", "tiny", "--backend", "bf16")


def test_a_folder_with_a_configuration_is_enough(plan, tmp_path):
    folder = tmp_path / "model"
    folder.mkdir()
    (folder / "config.json").write_text(
        json.dumps(dict(load_preset("tiny").architecture) | {"model_type": "llama"})
    )
    document = json.loads(plan("--model", str(folder), "--cards", "24GB", "--backend", "bf16", "--json"))
    assert document["plans"][0]["fits"] is True


def test_a_model_of_unknown_shape_is_refused(plan, tmp_path):
    (tmp_path / "config.json").write_text(
        json.dumps(dict(load_preset("tiny").architecture) | {"model_type": "mamba"})
    )
    with pytest.raises(UserError, match="the shapes of model type 'mamba' are not known"):
        plan("--model", str(tmp_path), "--cards", "24GB")


def test_planning_imports_neither_torch_nor_a_quantization_library():
    code = (
        "import sys\nfrom bench.cli.plan import plan\n"
        "plan(['--preset', 'qwen2-72b', '--cards', '7x24GB', '--json'], standalone_mode=False)\n"
        "print(sorted({'torch', 'transformers', 'peft', 'bitsandbytes', 'hqq', 'gptqmodel'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip().endswith("[]")


def test_values_with_markup_are_shown_as_they_are():
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    outlook = Outlook("[red]x[/red]", Cards(1, "1x1GB", GIB), "float16", 64, reason="[bold]no[/bold]")
    console.print(plan_table([outlook], []))
    text = console.export_text()
    assert "[red]x[/red]" in text
    assert "not possible: [bold]no[/bold]" in text
    assert plan_document([outlook], [], {})["plans"][0]["on_cards"] is None


def test_assumptions_name_padding_only_where_checkpoints_are_packed():
    assert any("pad its layers" in line for line in assumptions([asked("gptq")]))
    assert not any("pad its layers" in line for line in assumptions([asked("hqq")]))
