"""The preflight as a whole: what it tells, when it stops a sweep, and where its findings are seen."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

from bench.ask.plan import RunRequest
from bench.cli import cli
from bench.judge.comparison import compare
from bench.load.layout import Place
from bench.probe.card_concerns import concerns
from bench.probe.cards import Nvml
from bench.probe.machine import cuda_devices
from bench.record.preflight import (
    CardFindings,
    CardState,
    CopyCheck,
    ForeignProcess,
    Mismatch,
    PairFindings,
    Preflight,
)
from bench.record.schema import Record
from bench.record.store import Store, read_record
from bench.run import executors, preflight, sweep
from bench.run.arrange import arrange
from bench.run.asked import Asked
from bench.run.card_checks import Card, check_cards
from bench.run.events import Channel
from bench.run.launch import Ending
from bench.run.order import Order
from bench.run.preflight import Examiner, examine_cards
from bench.run.told import Told
from bench.show.page_facts import environment_facts
from bench.show.preflight import describe_preflight
from tests.fake_nvml import GIB, FakeCard, FakeNvml
from tests.fake_worker import record_of
from tests.record_factory import record, request
from tests.test_preflight_copies import SIZES, Spoilt

A, B = "GPU-aaaa1111", "GPU-bbbb2222"
SOUND = CopyCheck(
    largest_copy_bytes=256 * 2**20, checked_bytes=10 * GIB, rounds=20, rounds_under_load=20, mismatching_bytes=0,
    mismatching_bytes_under_load=0, seconds=1.0, gigabytes_per_second=11.5, staged_gigabytes_per_second=5.25)  # fmt: skip
FIRST = Mismatch(
    offset_bytes=4097,
    copy_bytes=2**20,
    pattern="random",
    way="copy engine",
    under_load=False,
    expected=0xA5,
    found=0,
)
CORRUPT = SOUND.model_copy(update={"mismatching_bytes": 4096, "first_mismatch": FIRST})


def found(
    *, forth: CopyCheck = SOUND, back: CopyCheck = SOUND, host: CopyCheck = SOUND, **card: Any
) -> Preflight:
    """Two cards, of which the first is as ``card`` says."""
    values = {"name": "NVIDIA GeForce RTX 3090", "total_bytes": 24 * GIB, "free_bytes": 23 * GIB, "used_bytes": 0,
              "processes": (), "nvml_index": 0, "host_copies": host}  # fmt: skip
    link = {"peer_access": True, "link": "PCIe, through one host bridge"}
    return Preflight(
        status="completed", started_at="2026-11-25T00:00:00+00:00", seconds=12.0, driver="580.142",
        cards=(CardFindings(device="cuda:0", **{**values, **card}), CardFindings(device="cuda:1", **values)),
        pairs=(PairFindings(source="cuda:0", target="cuda:1", copies=forth, **link),
               PairFindings(source="cuda:1", target="cuda:0", copies=back, **link)))  # fmt: skip


class Ear:
    """Hears of a preflight."""

    def __init__(self) -> None:
        self.began: list[int] = []
        self.heard: list[Preflight] = []

    def examining(self, cards: int) -> None:
        self.began.append(cards)

    def examined(self, preflight: Preflight) -> None:
        self.heard.append(preflight)


def split(backend: str = "bnb-nf4", **changes: Any) -> RunRequest:
    return request(backend, **{"placement": "split", "device_count": 2, **changes})


# ---- the worker's side


class Kept(Channel):
    def __init__(self) -> None:
        self.told = Told()

    def send(self, event: str, **content: Any) -> None:
        plain = {
            name: v.model_dump(mode="json") if hasattr(v, "model_dump") else v for name, v in content.items()
        }
        self.told.take({"event": event, **plain})


def test_what_a_worker_finds_reaches_the_preflight(monkeypatch: pytest.MonkeyPatch) -> None:
    """Real comparisons on two places of a CPU; NVML and the wire between the processes are stood in for."""
    monkeypatch.setitem(
        sys.modules,
        "pynvml",
        FakeNvml([FakeCard(A, bus_id="1", used_bytes=GIB), FakeCard(B, bus_id="2", nvlinks=["1"])]),
    )
    channel = Kept()

    def work(order: Order, flag: str) -> tuple[Told, Ending]:
        assert (flag, order.request.device_count) == ("--preflight", 2)
        places = [Place(f"cuda:{index}", torch.device("cpu")) for index in range(2)]
        with Nvml() as nvml:
            # Torch's first card is NVML's second.
            facts = [nvml.findings(uuid, place.label) for uuid, place in zip((B, A), places, strict=True)]
            cards = [Card(place, fact) for place, fact in zip(places, facts, strict=True) if fact]
            spoilt = Spoilt(lambda source, target, loaded: source == "cuda:1" and loaded, offset=9)
            check_cards(channel, nvml, cards, spoilt, SIZES)
        channel.send("outcome", status="completed", message=None)
        return channel.told, Ending(0, False, None)

    monkeypatch.setattr(preflight, "work_alone", work)
    ear = Ear()
    told = Examiner().find([split()], ear)
    assert told is not None and told.status == "completed"
    assert [(card.device, card.uuid, card.nvml_index, card.used_bytes) for card in told.cards] == [
        ("cuda:0", B, 1, 0), ("cuda:1", A, 0, GIB)]  # fmt: skip
    assert all(card.host_copies and not card.host_copies.corrupt for card in told.cards)
    assert all(card.busy and card.busy.pcie_width == 16 for card in told.cards)
    assert [(pair.source, pair.target, pair.link) for pair in told.pairs] == [
        ("cuda:0", "cuda:1", "NVLink, 1 connection"), ("cuda:1", "cuda:0", "PCIe, through one host bridge")]  # fmt: skip
    assert told.corrupt_pairs == (("cuda:1", "cuda:0"),)
    assert told.stopped is not None and told.stopped.startswith(
        "A copy from cuda:1 to cuda:0 arrives changed: "
    )
    assert "bytes, and only under load (the first at offset 9 of 8192" in told.stopped
    assert any("1.00 GiB in use before anything of ours ran" in warning for warning in told.warnings)
    assert Preflight.model_validate_json(told.model_dump_json()) == told
    assert ear.began == [2]


def test_the_real_worker_ends_with_a_finding_whatever_machine_this_is() -> None:
    order = Order(request=request("bf16", device_count=1, timeout_seconds=300), model_folder=None)
    told = examine_cards(order)
    if torch.cuda.is_available():  # pragma: no cover - on a machine with a card
        assert told.status == "completed", told.message
        (card,) = told.cards
        assert card.host_copies is not None and not card.host_copies.corrupt
    else:
        assert told.status == "failed"
        assert (
            told.message
            == "RuntimeError: torch finds no CUDA devices, and the runs use 1, while starting CUDA"
        )
        assert told.cards == told.pairs == ()
    assert told.seconds > 0


@pytest.mark.parametrize(
    ("ending", "message"),
    [
        (Ending(-11, False, None), "the worker was ended by SIGSEGV, while copying from cuda:0 to cuda:1"),
        (Ending(None, True, None), "no result within 300 s, while copying from cuda:0 to cuda:1"),
    ],
)
def test_a_preflight_that_dies_says_where_and_stops_nothing(
    ending: Ending, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    channel = Kept()
    channel.section("card cuda:0", found().cards[0])
    channel.stage("copying from cuda:0 to cuda:1")
    monkeypatch.setattr(preflight, "work_alone", lambda order, flag: (channel.told, ending))
    told = Examiner().find([split()], Ear())
    assert told is not None
    assert (told.status, told.message, told.stopped) == ("failed", message, None)
    assert len(told.cards) == 1, "what was found before stands"
    assert message in told.warnings[0]


# ---- when it looks, and when it stops


def test_cards_are_looked_at_once_for_all_sweeps_of_a_command() -> None:
    orders: list[Order] = []

    def examine(order: Order) -> Preflight:
        orders.append(order)
        return found()

    examiner, ear = Examiner(examine=examine), Ear()
    assert examiner.find([request(device="cpu")], ear) is None
    assert examiner.find([], ear) is None
    for _ in range(3):
        told = examiner.find([request("bf16"), split()], ear)
        assert told is not None and told.stopped is None
    assert [order.request.device_count for order in orders] == [2], "the widest run says how many"
    # its own limit, not the run's: the start, and each card and each ordered pair
    assert orders[0].request.timeout_seconds == 180 + 4 * 30
    assert (ear.began, len(ear.heard)) == ([2], 1)


@pytest.mark.parametrize(
    ("told", "placement", "nccl", "stops"),
    [
        (found(), "split", None, False),
        (found(back=CORRUPT), "split", None, True),
        (found(back=CORRUPT), "split", "1", True),  # tensor copies do not pass NCCL
        (found(back=CORRUPT), "ddp", None, True),
        (found(back=CORRUPT), "fsdp", "0", True),
        (found(back=CORRUPT), "fsdp", "1", False),
        (found(host=CORRUPT), "fsdp", "1", True),
    ],
)
def test_what_stops_a_sweep(
    told: Preflight, placement: str, nccl: str | None, stops: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("NCCL_P2P_DISABLE", raising=False)
    if nccl is not None:
        monkeypatch.setenv("NCCL_P2P_DISABLE", nccl)
    judged = Examiner(examine=lambda order: told).find([split(placement=placement)], Ear())
    assert judged is not None
    assert (judged.stopped is not None) == stops
    assert bool(judged.warnings) == bool(told.corrupt_pairs), "said in any case"


def test_a_stop_names_pair_mismatch_and_remedy() -> None:
    judged = Examiner(examine=lambda order: found(forth=CORRUPT, back=CORRUPT)).find([split()], Ear())
    assert judged is not None and judged.stopped is not None
    assert judged.stopped.startswith(
        "A copy from cuda:0 to cuda:1 arrives changed: 4096 of 10737418240 bytes (the first at offset 4097 of "
        "1048576, pattern random, by the copy engine: 0x00 instead of 0xa5). So does 1 other pair."
    )
    for remedy in ("IOMMU", "ACS", "driver", "--placement single", "NCCL_P2P_DISABLE=1 helps"):
        assert remedy in judged.stopped


def test_a_run_that_was_stopped_is_tried_again_and_a_failed_one_is_not(tmp_path: Path) -> None:
    store = Store(tmp_path)
    stopped = found(forth=CORRUPT).model_copy(update={"stopped": "A copy arrives changed"})
    for cards, finished in ((stopped, False), (found(), True), (None, True)):
        made = record("bf16", status="error", stage="launch", message="why", preflight=cards)
        store.save(made)
        assert store.finished(made.key) is finished


# ---- through the front door


@pytest.fixture
def two_cards(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    monkeypatch.setitem(sys.modules, "pynvml", FakeNvml([FakeCard(A), FakeCard(B)]))
    cuda_devices.cache_clear()
    yield
    cuda_devices.cache_clear()


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Backends whose run was started; a stand-in for the worker ends it at once."""
    started: list[str] = []

    def run_one(order: Order, listener: object) -> Record:
        started.append(order.request.backend)
        return record_of(order.request, preflight=None)

    monkeypatch.setattr(executors, "run_one", run_one)
    return started


def command(out: Path, *flags: str) -> Result:
    arguments = [
        "run",
        "--preset",
        "tiny",
        "--backend",
        "bf16,eetq",
        "--device",
        "cuda",
        "--placement",
        "split",
        "--out",
        str(out),
    ]
    return CliRunner().invoke(cli, [*arguments, *flags])


def records_in(out: Path) -> list[Record]:
    return [read_record(path) for path in sorted(out.glob("*.record.json"))]


@pytest.mark.usefixtures("two_cards")
def test_a_corrupt_pair_stops_the_command_before_any_run(
    out: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preflight, "examine_cards", lambda order: found(forth=CORRUPT))
    done = command(out)
    assert done.exit_code == 1, done.output
    assert ran == []
    made = records_in(out)
    assert [(r.request.backend, r.status, r.stage) for r in made] == [
        ("bf16", "error", "launch"),
        ("eetq", "error", "launch"),
    ]
    for one in made:
        assert one.message is not None and one.preflight is not None
        assert one.message.startswith("A copy from cuda:0 to cuda:1 arrives changed: 4096 of ")
        assert one.preflight.corrupt_pairs == (("cuda:0", "cuda:1"),)
    assert "warning: A copy from cuda:0 to cuda:1 arrives changed" in done.output
    assert "looking at 2 cards before the first run" in done.output
    page = (out / "report.html").read_text(encoding="utf-8")
    assert "A copy from cuda:0 to cuda:1 arrives changed" in page
    # Repaired: the same command runs what was stopped.
    monkeypatch.setattr(preflight, "examine_cards", lambda order: found())
    done = command(out)
    assert ran == ["bf16", "eetq"], done.output
    assert [r.status for r in records_in(out)] == ["completed", "completed"]


@pytest.mark.usefixtures("two_cards")
def test_a_warning_is_a_line_and_no_stop(out: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    process = ForeignProcess(pid=4711, kind="compute", used_bytes=2 * GIB, name="/usr/bin/python3")
    monkeypatch.setattr(
        preflight, "examine_cards", lambda order: found(processes=(process,), used_bytes=3 * GIB)
    )
    done = command(out, "--json")
    assert ran == ["bf16", "eetq"]
    (first, _) = json.loads(done.stdout)
    (warning,) = first["preflight"]["warnings"]
    assert "pid 4711 /usr/bin/python3 with 2.00 GiB; 3.00 GiB were in use in all" in warning
    done = command(out, "--force")
    lines = [line for line in done.output.splitlines() if line.startswith("warning: ")]
    assert lines == [f"warning: {warning}"]
    assert done.output.index("warning: ") < done.output.index("bf16: started")


@pytest.mark.usefixtures("two_cards")
def test_no_preflight_is_recorded_and_said(
    out: Path, ran: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(order: Order) -> Preflight:
        raise AssertionError("looked at the cards")

    monkeypatch.setattr(preflight, "examine_cards", never)
    done = command(out, "--no-preflight")
    assert ran == ["bf16", "eetq"], done.output
    made = records_in(out)
    assert [r.preflight.status for r in made if r.preflight] == ["skipped", "skipped"]
    assert "warning: The cards were not looked at before the runs (--no-preflight)" in done.output
    assert "looking at" not in done.output
    assert "not looked at before the runs (--no-preflight)" in (out / "report.html").read_text(
        encoding="utf-8"
    )


@pytest.mark.usefixtures("two_cards")
def test_one_card_is_looked_at_for_single_runs_and_none_on_a_cpu(out: Path, ran: list[str]) -> None:
    counts: list[int] = []

    def examine(order: Order) -> Preflight:
        counts.append(order.request.device_count)
        return found()

    for device in ("cuda", "cpu"):
        arranged = arrange(Asked(preset="tiny", backends=("bf16",), device=device, out=out))
        arranged.sweep.examiner.examine = examine
        (made,) = sweep.run_sweep(arranged.sweep, _Quiet())
        assert (made.preflight is not None) == (device == "cuda")
    assert counts == [1]
    assert ran == ["bf16", "bf16"]


class _Quiet(Ear):
    def skipped(self, request: RunRequest) -> None:
        raise AssertionError("skipped")

    def listener(self, place: int, total: int, request: RunRequest) -> Any:
        return lambda event: None

    def ended(self, record: Record) -> None:
        pass


# ---- in words


@pytest.mark.parametrize(
    ("card", "part"),
    [
        ({"processes": (ForeignProcess(pid=7, kind="graphics"),), "used_bytes": 90 * 2**20}, "used by others before anything of ours ran (pid 7; 0.09 GiB"),
        ({"processes": (), "used_bytes": 5 * GIB}, "had 5.00 GiB in use before anything of ours ran, by no process that can be seen"),
        ({"processes": None, "used_bytes": 5 * GIB}, "had 5.00 GiB in use before anything of ours ran, by no process that can be seen"),
        ({"power_limit_watts": 280, "default_power_limit_watts": 350}, "limited to 280 W and has 350 W by default"),
        ({"busy": CardState(pcie_width=4), "pcie_max_width": 16}, "uses 4 of 16 PCIe lanes under load"),
        ({"busy": CardState(pcie_generation=1), "pcie_max_generation": 4}, "PCIe generation 1 of 4 under load"),
        ({"busy": CardState(throttle_reasons=("power limit", "temperature (hardware)"), temperature_celsius=91)}, "at 91 °C (temperature (hardware))"),
        ({"uncorrected_ecc_errors": 2}, "2 memory errors"),
        ({"host_copies": CORRUPT}, "A copy from host to cuda:0 and back arrives changed"),
        ({"host_copies": SOUND.model_copy(update={"note": "the load was not kept up: x"})}, "checked with less than was meant"),
    ],
)  # fmt: skip
def test_every_finding_that_matters_is_a_warning(card: dict[str, Any], part: str) -> None:
    (warning,) = concerns(found(**card))
    assert part in warning


@pytest.mark.parametrize(
    "card",
    [
        {"used_bytes": 100 * 2**20},  # without processes: a driver's rest
        {"idle": CardState(pcie_generation=1, throttle_reasons=("idle",)), "pcie_max_generation": 4},
        {"busy": CardState(throttle_reasons=("power limit",))},
        {"power_limit_watts": 350, "default_power_limit_watts": 350},
        {"total_bytes": None, "free_bytes": None, "used_bytes": None, "processes": None},
    ],
)
def test_what_is_ordinary_or_not_known_is_none(card: dict[str, Any]) -> None:
    assert concerns(found(**card)) == ()


def test_the_page_and_the_doubts_tell_it_once() -> None:
    told = found(used_bytes=5 * GIB, back=SOUND.model_copy(update={"gigabytes_per_second": 9.0}))
    told = told.model_copy(update={"warnings": concerns(told)})
    comparison = compare([record("bf16", preflight=told), record("hqq", preflight=told)])
    assert comparison.warnings.count(told.warnings[0]) == 1
    facts = {fact.name: fact.values[0].text for fact in environment_facts(comparison.rows)}
    assert facts["links between cards"] == "PCIe, through one host bridge (peer access): cuda:0 and cuda:1"
    assert facts["copies between cards"] == (
        "2 of 2 ordered pairs checked: 40 copies at rest and 40 under load of up to 256 MiB, every byte as it "
        "should be, 9 to 11.5 GB/s direct, 5.25 GB/s over the host"
    )
    assert facts["cuda:0 before the runs"] == "23.0 of 24.0 GiB free, no foreign process seen"
    assert facts["warning 1 about the cards"] == told.warnings[0]
    assert describe_preflight(told).endswith(
        "copies between them and with the host: arrive unchanged to the bit (12 s)"
    )
    assert "1 of 4 ways arrive changed" in describe_preflight(found(back=CORRUPT))


def test_a_record_without_a_preflight_says_nothing_about_cards() -> None:
    comparison = compare([record("bf16")])
    assert not [fact.name for fact in environment_facts(comparison.rows) if "cards" in fact.name]
