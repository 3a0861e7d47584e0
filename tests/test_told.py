"""What becomes a record of what a worker told, whatever it told."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bench.record.schema import Record
from bench.run.order import Order
from bench.run.told import OF_A_COMPLETE_RUN, Ending, Told, record_of
from bench.run.worker import _message_of, _status_of
from tests.command import ROOT
from tests.record_factory import record, request

REQUEST = request("bf16", device="cpu")
WELL = Ending(exit_code=0, timed_out=False, stderr_tail=None)


def told(**changes: Any) -> Told:
    """What a worker tells that trains to the end."""
    made = json.loads(record("bf16", request=REQUEST).model_dump_json())
    steps = [{**made["steps"][0], "index": index} for index in range(REQUEST.workload.steps)]
    sections = {name: made[name] for name in (*OF_A_COMPLETE_RUN, "proof")}
    values = {"stage": "train", "status": "completed", "steps": steps, "sections": sections}
    return Told(**{**values, **changes})


def made_of(what: Told, ending: Ending = WELL) -> Record:
    order = Order(request=REQUEST, model_folder=None)
    return record_of(order, what, ending, False, None, "2026-11-27T00:00:00+00:00", 1.0)


def test_a_run_that_was_told_whole_is_complete() -> None:
    made = made_of(told())
    assert (made.status, made.message, len(made.steps)) == ("completed", None, REQUEST.workload.steps)


@pytest.mark.parametrize("section", OF_A_COMPLETE_RUN)
def test_a_run_without_one_of_its_parts_is_not_complete_whatever_it_says(section: str) -> None:
    what = told()
    del what.sections[section]
    made = made_of(what)
    assert (made.status, made.stage) == ("crashed", "train")
    assert made.message == f"the worker said that the run was complete and told nothing of: {section}"


def test_a_run_with_a_step_too_few_is_not_complete() -> None:
    what = told()
    what.steps.pop()
    made = made_of(what)
    assert made.status == "crashed"
    assert f"after {len(what.steps)} of {REQUEST.workload.steps} steps" in str(made.message)
    assert len(made.steps) == len(what.steps), "those that there were are kept"


@pytest.mark.parametrize(
    ("part", "value"),
    [("load", {"speed": 1}), ("environment", 3), ("lora", []), ("proof", {"quantized": "perhaps"})],
)
def test_a_part_that_is_none_costs_itself_alone(part: str, value: Any) -> None:
    what = told()
    what.sections[part] = value
    made = made_of(what)
    assert made.status == "crashed"
    assert str(made.message).startswith(f"the worker told something that is no record: {part}")
    assert made.workload is not None
    assert len(made.steps) == REQUEST.workload.steps


def test_a_run_that_failed_says_why_also_where_a_part_of_it_is_none() -> None:
    what = told(status="out_of_memory", message="no room")
    what.sections["load"] = {"speed": 1}
    made = made_of(what)
    assert (made.status, made.message, made.load) == ("out_of_memory", "no room", None)


def test_spoilt_steps_and_readings_go_and_the_rest_stays() -> None:
    what = told()
    what.take({"event": "step", "step": {"index": "first"}})
    what.take({"event": "readings", "readings": "no list"})
    made = made_of(what)
    assert (made.status, made.steps, made.memory.readings) == ("crashed", (), ())
    assert made.quantization is not None


@pytest.mark.parametrize("name", ["key", "status", "request", "command", "started_at", "schema_version", "preflight"])
def test_a_worker_cannot_say_what_its_parent_knows(name: str) -> None:
    what = told()
    what.take({"event": "section", "name": name, "value": "another"})
    assert made_of(what) == made_of(told())


def test_an_outcome_and_a_stage_that_do_not_exist() -> None:
    made = made_of(told(stage="lunch", status="great"))
    assert (made.status, made.stage) == ("crashed", "launch")
    assert made.message == "the worker told an outcome that is none: 'great'"


def test_a_message_is_one_line_that_can_be_written() -> None:
    what = Told()
    what.take({"event": "outcome", "status": "error", "message": "one\ntwo \udcff"})
    made = made_of(what)
    assert made.message == "one two \\udcff"
    assert Record.model_validate_json(made.model_dump_json()) == made


def test_an_error_of_the_parent_does_not_overrule_what_the_worker_said() -> None:
    what = told()
    what.fail("could not listen any more")
    assert made_of(what).status == "completed"
    what.forget()
    what.fail("no memory")
    made = made_of(what)
    assert (made.status, made.stage, made.message, made.steps) == ("error", "train", "no memory", ())


def test_what_follows_a_complete_training_does_not_overrule_it() -> None:
    what = told()
    what.take({"event": "outcome", "status": "error", "message": "the card fell off its bus in the replay"})
    assert (made_of(what).status, made_of(what).message) == ("completed", None)


# ---- how the worker names what was raised


def test_an_outcome_is_told_though_its_traceback_can_be_written_nowhere(tmp_path: Path) -> None:
    """The scratch folder's disk is full, which may be what failed."""
    order = tmp_path / "order.json"
    order.write_text(Order(request=request("bf16", device="cuda"), model_folder=tmp_path / "none").model_dump_json())
    read_end, write_end = os.pipe()
    with Path("/dev/full").open("w", encoding="utf-8") as full:
        command = [sys.executable, "-m", "bench.run.worker", str(order), str(write_end)]
        # It ends when its parent's end of stdin closes.
        with subprocess.Popen(command, cwd=ROOT, stderr=full, stdin=subprocess.PIPE, pass_fds=[write_end]) as worker:
            os.close(write_end)
            with os.fdopen(read_end, encoding="utf-8") as events:
                last = json.loads(events.readlines()[-1])
    assert (last["event"], last["status"]) == ("outcome", "error"), worker.returncode


@pytest.mark.parametrize(
    ("error", "status"),
    [
        (MemoryError(), "out_of_memory"),
        (OSError(errno.ENOMEM, "Cannot allocate memory"), "out_of_memory"),
        (RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be"), "out_of_memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "out_of_memory"),
        (RuntimeError("[enforce fail at alloc_cpu.cpp:121] DefaultCPUAllocator: can't allocate"), "out_of_memory"),
        (RuntimeError("CUDA driver error: out of memory"), "out_of_memory"),
        (RuntimeError("Triton Error [CUDA]: out of memory"), "out_of_memory"),
        (RuntimeError("NCCL error: unhandled cuda error, Last error:\nCuda failure 2 'out of memory'"), "out_of_memory"),
        (RuntimeError("NCCL error in: ... Failed to CUDA calloc async 608 bytes"), "out_of_memory"),
        (OSError(errno.ENOSPC, "No space left on device"), "error"),
        (ImportError("undefined symbol"), "unavailable"),
        (SystemExit(3), "error"),
        (RuntimeError("memory of a better time"), "error"),
    ],
)
def test_what_was_raised_has_its_status(error: BaseException, status: str) -> None:
    assert _status_of(error) == status


def test_a_message_has_what_was_noted_on_the_way() -> None:
    error = RuntimeError("two\nlines")
    error.add_note("in the backward of step 3")
    assert _message_of(error) == "RuntimeError: two lines (in the backward of step 3)"


def test_a_broken_torch_is_named_without_importing_it_again() -> None:
    code = "from bench.run.worker import _status_of; import sys; print(_status_of(ImportError('torch'))); print('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["unavailable", "False"]
