"""What an observed out-of-memory run spares the others, and which runs ``--retry failed`` repeats."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from bench.ask.plan import RunRequest
from bench.cli import cli
from bench.errors import UserError
from bench.record.preflight import CardFindings, ForeignProcess, Preflight
from bench.record.schema import Record
from bench.record.store import Store
from bench.run import executors
from bench.run.order import Order
from bench.run.skipping import SkipRule, needs_no_less
from tests.command import Command
from tests.fake_worker import out_of_memory, record_of
from tests.fault_place import Place
from tests.fault_site import install_faults
from tests.record_factory import GIB, record, request

Outcome = Callable[[RunRequest], dict[str, Any]]


def changed(one: RunRequest, **changes: Any) -> RunRequest:
    """The request with other values; sizes and architecture by their own names."""
    body = one.model_dump()
    for name, value in changes.items():
        if name == "layers":
            body["model"]["architecture"] = {**body["model"]["architecture"], "num_hidden_layers": value}
        elif name in body["workload"]:
            body["workload"][name] = value
        else:
            body[name] = value
    return RunRequest.model_validate(body)


SMALL = request("bf16", device="cuda")


# ---- the rule


@pytest.mark.parametrize(
    "changes",
    [
        {"repeat": 1, "seed": 1},
        {"sequence_length": SMALL.workload.sequence_length * 2},
        {"micro_batch_size": SMALL.workload.micro_batch_size + 1},
        {"layers": 29},
        {"sequence_length": 8192, "micro_batch_size": 64, "layers": 80, "steps": 3, "warmup_steps": 1},
        {"preset": "another", "timeout_seconds": 5.0},
    ],
)
def test_what_needs_no_less_is_skipped(changes: dict[str, Any]) -> None:
    assert needs_no_less(changed(SMALL, **changes), SMALL)


@pytest.mark.parametrize(
    "changes",
    [
        {"sequence_length": SMALL.workload.sequence_length - 1},
        {"layers": 27},
        {"sequence_length": 8192, "layers": 27},
        {"backend": "bnb-nf4"},
        {"options": {"group_size": 32}},
        {"dtype": "float16"},
        {"device": "cpu"},
        {"placement": "split", "device_count": 2},
        {"attention": "eager"},
        {"checkpointing": "none"},
        {"gradient_accumulation_steps": 16},
        {"trace": True},
        {"versions": {"torch": "another"}},
        {"lora": {**SMALL.lora.model_dump(), "rank": 128}},
    ],
)
def test_what_is_smaller_somewhere_or_another_run_is_not(changes: dict[str, Any]) -> None:
    assert not needs_no_less(changed(SMALL, **changes), SMALL)


def exhausted(one: RunRequest = SMALL, **changes: Any) -> Record:
    return record_of(one, **out_of_memory(one), **changes)


def test_the_reason_names_the_run_that_had_too_little() -> None:
    rule = SkipRule(24 * GIB)
    rule.observe(exhausted())
    reason = rule.reason(changed(SMALL, repeat=1))
    assert reason is not None
    assert reason.startswith(f"{SMALL.key} ran out of memory with ")
    assert reason.endswith("and this run needs no less; --no-skip runs it")


@pytest.mark.parametrize("status", ["completed", "crashed", "error", "timeout", "interrupted", "skipped"])
def test_only_what_was_seen_to_run_out_of_memory_counts(status: str) -> None:
    rule = SkipRule(24 * GIB)
    rule.observe(exhausted().model_copy(update={"status": status}))
    assert rule.reason(SMALL) is None


def seen_cards(**changes: Any) -> Preflight:
    card = CardFindings(**({"device": "cuda:0", "name": "a card", "total_bytes": 24 * GIB} | changes))
    return Preflight(status="completed", started_at="2026-11-27T00:00:00+00:00", seconds=1.0, cards=(card,))


@pytest.mark.parametrize(
    ("preflight", "counts"),
    [
        (seen_cards(), True),
        (seen_cards(used_bytes=GIB // 8), True),
        (seen_cards(used_bytes=20 * GIB), False),
        (seen_cards(processes=(ForeignProcess(pid=4242, kind="compute", used_bytes=GIB),)), False),
    ],
)
def test_a_card_that_others_used_teaches_nothing(preflight: Preflight, counts: bool) -> None:
    rule = SkipRule(24 * GIB)
    rule.observe(exhausted(preflight=preflight))
    assert (rule.reason(SMALL) is not None) is counts


@pytest.mark.parametrize(("memory_bytes", "counts"), [(24 * GIB, True), (16 * GIB, True), (80 * GIB, False), (None, True)])
def test_a_smaller_device_teaches_nothing_about_a_larger(memory_bytes: int | None, counts: bool) -> None:
    rule = SkipRule(memory_bytes)
    rule.observe(exhausted(preflight=seen_cards()))
    assert (rule.reason(SMALL) is not None) is counts


# ---- the sweep


class Runs:
    """Stands in for the workers of ``qlora-bench run``; its requests are those that were run."""

    def __init__(self, outcome: Outcome) -> None:
        self.outcome = outcome
        self.ran: list[tuple[str, int]] = []

    def __call__(self, order: Order, listener: object) -> Record:
        self.ran.append((order.request.backend, order.request.repeat))
        return record_of(order.request, **self.outcome(order.request))


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., tuple[Result, Runs, dict[Any, str]]]:
    """``run(outcome, *flags)``: the command's result, what it ran, and (backend, repeat, tokens) -> status."""
    monkeypatch.setenv("QLORA_BENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(sys.modules["bench.cli.run"], "show", lambda *_, **__: None)

    def run(outcome: Outcome, *flags: str) -> tuple[Result, Runs, dict[Any, str]]:
        runs = Runs(outcome)
        monkeypatch.setattr(executors, "run_one", runs)
        arguments = ["run", "--preset", "tiny", "--backend", "bf16,eetq", "--device", "cpu", *flags]
        done = CliRunner().invoke(cli, [*arguments, "--out", str(tmp_path / "out")])
        assert done.exception is None or isinstance(done.exception, SystemExit | UserError), done.exception
        found = Store(tmp_path / "out").records() if (tmp_path / "out").is_dir() else ()
        sizes = {(r.request.backend, r.request.repeat, r.request.workload.sequence_length): r.status for r in found}
        return done, runs, sizes

    return run


def of_bf16(outcome: Outcome) -> Outcome:
    return lambda request: outcome(request) if request.backend == "bf16" else {}


def statuses(found: dict[Any, str], backend: str = "bf16") -> list[str]:
    return [status for key, status in sorted(found.items()) if key[0] == backend]


def test_later_repeats_of_what_ran_out_of_memory_are_skipped(run: Any) -> None:
    done, runs, found = run(of_bf16(out_of_memory), "--repeats", "3")
    assert done.exit_code == 1
    assert statuses(found) == ["out_of_memory", "skipped", "skipped"]
    assert statuses(found, "eetq") == ["completed"] * 3
    assert runs.ran == [("bf16", 0), *(("eetq", repeat) for repeat in range(3))]
    # The same command once more: nothing is missing.
    _, again, same = run(of_bf16(out_of_memory), "--repeats", "3")
    assert (again.ran, same) == ([], found)


def test_no_skip_runs_what_was_skipped(run: Any) -> None:
    run(of_bf16(out_of_memory), "--repeats", "3")
    _, runs, found = run(of_bf16(out_of_memory), "--repeats", "3", "--no-skip")
    assert runs.ran == [("bf16", 1), ("bf16", 2)]
    assert statuses(found) == ["out_of_memory"] * 3


def test_a_larger_cell_of_the_same_folder_is_skipped_and_a_smaller_one_runs(run: Any) -> None:
    run(of_bf16(out_of_memory))
    done, runs, found = run(of_bf16(out_of_memory), "--set", "workload.sequence_length=128")
    assert runs.ran == [("eetq", 0)]
    assert found["bf16", 0, 128] == "skipped"
    assert done.exit_code == 1
    _, runs, found = run(lambda request: {}, "--set", "workload.sequence_length=32")
    assert runs.ran == [("bf16", 0), ("eetq", 0)]
    assert found["bf16", 0, 32] == "completed"


def test_a_dry_run_says_what_would_be_skipped(run: Any) -> None:
    run(of_bf16(out_of_memory))
    done, runs, _ = run(of_bf16(out_of_memory), "--set", "workload.sequence_length=128", "--dry-run")
    assert runs.ran == []
    assert "ran out of memory with 64 tokens in a micro-batch of 1 on 2 layers" in done.output
    assert len(re.findall("to run$", done.output, re.MULTILINE)) == 1


def test_force_repeats_what_ran_out_of_memory_and_then_skips(run: Any) -> None:
    run(of_bf16(out_of_memory), "--repeats", "2")
    _, runs, found = run(lambda request: {}, "--repeats", "2", "--force")
    assert len(runs.ran) == 4
    assert set(found.values()) == {"completed"}


# ---- --retry failed


def failing_once(request: RunRequest) -> dict[str, Any]:
    if request.repeat == 1:
        return {"status": "crashed", "stage": "load", "message": "planted", "steps": ()}
    return out_of_memory(request) if request.backend == "bf16" else {}


def test_retry_failed_repeats_failures_and_nothing_else(run: Any) -> None:
    run(failing_once, "--repeats", "2", "--no-skip")
    # A third repeat has no record: it is no failure.
    done, runs, found = run(lambda request: {}, "--repeats", "3", "--retry", "failed")
    assert runs.ran == [("bf16", 0), ("bf16", 1), ("eetq", 1)]
    assert set(found.values()) == {"completed"}
    assert (done.exit_code, len(found)) == (0, 4)
    done, runs, _ = run(lambda request: {}, "--repeats", "3", "--retry", "failed")
    assert (done.exit_code, runs.ran) == (0, [])


def test_a_retry_skips_what_has_become_vain_and_keeps_what_was_observed(run: Any) -> None:
    run(of_bf16(out_of_memory), "--repeats", "3", "--no-skip")
    _, runs, found = run(of_bf16(out_of_memory), "--repeats", "3", "--retry", "failed")
    assert runs.ran == [("bf16", 0)]
    assert statuses(found) == ["out_of_memory"] * 3


def test_a_dry_run_says_what_a_retry_would_repeat(run: Any) -> None:
    run(failing_once, "--repeats", "2", "--no-skip")
    done, _, _ = run(failing_once, "--repeats", "3", "--retry", "failed", "--dry-run")
    states = [line.rpartition("  ")[2] for line in done.output.splitlines() if "  seed " in line]
    assert states == ["to run", "recorded already", "to run", "to run", *["not recorded, so not repeated"] * 2]


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        (("--retry", "failed", "--force"), "--retry and --force exclude each other"),
        (("--retry", "faild"), "did you mean 'failed'"),
        (("--retry", "failed"), "none of these runs is recorded"),
    ],
)
def test_a_retry_that_makes_no_sense_is_one_line(run: Any, flags: Sequence[str], says: str) -> None:
    done, runs, found = run(lambda request: {}, *flags)
    assert isinstance(done.exception, UserError)
    assert says in str(done.exception)
    assert (runs.ran, found) == ([], {})


# ---- real processes


def test_what_is_skipped_is_a_row_of_the_report(command: Command, tmp_path: Path) -> None:
    site = tmp_path / "site"
    site.mkdir()
    install_faults(site)
    place = Place(Command(command.cache, site), tmp_path)
    flags = ("--repeats", "3", "--json")
    found = place.simple("early-out-of-memory", "early-fails", flags=flags)
    assert found.code == 1
    by_run = {(b["request"]["backend"], b["request"]["repeat"]): b for b in found.records}
    assert [by_run["early-out-of-memory", r]["status"] for r in range(3)] == ["out_of_memory", "skipped", "skipped"]
    assert [by_run["early-fails", r]["status"] for r in range(3)] == ["error"] * 3
    assert len(place.workers()) == 4
    skipped = by_run["early-out-of-memory", 1]
    assert (skipped["steps"], skipped["stage"], skipped["exit_code"], skipped["wall_seconds"]) == ([], None, None, 0)
    for file in ("report.html", "report.md", "report.csv"):
        text = (place.out / file).read_text(encoding="utf-8")
        assert "needs no less; --no-skip runs it" in text, file
    assert "none completed" in (place.out / "report.html").read_text(encoding="utf-8")


def test_records_of_the_rule_are_found_by_their_backend_alone(tmp_path: Path) -> None:
    store = Store(tmp_path)
    for one in (record("bnb-nf4"), record("bnb-nf4-dq"), record("bf16")):
        store.save(one)
    (tmp_path / "bf16-broken.record.json").write_text("{")
    assert [one.request.backend for one in store.of_backends({"bf16"})] == ["bf16"]
