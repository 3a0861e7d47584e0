"""Several processes of one run: what they tell becomes one record, and none of them outlives it."""

from __future__ import annotations

import functools
import json
import re
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from bench.ask.experiment import Placement
from bench.load.registry import find_backends
from bench.run.ranks import Ranks
from bench.run.told import Told
from tests.command import ROOT, Command

MODULE = '''
"""Backends of which one process in two fails on purpose."""
import os, signal, time
from typing import Literal
from bench.load.contract import Backend, Options

KINDS = ("raises-in-load", "hangs-in-load", "killed", "exits", "out-of-memory")

class Kind(Options):
    kind: Literal[KINDS]

class Unruly(Backend):
    """Fails in rank 1."""
    variants = {f"unruly-{kind}": Kind(kind=kind) for kind in KINDS}
    refused_placements = {}

    def linear(self, layer):
        import torch
        kind, here = self.options.kind, os.environ.get("RANK") == "1"
        if here and kind == "raises-in-load":
            raise RuntimeError("planted failure")
        if here and kind == "hangs-in-load":
            time.sleep(600)
        built = torch.nn.Linear(layer.shape.in_features, layer.shape.out_features, bias=layer.bias is not None)
        built.weight = torch.nn.Parameter(layer.tensors["weight"].to(layer.dtype), requires_grad=False)
        if layer.bias is not None:
            built.bias = torch.nn.Parameter(layer.bias, requires_grad=False)

        calls = []
        def fail(module, inputs):
            calls.append(None)
            if len(calls) < 5:
                return
            if kind == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            if kind == "exits":
                os._exit(0)
            if kind == "out-of-memory":
                raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 GiB")
        if here:
            built.register_forward_pre_hook(fail)
        return built

    def expected_bits(self, shape):
        return 16.0
'''
ENTRY_POINTS = "[qlora_bench.backends]\nunruly = unruly_backends:Unruly\n"
DDP = ("--placement", "ddp", "--device-count", "2", "--set", "cpu_threads=1")
FAILURES = {
    "unruly-raises-in-load": ("error", "load", "rank 1: RuntimeError: planted failure"),
    "unruly-killed": ("crashed", "train", "rank 1 was ended by SIGKILL"),
    "unruly-exits": ("crashed", "train", "rank 1 ended and told no outcome"),
    "unruly-out-of-memory": ("out_of_memory", "train", "rank 1: OutOfMemoryError"),
}

LONG = ("unruly-exits", "unruly-out-of-memory", "unruly-raises-in-load")


@pytest.fixture(scope="module")
def unruly(tmp_path_factory: pytest.TempPathFactory) -> Command:
    """The command where somebody has installed the backends above."""
    site = tmp_path_factory.mktemp("unruly")
    (site / "unruly_backends.py").write_text(MODULE, encoding="utf-8")
    metadata = site / "unruly_backends-1.0.dist-info"
    metadata.mkdir()
    (metadata / "METADATA").write_text("Metadata-Version: 2.1\nName: unruly-backends\nVersion: 1.0\n")
    (metadata / "entry_points.txt").write_text(ENTRY_POINTS)
    return Command(tmp_path_factory.mktemp("cache"), site)


@pytest.fixture(scope="module")
def failed(unruly: Command, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], dict[str, Any]]:
    """The record of a kind of failure, run once."""

    @functools.cache
    def record_of(backend: str) -> dict[str, Any]:
        out = tmp_path_factory.mktemp("failures") / "records"
        done = unruly.run("run", "--preset", "tiny", "--backend", backend, *DDP, "--out", out, "--json",
                          timeout=500)  # fmt: skip
        assert done.returncode == 1, done.stderr
        (body,) = json.loads(done.stdout)
        return body

    return record_of


@pytest.mark.parametrize(
    "backend", [pytest.param(name, marks=pytest.mark.soak if name in LONG else ()) for name in FAILURES]
)
def test_a_failing_rank_is_named(failed: Callable[[str], dict[str, Any]], backend: str) -> None:
    """And not the one that waited for it, though that one may have told an error too."""
    body, (status, stage, message) = failed(backend), FAILURES[backend]
    assert (body["status"], body["stage"]) == (status, stage), body["message"]
    assert message in body["message"]
    if backend == "unruly-raises-in-load":
        assert "planted failure" in body["stderr_tail"]


def test_what_was_told_before_is_kept(failed: Callable[[str], dict[str, Any]]) -> None:
    """Each linear layer is computed twice a step, so the fifth forward is in the third step."""
    body = failed("unruly-killed")
    assert body["exit_code"] == -signal.SIGKILL
    assert [len(step["losses"]) for step in body["steps"]] == [2, 2]
    assert [place["rank"] for place in body["placement"]["places"]] == [0, 1]


def test_no_process_is_left(failed: Callable[[str], dict[str, Any]], unruly: Command) -> None:
    assert failed("unruly-killed")
    assert list(processes_of(unruly)) == []


@pytest.mark.soak  # waits 45 s, so that a slow start is no hang; of one process, test_failures does it in 15
def test_a_hanging_rank_times_out(unruly: Command, out: Path) -> None:
    (body,) = unruly.json("run", "--preset", "tiny", "--backend", "unruly-hangs-in-load", *DDP,
                          "--timeout-seconds", "45", "--out", out)  # fmt: skip
    assert (body["status"], body["stage"]) == ("timeout", "load")
    assert "45 s" in body["message"]
    assert "rank 1 in load" in body["message"]
    assert list(processes_of(unruly)) == []


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_no_rank_outlives_its_command(unruly: Command, out: Path, sent: signal.Signals) -> None:
    arguments = unruly.arguments("run", "--preset", "tiny", "--backend", "unruly-hangs-in-load", *DDP, "--out", out)  # fmt: skip
    process = subprocess.Popen(arguments, env=unruly.environment, stdout=subprocess.PIPE,
                               stderr=subprocess.PIPE, text=True,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL))  # noqa: PLW1509 # fmt: skip
    try:
        until(lambda: len([p for p in processes_of(unruly) if "bench.run.worker" in p.cmdline()]) >= 2, 60)
        process.send_signal(sent)
        process.communicate(timeout=60)
    finally:
        process.kill()
        process.wait()
    until(lambda: not list(processes_of(unruly)), 30)
    if sent == signal.SIGINT:
        assert process.returncode == 130
        (body,) = unruly.json("runs", out)
        assert body["status"] == "interrupted"


def processes_of(command: Command) -> Iterator[psutil.Process]:
    """Processes that see the folder of the command's strangers."""
    for process in psutil.process_iter():
        try:
            if str(command.extra_path) in process.environ().get("PYTHONPATH", ""):
                yield process
        except psutil.Error:
            continue


def until(holds: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline
        time.sleep(0.2)


def test_the_readme_says_which_backend_allows_which_placement() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    table = text.partition("| backend | `split` | `ddp` | `fsdp` |\n")[2].partition("\n\n")[0]
    said = [re.findall(r"[\w-]+", row) for row in table.splitlines()[1:]]
    placements: tuple[Placement, ...] = ("split", "ddp", "fsdp")
    assert sorted(said) == sorted(
        [name, *("no" if kind in entry.backend.refused_placements else "yes" for kind in placements)]
        for name, entry in find_backends().items()
    )


# ---- merging, without processes -------------------------------------------------------------------


def step(index: int, rank: int, **changes: Any) -> dict[str, Any]:
    probe = {"activation_abs_max": [1.0 + rank], "gradient_abs_max": [None], "tensor_norms": [1.0]}
    return {
        "index": index, "losses": [rank, 10 + rank], "seconds": 1.0 + rank, "tokens": 5, "loss_tokens": 3,
        "gradient_norm": 2.0, "applied": True, "loss_scale": None, "peak_reserved_bytes": None,
        "resident_bytes": 100 * rank, "probe": probe, **changes,
    }  # fmt: skip


def told(*events: tuple[int, dict[str, Any]]) -> tuple[Told, list[Any]]:
    ranks, one = Ranks(2), Told()
    heard = [event for rank, event in events for event in ranks.take(rank, event)]
    ranks.settle(one)
    return one, heard


DONE = {"event": "outcome", "status": "completed", "message": None, "at": 1.0}


def test_losses_stand_in_the_stream_s_order() -> None:
    one, heard = told(
        *((rank, {"event": "step", "step": step(0, rank)}) for rank in (1, 0)), (0, DONE), (1, DONE)
    )
    assert one.status == "completed"
    (merged,) = one.steps
    assert merged["losses"] == [0, 1, 10, 11]
    assert (merged["seconds"], merged["tokens"], merged["loss_tokens"]) == (2.0, 10, 6)
    assert merged["resident_bytes"] == 100
    assert merged["probe"]["activation_abs_max"] == [2.0]
    assert [event["event"] for event in heard] == ["step"]
    assert one.sections["proof"]["ranks_agree"] is True


@pytest.mark.parametrize("changes", [{"gradient_norm": 2.5}, {"applied": False}, {"loss_scale": 4.0}])
def test_ranks_that_disagree_are_an_error(changes: dict[str, Any]) -> None:
    steps = [
        (0, {"event": "step", "step": step(0, 0)}),
        (1, {"event": "step", "step": step(0, 1, **changes)}),
    ]
    one, _ = told(*steps, (0, DONE), (1, DONE))
    assert one.status == "error"
    assert f"{next(iter(changes))} of step 0 is not the same on all ranks" in (one.message or "")
    assert one.sections["proof"]["ranks_agree"] is False


def test_a_norm_that_is_not_a_number_is_the_same_on_all_ranks() -> None:
    steps = [(rank, {"event": "step", "step": step(0, rank, gradient_norm="NaN")}) for rank in (0, 1)]
    assert told(*steps, (0, DONE), (1, DONE))[0].status == "completed"


@pytest.mark.parametrize("name", ["weights_digest", "initial_digest", "digest"])
def test_ranks_that_hold_other_values_are_an_error(name: str) -> None:
    section = {"weights_digest": "load", "initial_digest": "lora", "digest": "workload"}[name]
    told_each = [(rank, {"event": "section", "name": section, "value": {name: str(rank)}}) for rank in (0, 1)]
    one, _ = told(*told_each, (0, DONE), (1, DONE))
    assert one.message == f"{section}.{name} is not the same on all ranks"


def test_the_rank_that_ended_silently_goes_before_the_one_that_noticed() -> None:
    """Its pipe's end is seen a little later than the error that it caused."""
    ranks = Ranks(2)
    list(ranks.take(0, {"event": "outcome", "status": "error", "message": "connection closed", "at": 10.0}))
    ranks.closed(1, 10.1)
    assert ranks.failing == 1
    # One that the launcher ended because of another's error was ended later.
    ranks.closed(1, 11.1)
    assert ranks.failing == 0
