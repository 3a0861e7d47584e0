"""Executors: what a sweep hands them and does with what they give back, and what is refused. Nothing here needs Ray.

What Ray itself does is in test_ray.py (`make soak`).
"""

from __future__ import annotations

import importlib.util
import math
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from bench.ask.conversations import file_digest
from bench.ask.models import fingerprint_folder
from bench.ask.plan import RunRequest
from bench.errors import BadValue, MissingModel, UserError
from bench.judge.comparison import compare
from bench.record.schema import Record
from bench.record.store import Store
from bench.run import launch
from bench.run.arrange import arrange
from bench.run.asked import Asked
from bench.run.cluster import no_room_message, resources_of, room_for
from bench.run.executors import Job, LocalExecutor, Needs, choose_executor
from bench.run.here import find_model_here, moved_here
from bench.run.neighbours import Neighbours
from bench.run.order import Order
from bench.run.preflight import skipped
from bench.run.ray_task import Home, Teller, carried_out, shown_part, take_over
from bench.run.ray_task import Outcome as TaskOutcome
from bench.run.sweep import Sweep, run_sweep
from bench.show.progress import Silent
from tests.command import Command
from tests.fake_worker import record_of
from tests.record_factory import record, request

Outcome = Callable[[RunRequest], dict[str, Any]]


class Together:
    """An executor of several runs at a time, of which the last that was taken ends first."""

    examines_cards = True

    def __init__(self, room: int, outcome: Outcome = lambda request: {}, stop_after: int | None = None) -> None:
        self.room, self.outcome, self.stop_after = room, outcome, stop_after
        self.taken: list[str] = []

    def __enter__(self) -> Together:
        return self

    def __exit__(self, *_: object) -> None:
        pass

    def refuse(self, requests: object) -> None:
        pass

    def run(self, jobs: Iterator[Job | Record]) -> Iterator[Record]:
        under_way: list[RunRequest] = []
        ended = 0
        while True:
            while len(under_way) < self.room and (job := next(jobs, None)) is not None:
                if isinstance(job, Record):
                    yield job
                    continue
                assert job.order().request == job.request
                self.taken.append(job.request.key)
                under_way.append(job.request)
            if not under_way:
                return
            if ended == self.stop_after:
                raise KeyboardInterrupt(*(record_of(r, status="interrupted", stage="train") for r in under_way))
            yield record_of(under_way[-1], **self.outcome(under_way.pop()))
            ended += 1


@pytest.fixture
def sweep(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    monkeypatch.setenv("QLORA_BENCH_CACHE", str(tmp_path / "cache"))
    asked = Asked(preset="tiny", backends=("bf16", "eetq"), device="cpu", repeats=3, out=tmp_path / "out")
    return arrange(asked).sweep


def saved(sweep: Sweep) -> dict[str, str]:
    return {one.key: one.status for one in Store(sweep.store.folder).records()}


def test_jobs_are_taken_in_the_plans_order_as_there_is_room(sweep: Sweep) -> None:
    executor = Together(room=2)
    keys = [one.key for one in sweep.requests]
    running = run_sweep(sweep, Silent(), executor)
    first = next(running)
    assert executor.taken == keys[:2]
    assert saved(sweep) == {first.key: "completed"}  # as soon as it has ended
    ended = [first.key, *(one.key for one in running)]
    assert executor.taken == keys
    assert sorted(ended) == sorted(keys)
    assert ended != keys  # they end in another order than they began
    assert saved(sweep) == dict.fromkeys(keys, "completed")


def test_what_is_recorded_is_not_run_again_and_nothing_is_saved_twice(
    sweep: Sweep, monkeypatch: pytest.MonkeyPatch
) -> None:
    saves: list[str] = []
    save = Store.save
    monkeypatch.setattr(Store, "save", lambda store, one: (saves.append(one.key), save(store, one))[1])
    half = replace(sweep, requests=sweep.requests[:3])
    assert len(list(run_sweep(half, Silent(), Together(room=3)))) == 3
    executor = Together(room=4)
    list(run_sweep(sweep, Silent(), executor))
    assert executor.taken == [one.key for one in sweep.requests[3:]]
    assert sorted(saves) == sorted(one.key for one in sweep.requests)


def test_the_skip_rule_decides_with_what_has_ended_when_a_run_is_taken(sweep: Sweep) -> None:
    def outcome(request: RunRequest) -> dict[str, Any]:
        return {"status": "out_of_memory", "stage": "train", "steps": ()} if request.backend == "bf16" else {}

    executor = Together(room=2, outcome=outcome)
    records = list(run_sweep(replace(sweep, skip_larger=True), Silent(), executor))
    by_run = {(r.request.backend, r.request.repeat): r.status for r in records}
    assert by_run[("bf16", 0)] == "out_of_memory"
    assert by_run[("bf16", 2)] == "skipped"
    assert [by_run[("eetq", repeat)] for repeat in range(3)] == ["completed"] * 3
    assert len(records) == len(sweep.requests)


def test_every_interrupted_run_is_recorded_and_the_same_command_goes_on(sweep: Sweep) -> None:
    with pytest.raises(KeyboardInterrupt):
        list(run_sweep(sweep, Silent(), Together(room=3, stop_after=1)))
    assert sorted(saved(sweep).values()) == ["completed", "interrupted", "interrupted", "interrupted"]
    executor = Together(room=3)
    list(run_sweep(sweep, Silent(), executor))
    assert len(executor.taken) == 5
    assert set(saved(sweep).values()) == {"completed"}


def test_repeating_what_is_interrupted_costs_no_record(sweep: Sweep) -> None:
    list(run_sweep(sweep, Silent(), Together(room=1)))
    before = {path: path.read_bytes() for path in sweep.store.folder.iterdir()}
    with pytest.raises(KeyboardInterrupt):
        list(run_sweep(replace(sweep, force=True), Silent(), Together(room=2, stop_after=0)))
    assert {path: path.read_bytes() for path in sweep.store.folder.iterdir()} == before


def test_repeating_what_can_be_run_no_more_costs_no_record(sweep: Sweep, monkeypatch: pytest.MonkeyPatch) -> None:
    list(run_sweep(sweep, Silent(), Together(room=1)))
    monkeypatch.setattr("bench.run.sweep.obstacle", lambda request, entry: "its library is gone")
    ended = list(run_sweep(replace(sweep, force=True), Silent(), Together(room=1)))
    assert {one.status for one in ended} == {"unavailable"}
    assert set(saved(sweep).values()) == {"completed"}


@pytest.mark.parametrize("when", ["while it is written", "while it is put together"])
def test_ctrl_c_does_not_tear_a_record(sweep: Sweep, monkeypatch: pytest.MonkeyPatch, when: str) -> None:
    def pressed(function: Callable[..., Any]) -> Callable[..., Any]:
        def during(*given: Any, **named: Any) -> Any:
            signal.raise_signal(signal.SIGINT)
            return function(*given, **named)

        return during

    (first, *_) = sweep.requests
    where, name = {"while it is written": (os, "fsync"), "while it is put together": (launch, "record_of")}[when]
    monkeypatch.setattr(where, name, pressed(getattr(where, name)))
    monkeypatch.setattr(launch, "_work", lambda order, told, *_: told.fail("planted") or launch.NO_WORKER)
    heard = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with pytest.raises(KeyboardInterrupt):
            list(run_sweep(sweep, Silent()))
    finally:
        signal.signal(signal.SIGINT, heard)
    assert saved(sweep) == {first.key: "error"}


def test_an_executor_keeps_what_it_found_about_the_cards(sweep: Sweep) -> None:
    found = skipped()
    on_cards = [one.model_copy(update={"device": "cuda"}) for one in sweep.requests[:1]]
    executor = Together(room=1, outcome=lambda request: {"preflight": found})
    (made,) = run_sweep(replace(sweep, requests=on_cards), Silent(), executor)
    assert made.preflight == found


# ---- what is asked for ---------------------------------------------------------------------------


def test_local_is_the_default() -> None:
    assert isinstance(choose_executor(), LocalExecutor)


@pytest.mark.parametrize(
    ("name", "flags", "words"),
    [
        ("rya", {}, "unknown executor 'rya'; did you mean 'ray'?"),
        ("local", {"address": "auto"}, "--ray-address says something about a Ray cluster; add --executor ray"),
        ("local", {"gpus": 1}, "--gpus-per-run says"),
        ("local", {"memory": "1GB"}, "--memory-per-run says"),
        ("ray", {"gpus": -1}, "--gpus-per-run -1: expected a whole number from 1 on"),
        ("ray", {"cpus": 0}, "--cpus-per-run 0: expected"),
        ("ray", {"memory": "-4GB"}, "--memory-per-run '-4GB' is not a size"),
        ("ray", {"memory": "much"}, "for example --memory-per-run 64GB"),
        ("ray", {"address": "ray://head:10001"}, "is not of the form HOST:PORT"),
        ("ray", {"address": "head"}, "is not of the form HOST:PORT"),
    ],
)
def test_bad_input_is_one_line(name: str, flags: dict[str, Any], words: str) -> None:
    with pytest.raises(BadValue) as refused:
        choose_executor(name, **flags)
    assert words in str(refused.value)


def test_without_ray_the_line_that_installs_it_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name, *rest: None if name == "ray" else find(name, *rest))
    with pytest.raises(UserError, match=r"needs ray; install with: pip install 'qlora-bench\[ray\]'"):
        choose_executor("ray", address="auto")


def test_a_wrong_executor_ends_the_command_with_one_line(command: Command, tmp_path: Path) -> None:
    line = command.refused("run", "--preset", "tiny", "--executor", "rya", "--out", tmp_path / "out")
    assert line == "qlora-bench: unknown executor 'rya'; did you mean 'ray'?"
    assert not (tmp_path / "out").exists()


def test_cards_are_planned_for_on_a_machine_without_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_BENCH_CACHE", str(tmp_path))
    monkeypatch.setattr("bench.run.arrange.cuda_devices", tuple)
    asked = Asked(preset="tiny", backends=("bf16",), executor="ray", out=tmp_path / "out")
    (one,) = arrange(replace(asked, device="cuda")).sweep.requests
    assert (one.device, one.device_count) == ("cuda", 1)
    (one,) = arrange(replace(asked, gpus_per_run=2)).sweep.requests  # whoever keeps cards wants to use one
    assert (one.device, one.device_count, one.placement) == ("cuda", 1, "single")
    (one,) = arrange(replace(asked, gpus_per_run=4, placement="split")).sweep.requests
    assert (one.device_count, one.placement) == (4, "split")
    assert arrange(asked).sweep.requests[0].device == "cpu"
    with pytest.raises(BadValue, match="these runs are on the CPU; use --device cuda"):
        arrange(replace(asked, device="cpu", gpus_per_run=1))
    with pytest.raises(BadValue, match="--gpus-per-run 1: a run uses 2 cards"):
        arrange(replace(asked, placement="split", device_count=2, gpus_per_run=1))
    with pytest.raises(BadValue, match="no CUDA device was found"):
        arrange(replace(asked, executor="local", device="cuda"))


# ---- room ----------------------------------------------------------------------------------------


def test_what_a_run_takes_follows_from_it_unless_it_is_said() -> None:
    on_cpu = request("bf16", device="cpu", cpu_threads=4)
    on_card = request("bf16", cpu_threads=32)
    assert resources_of(on_cpu, Needs()) == {"CPU": 4, "GPU": 0, "memory": 0}
    assert resources_of(on_card, Needs()) == {"CPU": 1, "GPU": 1, "memory": 0}
    split = on_card.model_copy(update={"placement": "ddp", "device_count": 2})
    assert resources_of(split, Needs()) == {"CPU": 2, "GPU": 2, "memory": 0}
    assert resources_of(on_card, Needs(7, 8, 10**9)) == {"CPU": 8, "GPU": 7, "memory": 10**9}


def test_room_is_counted_node_by_node() -> None:
    boxes = [{"CPU": 32.0, "GPU": 7.0}, {"CPU": 4.0, "GPU": 7.0}, {"CPU": 64.0}]
    assert room_for({"CPU": 1, "GPU": 1, "memory": 0}, boxes) == 11
    assert room_for({"CPU": 2, "GPU": 4, "memory": 0}, boxes) == 2  # 14 cards, of which no 12 are in one box
    assert room_for({"CPU": 65, "GPU": 0, "memory": 0}, boxes) == 0
    said = no_room_message({"CPU": 2, "GPU": 8, "memory": 0}, boxes)
    assert said == (
        "no node of the cluster has the 2 CPU, 8 GPU that a run needs (nodes: 32 CPU, 7 GPU; 4 CPU, 7 GPU; 64 CPU)"
    )


def test_of_two_runs_that_overlap_each_has_the_other() -> None:
    neighbours = Neighbours()
    neighbours.began("a", "box")
    neighbours.began("b", "box")
    neighbours.began("c", "other box")
    assert neighbours.ended("a") == ("b",)
    neighbours.began("d", "box")
    assert neighbours.ended("b") == ("a", "d")
    assert neighbours.ended("d") == ("b",)
    assert neighbours.ended("c") == ()
    assert neighbours.ended("never began") == ()


def test_a_run_that_starts_again_elsewhere_forgets_whom_it_had_beside_it() -> None:
    neighbours = Neighbours()
    neighbours.began("a", "box")
    neighbours.began("b", "box")
    neighbours.began("b", "other box")
    assert neighbours.has_begun("b")
    assert neighbours.ended("b") == ()
    assert neighbours.ended("a") == ("b",)


# ---- what the comparison makes of it -------------------------------------------------------------


def test_runs_that_shared_their_machine_stand_apart_from_those_that_did_not() -> None:
    alone = [record("bf16"), record("hqq")]
    assert len(compare(alone).groups) == 1
    together = [one.model_copy(update={"shared_machine_with": (f"other {one.key}",)}) for one in alone]
    assert len(compare(together).groups) == 1  # all in the same way, whoever it was
    mixed = compare([alone[0], together[1]])
    assert len(mixed.groups) == 2
    assert len(compare([alone[0], together[1]], allow={"sharing"}).groups) == 1


# ---- on the node ---------------------------------------------------------------------------------


def test_a_model_is_found_by_its_fingerprint_wherever_it_lies(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("QLORA_BENCH_CACHE", str(tmp_path / "cache"))
    there, mine = tmp_path / "there", tmp_path / "cache" / "models" / "mine"
    mine.mkdir(parents=True)
    (mine / "config.json").write_text('{"model_type": "qwen2"}')
    save_file({"weight": np.zeros(4, dtype=np.float32)}, mine / "model.safetensors")
    model = request("bf16").model.model_copy(
        update={"name": "local/mine", "fingerprint": fingerprint_folder(mine)}
    )
    assert find_model_here(model, there) == mine
    shutil.copytree(mine, there)
    assert find_model_here(model, there) == there  # a disk that both machines have
    shutil.rmtree(there)
    other = model.model_copy(update={"fingerprint": "0" * 64})
    with pytest.raises(MissingModel) as missing:
        find_model_here(other, there)
    line = str(missing.value)
    assert line.startswith("model 'local/mine' with fingerprint 000000000000 is not on ")
    assert f"'{mine}' holds another one ({model.fingerprint[:12]})" in line
    assert "make it here with: make mine" in line
    assert f"copy '{there}'" in line


def test_training_text_that_is_not_here_is_named(tmp_path: Path) -> None:
    file = tmp_path / "text.jsonl"
    file.write_text("{}\n")
    wanted = request("bf16", device="cpu")
    work = wanted.workload.model_copy(update={"data": str(file)})
    wanted = wanted.model_copy(update={"workload": work, "data_digest": file_digest(file)})
    order = Order(request=wanted, model_folder=None)
    assert moved_here(order).request == wanted
    file.write_text("{} \n")
    with pytest.raises(UserError, match=r"is another file \([0-9a-f]{12}\) on .*; copy it to the same path here"):
        moved_here(order)
    file.unlink()
    with pytest.raises(UserError, match=r"the data file '.*text.jsonl' \(SHA-256 [0-9a-f]{12}\) is not on "):
        moved_here(order)


def test_a_run_whose_model_is_not_on_the_node_is_one_unavailable_row(tmp_path: Path) -> None:
    told: list[Any] = []
    order = Order(request=request("bf16", device="cpu"), model_folder=tmp_path / "nowhere")
    home = Home(folder=tmp_path, omp_num_threads=None, preflight=True)
    made = carried_out(order, home, Teller(SimpleNamespace(put=told.append), "key"), None)
    assert (made.status, made.stage) == ("unavailable", "launch")
    assert made.message is not None
    assert "fetch it here with: hf download Qwen/Qwen2-7B-Instruct" in made.message


def test_what_is_not_finite_comes_back_as_it_was() -> None:
    nan = record("hqq", steps=(record("hqq").steps[0].model_copy(update={"losses": (math.nan, math.inf)}),))
    back = TaskOutcome.model_validate_json(TaskOutcome(record=nan, cards="").model_dump_json()).record
    assert back.model_dump_json() == nan.model_dump_json()
    assert math.isnan(back.steps[0].losses[0])


def test_a_task_runs_as_its_command_would(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")  # as Ray sets it
    (tmp_path / "there").mkdir()
    take_over(Home(folder=tmp_path / "there", omp_num_threads=None, preflight=True))
    assert "OMP_NUM_THREADS" not in os.environ
    assert Path.cwd() == tmp_path / "there"
    take_over(Home(folder=tmp_path / "not here", omp_num_threads="3", preflight=True))
    assert os.environ["OMP_NUM_THREADS"] == "3"


def test_events_are_sent_without_what_nobody_looks_at_and_a_dead_queue_stops_nothing() -> None:
    step = {"index": 0, "losses": [1.0], "tokens": 5, "seconds": 0.1, "gradient_norm": 1.0, "probe": ["much"]}
    assert "probe" not in shown_part({"event": "step", "step": step})["step"]

    class Box:
        def __init__(self, error: Exception | None = None) -> None:
            self.held: list[Any] = []
            self.error = error

        def put(self, item: Any, block: bool = True) -> None:
            if self.error:
                raise self.error
            self.held.append(item)

    box = Box()
    teller = Teller(box, "key")
    teller.listen({"event": "section", "name": "load", "value": {}})
    teller.listen({"event": "stage", "name": "train"})
    assert box.held == [("key", "event", {"event": "stage", "name": "train"})]
    Teller(Box(RuntimeError("gone")), "key").listen({"event": "stage", "name": "train"})
