from dataclasses import dataclass
from pathlib import Path

import pytest

from bench.ask.models import ResolvedModel
from bench.ask.packing import MANIFEST, Manifest, decide_calibration, packed_folder, read_manifest
from tests.record_factory import request


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("QLORA_BENCH_CACHE", str(tmp_path))
    return tmp_path


@dataclass(frozen=True)
class Found:
    folder: Path
    calibration: str
    note: str | None


def packed(method="auto", backend="gptq", folder="real", layers=None, architecture=None, **changes):
    asked = request(backend, weights="real" if folder else "synthetic", **changes)
    model = asked.model.model_copy(
        update={"layers": layers, "architecture": architecture or asked.model.architecture}
    )
    calibration, note = decide_calibration(model, method)
    asked = asked.model_copy(update={"model": model, "calibration": calibration})
    return Found(packed_folder(asked, ResolvedModel(model, folder)), calibration, note)


def test_real_weights_are_calibrated(cache):
    found = packed(folder=cache)
    assert (found.calibration, found.note) == ("calibrated", None)


def test_synthetic_weights_are_rounded():
    assert packed(folder=None).calibration == "rtn"


def test_synthetic_weights_of_a_card_are_another_checkpoint_and_real_ones_are_not(cache):
    assert packed(folder=None, device="cuda").folder != packed(folder=None, device="cpu").folder
    assert packed("rtn", folder=cache, device="cuda").folder == packed("rtn", folder=cache, device="cpu").folder


def test_synthetic_weights_are_rounded_even_where_calibration_was_asked():
    found = packed("calibrated", folder=None)
    assert found.calibration == "rtn"
    assert "synthetic" in found.note


def test_real_weights_are_rounded_where_that_was_asked(cache):
    found = packed("rtn", folder=cache)
    assert (found.calibration, found.note) == ("rtn", None)


@pytest.mark.parametrize("method", ["auto", "calibrated"])
def test_a_cut_model_is_rounded_and_says_so(cache, method):
    found = packed(method, folder=cache, layers=1)
    assert found.calibration == "rtn"
    assert "--layers" in found.note


def test_a_cut_model_that_was_to_be_rounded_needs_no_note(cache):
    assert packed("rtn", folder=cache, layers=1).note is None


def test_a_published_checkpoint_is_read_as_it_is(cache):
    found = packed(folder=cache, architecture={"quantization_config": {"bits": 4}})
    assert (found.folder, found.calibration) == (cache, "published")


def test_the_kernel_does_not_change_which_checkpoint_is_read():
    assert (
        packed(folder=None, options={"group_size": 64, "kernel": "a"}).folder
        == packed(folder=None, options={"group_size": 64, "kernel": "b"}).folder
    )


@pytest.mark.parametrize(
    "changes",
    [
        {"backend": "awq"},
        {"method": "rtn"},
        {"options": {"group_size": 32}},
        {"architecture": {"model_type": "llama"}},
        {"versions": {"gptqmodel": "8"}},
    ],
)
def test_what_changes_the_values_changes_the_folder(cache, changes):
    assert packed(folder=cache, **changes).folder != packed(folder=cache).folder


def test_another_seed_reads_the_same_checkpoint(cache):
    assert packed(folder=cache, seed=9).folder == packed(folder=cache).folder


def test_rounding_does_not_depend_on_the_library(cache):
    first, second = (packed("rtn", folder=cache, versions={"gptqmodel": v}) for v in ("7", "8"))
    assert first.folder == second.folder


def test_a_folder_without_its_manifest_is_not_finished():
    folder = packed(folder=None).folder
    folder.mkdir(parents=True)
    assert read_manifest(folder) is None
    (folder / MANIFEST).write_text("{}")
    assert read_manifest(folder) is None
    (folder / MANIFEST).write_text(Manifest(calibration="rtn", samples=0, seconds=1.0).model_dump_json())
    assert read_manifest(folder).calibration == "rtn"
