"""Runs as tasks of a real Ray cluster: two nodes on this machine, one of them killed, commands interrupted."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import psutil
import pytest

from tests.command import ROOT, Command

pytestmark = [pytest.mark.soak, pytest.mark.filterwarnings("default")]
REPEATS = 12
PLAN = ("--preset", "tiny", "--backend", "bf16,eetq", "--device", "cpu", "--repeats", str(REPEATS), "--steps", "2",
        "--set", "workload.warmup_steps=1", "--set", "cpu_threads=1")  # fmt: skip
RUNS = 2 * REPEATS
START = "import signal; signal.signal(signal.SIGINT, signal.SIG_DFL)"
"""A shell that started the tests in the background had them ignore SIGINT, and children inherit that."""


@pytest.fixture
def own(tmp_path: Path) -> Iterator[Command]:
    """A command with a cache that no other test uses: its processes are known by it."""
    mine = Command(tmp_path / "cache")
    yield mine
    for process in workers_of(mine):
        process.kill()


@pytest.fixture
def cluster(own: Command, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """Two nodes with one processor each; their environment is the command's."""
    from ray.cluster_utils import Cluster

    for name, value in own.environment.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    # As docs/machines.md has clusters started, and as the command starts its own.
    monkeypatch.setenv("RAY_memory_monitor_refresh_ms", "0")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    node = {"num_cpus": 1, "object_store_memory": 100 * 10**6}
    made = Cluster(initialize_head=True, head_node_args={**node, "include_dashboard": False})
    made.second = made.add_node(**node)
    yield made
    made.shutdown()


def workers_of(command: Command) -> list[psutil.Process]:
    """Worker processes that a command of this cache left or has."""
    found = []
    for process in psutil.process_iter():
        try:
            if "bench.run.worker" in process.cmdline() and process.environ().get("QLORA_BENCH_CACHE") == str(command.cache):
                found.append(process)
        except psutil.Error:
            continue
    return found


def wait_for(what: Callable[[], Any], seconds: float) -> Any:
    deadline = time.monotonic() + seconds
    while not (found := what()):
        assert time.monotonic() < deadline, "it did not happen in time"
        time.sleep(0.2)
    return found


def same_part(record: dict[str, Any]) -> dict[str, Any]:
    """What must not depend on where a run was done."""
    return {
        **{name: record[name] for name in ("key", "command", "request", "status", "stage", "message", "quantization",
                                           "lora", "workload", "proof", "trainable_weights_finite")},
        "digest": record["load"]["weights_digest"],
        "environment": {k: v for k, v in record["environment"].items() if k != "total_memory_bytes"},
        "steps": [{k: step[k] for k in ("index", "losses", "gradient_norm", "tokens", "applied", "learning_rate")}
                  for step in record["steps"]],
    }  # fmt: skip


def recorded(folder: Path) -> dict[str, dict[str, Any]]:
    found = [json.loads(path.read_text()) for path in folder.rglob("*.record.json")]
    by_key = {one["key"]: one for one in found}
    assert len(by_key) == len(found)
    return by_key


def test_two_nodes_make_the_records_that_one_machine_makes(own: Command, cluster: Any, tmp_path: Path) -> None:
    there = own.run("run", *PLAN, "--executor", "ray", "--ray-address", cluster.address, "--out", tmp_path / "ray",
                    timeout=1800)  # fmt: skip
    assert there.returncode == 0, there.stdout + there.stderr
    here = own.run("run", *PLAN, "--out", tmp_path / "local", timeout=1800)
    assert here.returncode == 0, here.stdout + here.stderr
    far, near = recorded(tmp_path / "ray"), recorded(tmp_path / "local")
    assert len(far) == RUNS
    assert {key: same_part(one) for key, one in far.items()} == {key: same_part(one) for key, one in near.items()}
    # Both nodes are this machine: two at a time share it, and each says with whom.
    assert all(not one["shared_machine_with"] for one in near.values())
    for key, one in far.items():
        for other in one["shared_machine_with"]:
            assert key in far[other]["shared_machine_with"]
    assert sum(bool(one["shared_machine_with"]) for one in far.values()) >= RUNS - 2


def test_a_node_that_dies_half_way_costs_no_run(own: Command, cluster: Any, tmp_path: Path) -> None:
    out = tmp_path / "out"
    log = (tmp_path / "log").open("w")
    arguments = own.arguments("run", *PLAN, "--executor", "ray", "--ray-address", cluster.address, "--out", out)
    with log, subprocess.Popen(arguments, env=own.environment, cwd=ROOT, stdout=log, stderr=log) as process:
        try:
            wait_for(lambda: len(list(out.glob("*.record.json"))) >= RUNS // 2, 900)
            before = {path.name: path.stat().st_mtime_ns for path in out.glob("*.record.json")}
            cluster.remove_node(cluster.second, allow_graceful=False)
            assert process.wait(1200) == 0, (tmp_path / "log").read_text()
        finally:
            process.kill()
    made = recorded(out)
    assert len(made) == RUNS
    assert {one["status"] for one in made.values()} == {"completed"}
    assert {name: (out / name).stat().st_mtime_ns for name in before} == before  # nothing was recorded again
    text = (tmp_path / "log").read_text()
    assert text.count("completed in") == RUNS
    assert not workers_of(own)


def test_the_overhead_of_a_run_is_below_three_seconds(own: Command, tmp_path: Path) -> None:
    plan = ("--preset", "tiny", "--backend", "eetq", "--device", "cpu", "--repeats", "6", "--steps", "2",
            "--set", "workload.warmup_steps=1")  # fmt: skip
    took, outside = {}, {}
    for executor in ("local", "ray"):
        began = time.monotonic()
        done = own.run("run", *plan, "--executor", executor, "--out", tmp_path / executor, timeout=600)
        took[executor] = time.monotonic() - began
        assert done.returncode == 0, done.stdout + done.stderr
        # Runs are one after another here. What else this machine does meanwhile makes them longer by more than Ray
        # costs, so that the time within them is no part of the difference.
        within = [one["wall_seconds"] for one in recorded(tmp_path / executor).values()]
        assert len(within) == 6
        outside[executor] = took[executor] - sum(within)
    overhead = (outside["ray"] - outside["local"]) / 6
    print(f"overhead per run: {overhead:.2f} s (outside the runs: {outside}; in all: {took})")
    assert overhead < 3


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGKILL])
def test_a_command_that_is_stopped_leaves_no_worker(own: Command, tmp_path: Path, sent: signal.Signals) -> None:
    out = tmp_path / "out"
    arguments = own.arguments("run", "--preset", "tiny", "--backend", "eetq", "--device", "cpu", "--steps", "100000",
                              "--executor", "ray", "--out", out)  # fmt: skip
    code = f"{START}; import os, sys; os.execv(sys.executable, {arguments!r})"
    process = subprocess.Popen([sys.executable, "-c", code], env=own.environment, cwd=ROOT, text=True,
                               start_new_session=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)  # fmt: skip
    try:
        wait_for(lambda: workers_of(own), 120)
        time.sleep(8)  # it trains
        if sent == signal.SIGINT:
            os.killpg(process.pid, sent)  # as a terminal does
        else:
            process.send_signal(sent)
        _, errors = process.communicate(timeout=60)
    finally:
        process.kill()
    wait_for(lambda: not workers_of(own), 30)
    if sent == signal.SIGINT:
        assert process.returncode == 130, errors
        assert "interrupted: finished records are kept" in errors
        (record,) = recorded(out).values()
        assert (record["status"], record["message"]) == ("interrupted", "stopped by the user")
        assert record["stage"] != "launch"
        assert record["environment"] is not None  # what was told until then is kept
    else:
        assert recorded(out) == {}


def test_a_model_and_a_relative_path_are_found_on_the_node(own: Command, tmp_path: Path) -> None:
    from tests.checkpoint import make_checkpoint

    make_checkpoint(tmp_path / "model")
    out = tmp_path / "out"
    arguments = ("run", "--preset", "tiny", "--model", "model", "--backend", "bf16", "--device", "cpu", "--steps", "2",
                 "--set", "workload.warmup_steps=1", "--set", "fidelity=off", "--executor", "ray", "--out", out)  # fmt: skip
    done = own.run(*arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    (record,) = recorded(out).values()
    assert record["status"] == "completed"


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--ray-address", "127.0.0.1:1"), "no Ray cluster answers at '127.0.0.1:1'; start one with: ray start"),
        (("--cpus-per-run", "9999"), "no node of the cluster has the 9999 CPU that a run needs"),
    ],
)
def test_a_cluster_that_cannot_do_it_is_one_line(own: Command, tmp_path: Path, flags: tuple[str, ...], words: str
                                                 ) -> None:  # fmt: skip
    line = own.refused("run", "--preset", "tiny", "--backend", "eetq", "--device", "cpu", "--executor", "ray", *flags,
                       "--out", tmp_path / "out")  # fmt: skip
    assert words in line
    assert not (tmp_path / "out").exists()
