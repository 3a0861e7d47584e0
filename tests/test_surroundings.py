"""What the parent of a run sees of the machine meanwhile."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import pytest

from bench.ask.experiment import Workload
from bench.probe import surroundings
from bench.probe.surroundings import SHORTEST_SECONDS, Look, Witness
from bench.record.memory import Memory
from bench.run.ranks import Ranks
from bench.run.told import Told
from tests.fake_nvml import FakeCard, FakeNvml
from tests.record_factory import request

TRAIN = {"event": "stage", "name": "train"}


def ended(index: int) -> dict[str, Any]:
    return {"event": "step", "step": {"index": index}}


def witness(*, warmup_steps: int = 1, **ask: Any) -> Witness:
    values = {"device": "cpu", "workload": Workload(steps=4, warmup_steps=warmup_steps)}
    return Witness(request("hqq", **(values | ask)))


def hear(one: Witness, *events: Mapping[str, Any]) -> None:
    listener = one.beside(lambda event: None)
    for event in events:
        listener(event)


@pytest.fixture
def looks(monkeypatch: pytest.MonkeyPatch) -> list[Look]:
    """What the next looks show."""
    coming: list[Look] = []
    monkeypatch.setattr(Witness, "_look", lambda self: coming.pop(0))
    return coming


def test_busy_cores_are_of_the_measured_steps_only(looks: list[Look]) -> None:
    looks += [Look(10.0, 100.0, 50.0), Look(11.0, 102.0, 51.0), Look(12.0, 104.5, 52.0), Look(14.0, 109.0, 56.0)]
    one = witness()
    hear(one, TRAIN, ended(0), ended(1), ended(2), ended(3))
    found = one.found
    assert found is not None
    assert (found.seconds, found.own_busy_cores, found.other_busy_cores) == (4.0, 1.5, 0.75)
    assert found.machine_cores == psutil.cpu_count()
    assert found.cards == ()


def test_without_warm_up_the_looking_begins_with_the_training(looks: list[Look]) -> None:
    looks += [Look(0.0, 0.0, 0.0), Look(2.0, 3.0, 2.0)]
    one = witness(warmup_steps=0)
    hear(one, TRAIN, ended(0))
    assert one.found is not None
    assert one.found.other_busy_cores == 0.5


@pytest.mark.parametrize(
    ("first", "last", "own", "other"),
    [
        (Look(0, 0.0, 0.0), Look(SHORTEST_SECONDS / 2, 1.0, 1.0), None, None),  # too short to count
        (Look(0, None, 0.0), Look(2, None, 2.0), 1.0, None),
        (Look(0, 0.0, None), Look(2, 2.0, None), None, None),
        (Look(0, 0.0, 0.0), Look(2, 0.0, 2.0), 1.0, None),  # a sandbox that counts nothing
        (Look(0, 0.0, 0.0), Look(2, 3.98, 4.0), 2.0, 0.0),  # rounding
    ],
)
def test_what_cannot_be_told_is_null_and_never_zero(
    looks: list[Look], first: Look, last: Look, own: float | None, other: float | None
) -> None:
    looks += [first, last]
    one = witness()
    hear(one, TRAIN, ended(0), ended(1))
    assert one.found is not None
    assert (one.found.own_busy_cores, one.found.other_busy_cores) == (own, other)


def test_a_run_that_measured_nothing_has_no_surroundings(looks: list[Look]) -> None:
    one = witness()
    hear(one, TRAIN)
    assert one.found is None
    looks.append(Look(0.0, 0.0, 0.0))
    hear(one, ended(0))
    assert one.found is None


def test_every_event_is_handed_on_and_none_of_them_can_do_harm() -> None:
    heard: list[Mapping[str, Any]] = []
    events: list[dict[str, Any]] = [
        {"event": "step"}, {"event": "step", "step": None}, {"event": "step", "step": {"index": "x"}},
        {"event": "stage"}, {}, TRAIN,
    ]  # fmt: skip
    listener = witness().beside(heard.append)
    for event in events:
        listener(event)
    assert heard == events


def test_what_another_program_does_is_not_ours() -> None:
    """Another program: one whose parent has ended, so that it is nobody's child here."""
    spin = "import time; end = time.monotonic() + 1.6\nwhile time.monotonic() < end: pass"
    start = f"import subprocess, sys; subprocess.Popen([sys.executable, '-c', {spin!r}])"
    one = witness()
    subprocess.run([sys.executable, "-c", start], check=True, stdout=subprocess.DEVNULL)
    hear(one, TRAIN, ended(0))
    time.sleep(0.9)
    hear(one, ended(1))
    found = one.found
    assert found is not None
    if found.other_busy_cores is None:
        pytest.skip("this system counts no busy time of the machine")
    assert found.other_busy_cores > 0.2
    assert found.own_busy_cores is not None
    assert found.own_busy_cores < 0.5


def test_what_our_children_do_is_ours() -> None:
    spin = "import time; end = time.monotonic() + 1.6\nwhile time.monotonic() < end: pass"
    one = witness()
    child = subprocess.Popen([sys.executable, "-c", spin])
    hear(one, TRAIN, ended(0))
    time.sleep(0.9)
    hear(one, ended(1))
    child.wait()
    assert one.found is not None
    assert one.found.own_busy_cores is not None
    assert one.found.own_busy_cores > 0.2


# ---- cards


@pytest.fixture
def cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[FakeCard]]:
    found = [FakeCard("GPU-aaaa"), FakeCard("GPU-bbbb", reasons=0x40), FakeCard("GPU-cccc")]
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml(found))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1,0")
    yield found


def test_reasons_are_counted_over_the_looks_at_the_cards_that_are_used(cards: list[FakeCard]) -> None:
    one = witness(device="cuda", placement="split", device_count=2)
    hear(one, TRAIN, ended(0), ended(1))
    cards[1].reasons = 0x44
    hear(one, ended(2))
    cards[1].reasons = 0
    hear(one, ended(3))
    one.close()
    assert one.found is not None
    first, second = one.found.cards
    assert (first.device, first.looks) == ("cuda:0", 4)
    assert first.throttle_reasons == {"temperature (hardware)": 3, "power limit": 1}
    assert (second.device, second.throttle_reasons) == ("cuda:1", {})


def test_another_process_on_a_card_is_seen_though_it_comes_and_goes(cards: list[FakeCard]) -> None:
    one = witness(device="cuda", placement="split", device_count=2)
    cards[0].processes = cards[1].processes = [(7, 2**30)]
    hear(one, TRAIN, ended(0), ended(1))
    cards[1].processes = [(7, 2**30), (8, None)]
    hear(one, ended(2))
    cards[1].processes = [(7, 2**30)]
    hear(one, ended(3))
    one.close()
    assert one.found is not None
    assert [card.most_compute_processes for card in one.found.cards] == [2, 1]


def test_a_driver_that_tells_nothing_leaves_nulls(cards: list[FakeCard], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeNvml, "_nvmlDeviceGetCurrentClocksThrottleReasons", lambda self, card: None)
    cards[1].processes = None
    one = witness(device="cuda")
    hear(one, TRAIN, ended(0), ended(1))
    assert one.found is not None
    (card,) = one.found.cards
    assert card.most_compute_processes is None
    assert (card.throttle_reasons, card.highest_temperature_celsius, card.lowest_sm_clock_mhz) == (None, None, None)


def test_without_a_driver_there_are_no_cards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([], driver=False))
    one = witness(device="cuda")
    hear(one, TRAIN, ended(0), ended(1))
    assert one.found is not None
    assert one.found.cards == ()


# ---- the allocator


def test_what_a_worker_tells_of_its_allocator_is_kept() -> None:
    told = Told()
    for retries in (0, 2):
        told.take({"event": "allocator", "counts": {"allocator_retries": retries, "allocator_ooms": 0}})
    memory = Memory.model_validate(told.memory)
    assert (memory.allocator_retries, memory.allocator_ooms) == (2, 0)


@pytest.mark.parametrize(("second", "sums"), [(3, (5, 1)), (None, (None, None))])
def test_the_troubles_of_all_ranks_are_added_up_where_all_tell(second: int | None, sums: tuple[Any, Any]) -> None:
    ranks, told = Ranks(2), Told()
    for rank, retries in enumerate((2, second)):
        counts = {"allocator_retries": retries, "allocator_ooms": rank}
        for _ in ranks.take(rank, {"event": "allocator", "counts": counts}) if retries else ():
            pass
    ranks.settle(told)
    memory = Memory.model_validate(told.memory)
    assert (memory.allocator_retries, memory.allocator_ooms) == sums


def test_guests_are_not_counted_twice_and_waiting_is_not_busy(monkeypatch: pytest.MonkeyPatch) -> None:
    class Times:
        def _asdict(self) -> dict[str, float]:
            return {"user": 4.0, "system": 1.0, "idle": 50.0, "iowait": 7.0, "steal": 2.0, "guest": 3.0}

    monkeypatch.setattr(psutil, "cpu_times", Times)
    assert surroundings.machine_busy_seconds() == 7.0
