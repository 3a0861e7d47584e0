"""--placement auto: one card where all fit on it, else layers split over all cards."""

from __future__ import annotations

import pytest

from bench.ask.plan import RunRequest
from bench.record.environment import Device
from bench.run.arrange import arrange
from bench.run.asked import Asked
from bench.run.placing import settle
from tests.footprint_factory import asked

GIB = 2**30


def cards(count: int, gib: float) -> list[Device]:
    return [Device(device=f"cuda:{i}", name="card", total_memory_bytes=int(gib * GIB)) for i in range(count)]


def on_cuda(*backends: str, preset: str = "qwen2-72b") -> list[RunRequest]:
    return [asked(backend, preset, device="cuda") for backend in backends]


def test_seven_cards_of_24_gb_share_the_layers_of_72b() -> None:
    placed, why = settle(on_cuda("bnb-nf4", "bf16"), cards(7, 24))
    assert [(request.placement, request.device_count) for request in placed] == [("split", 7)] * 2
    # The backend that needs least is named: what others need is not why one card is not enough.
    assert why.startswith(", split over 7 cards (bnb-nf4 needs ")


def test_one_backend_that_needs_more_spreads_them_all() -> None:
    """Figures of a split and of a whole model are not alike."""
    alone, _ = settle(on_cuda("bnb-nf4"), cards(2, 80))
    assert [request.placement for request in alone] == ["single"]
    both, _ = settle(on_cuda("bnb-nf4", "bf16"), cards(2, 80))
    assert [request.placement for request in both] == ["split", "split"]


@pytest.mark.parametrize(("count", "expected"), [(None, ("split", 7)), (1, ("single", 1)), (3, ("split", 3))])
def test_a_number_of_cards_that_was_asked_for_is_kept(
    monkeypatch: pytest.MonkeyPatch, count: int | None, expected: tuple[str, int]
) -> None:
    monkeypatch.setattr("bench.run.arrange.cuda_devices", lambda: tuple(cards(7, 24)))
    wanted = Asked(preset="qwen2-72b", backends=("bnb-nf4",), weights="synthetic", device_count=count)
    (request,) = arrange(wanted).sweep.requests
    assert (request.placement, request.device_count) == expected


@pytest.mark.parametrize(
    ("requests", "here"),
    [
        (on_cuda("bnb-nf4", preset="qwen2-7b"), cards(7, 24)),
        (on_cuda("bnb-nf4"), cards(1, 24)),
        (on_cuda("bnb-nf4"), cards(0, 0)),
        ([asked("bnb-nf4", device="cpu")], cards(7, 24)),
    ],
)
def test_nothing_is_split_without_need(requests: list[RunRequest], here: list[Device]) -> None:
    placed, why = settle(requests, here)
    assert placed == requests
    assert why == ""
