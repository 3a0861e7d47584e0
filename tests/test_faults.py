"""The fault matrix, planted row by row (``tests/fault_matrix.py``), and its document."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from bench.run.events import MOST_LINE_BYTES, Lines
from tests import fault_scenes, fault_scenes_hands, fault_scenes_models
from tests.command import Command
from tests.fault_matrix import DOCUMENT, LIBRARY, MATRIX, Fault, document, in_a_sweep, scenes
from tests.fault_place import SCENES, Found, Place
from tests.fault_site import install_faults, spoil_library
from tests.misbehaving import install

assert fault_scenes and fault_scenes_hands and fault_scenes_models  # which enter their scenes when imported
SOAK_MOMENTS = 200
LIMITED_SECONDS = 4
HUB_LINES = ("hub: hangs in a file",)
"""Where the Hub's own library has said something before."""
SPOILT = {
    "hqq": "raise RuntimeError('compiled for another CUDA')",
    "bitsandbytes": "raise ImportError('libbitsandbytes.so: undefined symbol: cquantize')",
    "gptqmodel": "import ctypes\nctypes.string_at(0)",
}


def names(faults: list[Fault]) -> list[str]:
    return [fault.name for fault in faults]


def by_name(name: str) -> Fault:
    return next(fault for fault in MATRIX if fault.name == name)


@pytest.fixture(scope="module")
def breaking(command: Command, tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The real command, where third parties have installed backends that break."""
    site = tmp_path_factory.mktemp("faults")
    install_faults(site)
    install(site)
    return Command(command.cache, site)


def swept(place: Place, faults: list[Fault], *flags: str) -> Found:
    """One sweep over the backends of ``faults``, with a healthy one at its end where none is limited."""
    found = place.simple(*(str(fault.backend) for fault in faults), flags=("--quiet", *flags), timeout=580)
    assert len(found.records) == len(faults)
    return found


def held(fault: Fault, found: Found, *, alone: bool = True) -> None:
    """What was found is what stands in the fault's row."""
    assert "Traceback" not in found.errors
    if alone:
        assert found.code == fault.exit_code, found.errors
    if fault.status is None:
        if fault.exit_code == 2:
            assert not found.records
            lines = found.errors.strip().splitlines()
            assert len(lines) == 1 or fault.name in HUB_LINES, lines
            assert lines[-1].startswith("qlora-bench: ")
            for words in fault.says:
                assert words in lines[-1]
        return
    body = found.of(fault.backend) if fault.backend else found.main
    message = body["message"] or ""
    assert (body["status"], body["stage"]) == (fault.status, fault.stage), message
    assert "\n" not in message
    for words in fault.says:
        assert words in message
    if fault.worker_exit is not None:
        assert body["exit_code"] == fault.worker_exit
    if fault.status == "completed":
        assert len(body["steps"]) == body["request"]["workload"]["steps"]


# ---- in make test


@pytest.fixture(scope="module")
def quick_sweep(breaking: Command, tmp_path_factory: pytest.TempPathFactory) -> Found:
    return swept(Place(breaking, tmp_path_factory.mktemp("quick")), in_a_sweep(quick=True))


@pytest.mark.parametrize("name", names(in_a_sweep(quick=True)))
def test_a_worker_that_breaks_leaves_its_record(quick_sweep: Found, name: str) -> None:
    held(by_name(name), quick_sweep)


def test_what_was_told_before_stays_in_the_record(quick_sweep: Found) -> None:
    body = quick_sweep.of("early-alien-section")
    assert (body["load"], body["trainable_weights_finite"]) == (None, True)


def test_a_worker_does_not_say_whose_record_it_is(quick_sweep: Found) -> None:
    body = quick_sweep.of("early-lies-about-itself")
    assert body["key"].startswith("early-lies-about-itself-")
    assert body["request"]["backend"] == "early-lies-about-itself"


@pytest.mark.parametrize("name", names(scenes(quick=True)))
def test_a_scene(breaking: Command, tmp_path: Path, name: str) -> None:
    held(by_name(name), SCENES[name](Place(breaking, tmp_path)))


def test_every_row_is_planted_once_and_every_scene_has_a_row() -> None:
    assert len({fault.name for fault in MATRIX}) == len(MATRIX) >= 30
    assert {fault.name for fault in MATRIX if fault.backend is None} == set(SCENES)


def test_the_document_is_the_matrix() -> None:
    assert DOCUMENT.read_text(encoding="utf-8") == "\n".join(document()) + "\n"


def test_lines_are_cut_however_they_come() -> None:
    lines = Lines()
    assert [lines.take(chunk) for chunk in (b"a\nb", b"c", b"\n\nd\n", b"e")] == [[b"a"], [], [b"bc", b"", b"d"], []]


def test_a_line_longer_than_any_event_is_passed_over_and_not_kept() -> None:
    lines = Lines()
    piece = bytes(2**20)
    for _ in range(MOST_LINE_BYTES // len(piece) + 1):
        assert lines.take(piece) == []
    assert lines._pieces == []
    assert lines.take(b"end\nnext\n") == [b"next"]


# ---- in make soak: everything


@pytest.fixture(scope="module")
def soak_sweep(breaking: Command, tmp_path_factory: pytest.TempPathFactory) -> Found:
    faults = [f for f in in_a_sweep(quick=False) if f.family != LIBRARY and f.status != "timeout"]
    return swept(Place(breaking, tmp_path_factory.mktemp("soak")), faults)


@pytest.fixture(scope="module")
def limited_sweep(breaking: Command, tmp_path_factory: pytest.TempPathFactory) -> Found:
    faults = [f for f in in_a_sweep(quick=False) if f.status == "timeout"]
    place = Place(breaking, tmp_path_factory.mktemp("limited"))
    return swept(place, faults, "--timeout-seconds", str(LIMITED_SECONDS))


@pytest.fixture(scope="module")
def library_sweep(breaking: Command, tmp_path_factory: pytest.TempPathFactory) -> Found:
    folder = tmp_path_factory.mktemp("libraries")
    for name, code in SPOILT.items():
        spoil_library(folder / "site", name, code)
    path = f"{folder / 'site'}{os.pathsep}{breaking.environment['PYTHONPATH']}"
    place = Place(breaking, folder, environment={"PYTHONPATH": path})
    return swept(place, [f for f in in_a_sweep(quick=False) if f.family == LIBRARY], "--calibration", "rtn")


@pytest.mark.soak
@pytest.mark.parametrize("name", names(in_a_sweep(quick=False)))
def test_every_backend_that_breaks(request: pytest.FixtureRequest, name: str) -> None:
    fault = by_name(name)
    kind = "limited" if fault.status == "timeout" else "library" if fault.family == LIBRARY else "soak"
    held(fault, request.getfixturevalue(f"{kind}_sweep"))


@pytest.mark.soak
def test_a_child_that_a_worker_leaves_behind_is_not_waited_for(soak_sweep: Found) -> None:
    assert soak_sweep.of("early-leaves-a-child")["wall_seconds"] < 20


@pytest.mark.soak
def test_a_worker_that_does_not_listen_costs_its_grace_and_no_more(limited_sweep: Found) -> None:
    for body in limited_sweep.records:
        assert LIMITED_SECONDS <= body["wall_seconds"] < LIMITED_SECONDS + 15


@pytest.mark.soak
@pytest.mark.parametrize("name", sorted(SCENES))
def test_every_scene(breaking: Command, tmp_path: Path, name: str) -> None:
    held(by_name(name), SCENES[name](Place(breaking, tmp_path, moments=SOAK_MOMENTS)))


@pytest.mark.soak
def test_the_runs_beside_a_fault_complete(breaking: Command, tmp_path: Path) -> None:
    """Healthy backends between broken ones, in one sweep."""
    order = ("early-killed", "bf16", "late-backward-memory", "late-sound", "early-claims-complete", "eetq")
    found = Place(breaking, tmp_path).simple(*order)
    assert [found.of(name)["status"] for name in order] == [
        "crashed", "completed", "out_of_memory", "completed", "crashed", "completed"]  # fmt: skip
    assert found.of("late-sound")["load"]["weights_digest"] == found.of("bf16")["load"]["weights_digest"]
