"""Which card is which, and what NVML says of each: CUDA's order is not NVML's."""

from __future__ import annotations

import sys
from types import SimpleNamespace

import pytest
import torch

from bench.probe import environment
from bench.probe.cards import Nvml, reasons_in_words
from bench.probe.machine import cuda_devices, visible_cards
from tests.fake_nvml import GIB, FakeCard, FakeNvml

A, B, C = "GPU-aaaa1111", "GPU-aaab2222", "GPU-cccc3333"


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    cuda_devices.cache_clear()


@pytest.fixture(autouse=True)
def afterwards() -> object:
    yield
    cuda_devices.cache_clear()


def install(monkeypatch: pytest.MonkeyPatch, *cards: FakeCard, **changes: object) -> FakeNvml:
    nvml = FakeNvml(cards, **changes)
    monkeypatch.setitem(sys.modules, "pynvml", nvml)
    return nvml


@pytest.mark.parametrize(
    ("setting", "visible"),
    [
        (None, [A, B, C]),
        ("", []),
        ("-1", []),
        ("1,0", [B, A]),
        ("2", [C]),
        (" 2 , 0 ", [C, A]),
        ("0,-1,1", [A]),
        ("0,7,1", [A]),
        ("0,nonsense,1", [A]),
        ("nonsense", []),
        ("1gpu,0", [B, A]),
        ("0,0", []),
        (f"{C},{A}", [C, A]),
        ("GPU-c,GPU-aaab", [C, B]),
        ("GPU-aaa", []),
        ("GPU-c,GPU-zzz,GPU-aaab", [C]),
        ("GPU-c,0", [C]),
        ("0,GPU-c", [A]),
        ("MIG-1234,MIG-5678", ["MIG-1234", "MIG-5678"]),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(setting: str | None, visible: list[str]) -> None:
    assert visible_cards(setting, [A, B, C]) == visible


@pytest.mark.parametrize(
    "setting", [None, "", "-1", "1,0", "2", "0,7,1", "0,0", "1gpu,0", "GPU-c,GPU-aaab", "GPU-aaa", "GPU-c,0"]
)
def test_torch_reads_it_the_same_way(setting: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """torch's own reader, given the same cards."""
    if setting is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", setting)
    uuids = [A, B, C]
    found = torch.cuda._parse_visible_devices()  # type: ignore[attr-defined]
    if found and isinstance(found[0], str):
        found = torch.cuda._transform_uuid_to_ordinals(found, uuids)  # type: ignore[attr-defined]
    beyond = next((place for place, index in enumerate(found) if index >= len(uuids)), len(found))
    assert [uuids[index] for index in found[:beyond]] == visible_cards(setting, uuids)


def test_the_parent_sees_cards_in_torchs_order_and_no_hidden_one(monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        monkeypatch,
        FakeCard(A, name="first"),
        FakeCard(B, name="second", total_bytes=48 * GIB, power_watts=280),
    )
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    assert [(d.device, d.name) for d in cuda_devices()] == [("cuda:0", "second"), ("cuda:1", "first")]
    cuda_devices.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    (only,) = cuda_devices()
    assert (only.device, only.name, only.total_memory_bytes, only.power_limit_watts, only.compute_capability) == (
        "cuda:0", "second", 48 * GIB, 280, "8.6")  # fmt: skip
    cuda_devices.cache_clear()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1234")
    (slice_,) = cuda_devices()
    assert (slice_.device, slice_.name, slice_.total_memory_bytes) == ("cuda:0", "MIG-1234", None)


def test_no_driver_is_no_card(monkeypatch: pytest.MonkeyPatch) -> None:
    install(monkeypatch, driver=False)
    assert cuda_devices() == ()
    with Nvml() as nvml:
        assert nvml.uuids == ()
        assert nvml.findings(A, "cuda:0") is None
        assert nvml.state(A) is None
        assert nvml.link(A, B).words is None


def test_the_environment_names_the_card_that_torch_uses(monkeypatch: pytest.MonkeyPatch) -> None:
    """Hidden: only the second card is visible, so torch's first is NVML's second."""
    install(monkeypatch, FakeCard(A, name="first"), FakeCard(B, name="second"))
    described = SimpleNamespace(
        uuid=B.removeprefix("GPU-"), name="as torch says", total_memory=7, major=9, minor=0
    )
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: described)
    card = environment.card_of(torch.device("cuda", 0))
    assert (card.device, card.name) == ("cuda:0", "second")
    described.uuid = "unknown"
    card = environment.card_of(torch.device("cuda", 0))
    assert (card.name, card.total_memory_bytes, card.compute_capability) == ("as torch says", 7, "9.0")


def test_what_the_driver_tells_and_what_it_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    install(
        monkeypatch,
        FakeCard(A, power_watts=280, used_bytes=5 * GIB, reasons=0x4 | 0x20, processes=[(4711, 3 * GIB), (4712, 0), (4713, None)],
                 process_names={4711: "/usr/bin/python3"}),
        FakeCard(B, processes=None, power_watts=None),
    )  # fmt: skip
    with Nvml() as nvml:
        assert nvml.driver == "580.142"
        one, other = nvml.findings(A, "cuda:1"), nvml.findings(B, "cuda:0")
    assert one is not None and other is not None
    assert (one.device, one.nvml_index, one.uuid, other.nvml_index) == ("cuda:1", 0, A, 1)
    assert (one.total_bytes, one.used_bytes) == (24 * GIB, 5 * GIB), "without the driver's own share"
    assert one.processes is not None
    assert [(p.pid, p.used_bytes, p.name) for p in one.processes] == [
        (4711, 3 * GIB, "/usr/bin/python3"), (4712, None, None), (4713, None, None)]  # fmt: skip
    assert (one.power_limit_watts, one.default_power_limit_watts) == (280, 350)
    assert one.idle.throttle_reasons == ("power limit", "temperature (software)")
    assert (one.idle.pcie_generation, one.pcie_max_width) == (4, 16)
    # Not told is null, and neither zero nor an empty list.
    assert (other.processes, other.power_limit_watts, other.idle.temperature_celsius, other.ecc) == (
        None,
    ) * 4
    assert one.max_power_limit_watts is None
    assert one.uncorrected_ecc_errors is None


@pytest.mark.parametrize(
    ("ends", "other_ends", "nvlinks", "words"),
    [
        ((), (), 0, "PCIe, through one host bridge"),
        (["00000000:02:00.0"] * 4, ["00000000:01:00.0"] * 4, 4, "NVLink, 4 connections"),
        (["00000000:03:00.0"], (), 0, "PCIe, through one host bridge"),
        (["switch"] * 18, ["switch"] * 12, 12, "NVLink through NVSwitch, 12 connections"),
    ],
)
def test_the_link_between_two_cards(
    ends: list[str], other_ends: list[str], nvlinks: int, words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    install(
        monkeypatch,
        FakeCard(A, bus_id="00000000:01:00.0", nvlinks=ends),
        FakeCard(B, bus_id="00000000:02:00.0", nvlinks=other_ends),
    )
    with Nvml() as nvml:
        link = nvml.link(A, B)
    assert (link.nvlinks, link.words) == (nvlinks, words)


def test_a_reason_that_is_not_known_keeps_its_number() -> None:
    assert reasons_in_words(0) == ()
    assert reasons_in_words(0x80 | 0x1000) == ("power brake (hardware)", "reason 0x1000")
