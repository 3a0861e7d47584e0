"""The comparison of copies: it must find exactly the pair, the byte and the circumstances. Two places on a CPU
and a copy that spoils what it is told to."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import pytest
import torch

from bench.load.layout import Place
from bench.probe.peer_copy import PairCheck, ordered_pairs, pattern_bytes, patterns
from bench.probe.transfer import TorchTransfer
from bench.record.preflight import CopyCheck

CPU = torch.device("cpu")
PLACES = [Place(f"cpu:{index}", CPU) for index in range(3)]
SIZES = (8192, 64 * 1024 + 8)
SMALL, LARGE = SIZES


class Spoilt(TorchTransfer):
    """Spoils copies that ``spoils(source, target, loaded)`` picks, in the byte at ``offset``, or drops them."""

    def __init__(
        self,
        spoils: Callable[[str, str, bool], bool] = lambda source, target, loaded: True,
        *,
        offset: int = 0,
        drops: bool = False,
        contiguous: bool = True,
        from_size: int = 0,
    ) -> None:
        super().__init__(product_size=16, opposing_bytes=64)
        self.spoils, self.offset, self.drops = spoils, offset, drops
        self.contiguous, self.from_size = contiguous, from_size
        self.loaded = False
        self.checking = threading.get_ident()
        self.opposed: set[tuple[str, str]] = set()

    def copy(self, data: torch.Tensor, into: torch.Tensor, source: Place, target: Place) -> None:
        if threading.get_ident() != self.checking:
            self.opposed.add((source.label, target.label))
            super().copy(data, into, source, target)
            return
        chosen = (
            self.spoils(source.label, target.label, self.loaded)
            and data.is_contiguous() == self.contiguous
            and data.numel() * data.element_size() >= self.from_size
        )
        if not (chosen and self.drops):
            super().copy(data, into, source, target)
        if chosen and not self.drops:
            into.view(torch.uint8).view(-1)[self.offset] ^= 0x10

    def busy(self, places: Sequence[Place]):  # type: ignore[no-untyped-def]
        outer = super().busy(places)

        class Loaded:
            def __enter__(_self) -> list[str]:
                self.loaded = True
                return outer.__enter__()

            def __exit__(_self, *exception: object) -> None:
                self.loaded = False
                outer.__exit__(None, None, None)

        return Loaded()


def checked(transfer: TorchTransfer, source: int = 0, target: int = 1, peer: bool | None = None) -> CopyCheck:
    return PairCheck(transfer, PLACES[source], PLACES[target], SIZES, peer).run()


def test_copies_that_arrive_are_counted_and_timed() -> None:
    transfer = Spoilt(lambda *where: False)
    found = checked(transfer)
    # two sizes, four patterns, on two streams; by the copy engine and by a kernel
    assert (found.rounds, found.rounds_under_load) == (32, 32)
    whole = sum(size + size // 4096 * 4096 for size in SIZES)
    assert found.checked_bytes == whole * 4 * 2 * 2
    assert not found.corrupt
    assert (found.mismatching_bytes, found.first_mismatch, found.note) == (0, None, None)
    assert found.largest_copy_bytes == LARGE
    assert found.gigabytes_per_second and found.staged_gigabytes_per_second
    assert transfer.opposed == {("cpu:1", "cpu:0")}, "the load copies the other way"


def test_one_flipped_bit_at_a_high_offset_is_found_where_it_is() -> None:
    found = checked(Spoilt(offset=LARGE - 3, from_size=LARGE))
    first = found.first_mismatch
    assert found.corrupt and first is not None
    assert (first.offset_bytes, first.copy_bytes, first.way, first.under_load) == (
        LARGE - 3,
        LARGE,
        "copy engine",
        False,
    )
    assert first.found == first.expected ^ 0x10
    assert first.expected == int(pattern_bytes(first.pattern, LARGE)[LARGE - 3])
    # four patterns on two streams, at rest and under load
    assert (found.mismatching_bytes, found.mismatching_bytes_under_load) == (16, 8)


def test_what_is_spoilt_only_under_load_is_said_so() -> None:
    found = checked(Spoilt(lambda source, target, loaded: loaded, offset=1))
    assert found.mismatching_bytes == found.mismatching_bytes_under_load == 16
    assert found.first_mismatch is not None and found.first_mismatch.under_load


def test_only_the_pair_in_the_one_direction_is_blamed() -> None:
    transfer = Spoilt(lambda source, target, loaded: (source, target) == ("cpu:2", "cpu:0"), offset=5)
    found = {
        (source.label, target.label): PairCheck(transfer, source, target, SIZES).run().corrupt
        for source, target in ordered_pairs(PLACES)
    }
    assert len(found) == 6
    assert [pair for pair, corrupt in found.items() if corrupt] == [("cpu:2", "cpu:0")]


def test_a_dropped_write_is_found_though_the_right_bytes_were_staged_beside_it() -> None:
    """What stood in the target must not pass for what was to arrive (pytorch/pytorch#87363)."""
    found = checked(Spoilt(drops=True))
    assert found.mismatching_bytes == sum(SIZES) * 4 * 2 * 2, "every byte of every pattern"
    assert found.first_mismatch is not None
    assert (found.first_mismatch.offset_bytes, found.first_mismatch.way) == (0, "copy engine")


@pytest.mark.parametrize("drops", [True, False])
def test_a_kernel_that_stores_across_is_checked_on_its_own(drops: bool) -> None:
    found = checked(Spoilt(drops=drops, contiguous=False))
    assert found.first_mismatch is not None
    assert (found.first_mismatch.way, found.first_mismatch.copy_bytes) == ("kernel", SMALL)
    whole = sum(size // 4096 * 4096 for size in SIZES)
    assert found.mismatching_bytes == (whole if drops else 2) * 4 * 2 * 2


def test_no_kernel_stores_across_without_peer_access() -> None:
    found = checked(Spoilt(contiguous=False), peer=False)
    assert not found.corrupt
    assert found.rounds == 16


def test_one_card_is_compared_with_the_host_and_back() -> None:
    found = checked(Spoilt(), 0, 0)
    assert (found.rounds, found.rounds_under_load, found.corrupt) == (8, 8, False)

    class BadRiser(TorchTransfer):
        def stage(self, data: torch.Tensor, into: torch.Tensor, source: Place) -> None:
            super().stage(data, into, source)
            into[-1] ^= 1

    found = checked(BadRiser(16, 64), 0, 0)
    assert found.corrupt
    assert found.first_mismatch is not None and found.first_mismatch.offset_bytes == SMALL - 1
    assert found.staged_mismatching_bytes == found.mismatching_bytes == 16


def test_a_staging_that_changes_bytes_is_not_blamed_on_the_direct_copy_alone() -> None:
    class BadStaging(TorchTransfer):
        def stage(self, data: torch.Tensor, into: torch.Tensor, source: Place) -> None:
            super().stage(data, into, source)
            into[0] ^= 1

    found = checked(BadStaging(16, 64))
    assert found.staged_mismatching_bytes == 16


def test_sizes_that_do_not_fit_are_left_out() -> None:
    class Narrow(TorchTransfer):
        def free_bytes(self, place: Place) -> int:
            return 8 * SMALL if place == PLACES[1] else 2**40

    assert checked(Narrow(16, 64)).largest_copy_bytes == SMALL


def test_a_load_that_breaks_costs_the_load_and_not_the_check() -> None:
    class Weak(TorchTransfer):
        def _multiply(self, *arguments: object) -> None:
            raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")

    found = checked(Weak(16, 64))
    assert found.note == "the load was not kept up: RuntimeError: CUBLAS_STATUS_ALLOC_FAILED"
    assert found.rounds_under_load == 32


@pytest.mark.parametrize("pattern", patterns(0))
def test_patterns_are_the_same_each_time_and_use_all_bits(pattern: str) -> None:
    made = pattern_bytes.__wrapped__(pattern, 8192)
    assert torch.equal(made, pattern_bytes(pattern, 8192))
    assert (made.dtype, tuple(made.shape)) == (torch.uint8, (8192,))
    if pattern == "random":
        seen = torch.stack([(made >> bit) & 1 for bit in range(8)]).view(8, -1, 8).float().mean(dim=1)
        assert bool(((seen > 0.3) & (seen < 0.7)).all()), "every bit of every byte of a word is drawn"


def test_other_streams_are_used_on_both_cards_and_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can be held without a card: which streams are entered, and that all work is waited for before and
    after. The streams themselves are stood in for."""
    events: list[str] = []

    class Stream:
        def __init__(self, device: torch.device, name: str = "default") -> None:
            self.name = f"{name} of {device}"

        def synchronize(self) -> None:
            events.append(f"wait for {self.name}")

    current: dict[torch.device, Stream] = {}

    class Entered:
        def __init__(self, stream: Stream) -> None:
            self.stream = stream
            self.device = next(d for d in cards if stream.name.endswith(str(d)))

        def __enter__(self) -> None:
            self.before = current.get(self.device)
            current[self.device] = self.stream

        def __exit__(self, *exception: object) -> None:
            current.pop(self.device)

    made: list[torch.device] = []

    def new(device: torch.device) -> Stream:
        made.append(device)
        return Stream(device, "another")

    cards = [torch.device("cuda", index) for index in range(2)]
    monkeypatch.setattr(torch.cuda, "Stream", new)
    monkeypatch.setattr(torch.cuda, "stream", Entered)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: current.get(device) or Stream(device))
    transfer = TorchTransfer()
    places = [Place(str(card), card) for card in cards]
    for _ in range(2):
        events.clear()
        with transfer.streams(places):
            events.append("inside")
            assert set(current) == set(cards)
        assert events == [
            "wait for default of cuda:0", "wait for default of cuda:1", "inside",
            "wait for another of cuda:0", "wait for another of cuda:1",
        ]  # fmt: skip
        assert current == {}
    assert made == cards
