"""The peers' session without the peers: order, arithmetic, sameness, failures, and the page."""

from __future__ import annotations

import math
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from bench.errors import UserError
from tests.command import ROOT
from tests.peers.__main__ import PAGE_FILE, read_session
from tests.peers.arithmetic import claims, tokens_per_second, within_steps
from tests.peers.arms import Place, outcome_of, run_peer
from tests.peers.cases import BY_METHOD, CASES, INLINE, OPTIMUM, OPTIMUM_TODAY, OURS, TRAINER, Arm, choose
from tests.peers.outcome import CaseFacts, Outcome, Session, StepSeen
from tests.peers.preparing import older_form
from tests.peers.sameness import TOLERANCE, compare
from tests.peers.session import estimate, order
from tests.peers.table import markdown
from tests.peers.work import Work
from tests.record_factory import record, request

WARMUP = 2


def step(place: int, seconds: float = 1.0, **changes: object) -> StepSeen:
    """One of 64 tokens, of which 30 are predicted; its end is a tenth of a second after its inside."""
    values = {"tokens": 64, "loss_tokens": 30, "loss": 3.0, "gradient_norm": 0.5, "seconds": seconds,
              "ended": (place + 1) * (seconds + 0.1)}  # fmt: skip
    return StepSeen.model_validate({**values, **changes})


def outcome(arm: str = OURS, count: int = 10, number: int = 0, **changes: object) -> Outcome:
    values = {"case": "bf16", "arm": arm, "round": number, "status": "completed", "stage": None, "message": None,
              "wall_seconds": 20.0, "steps": tuple(step(place) for place in range(count)), "data_digest": "d",
              "adapters_digest": "a", "quantized_layers": 0, "step_peak_bytes": 2**30,
              "process_peak_bytes": 2**31}  # fmt: skip
    return Outcome.model_validate({**values, **changes})


def report(steps: list[float], warmup: int, rows_per_step: int) -> dict[str, object]:
    """What optimum-benchmark's training scenario makes of step times: `Throughput.from_latency(latency, volume)`
    is ``volume / latency.mean``, and volume is the rows of all steps (0.6.0, scenarios/training/scenario.py)."""
    parts = {"overall": steps, "warmup": steps[:warmup], "train": steps[warmup:]}
    return {
        name: {
            "latency": {"total": sum(part), "count": len(part), "mean": sum(part) / len(part)},
            "throughput": {"value": len(part) * rows_per_step / (sum(part) / len(part))},
            "memory": {"max_ram": 1500.0},
        }
        for name, part in parts.items()
    }


def test_speed_is_from_step_end_to_step_end_of_the_measured_steps() -> None:
    seen = outcome()
    assert tokens_per_second(seen, WARMUP) == pytest.approx(64 / 1.1)
    assert within_steps(seen, WARMUP) == pytest.approx(64.0)


def test_a_step_end_that_was_not_seen_gives_no_speed() -> None:
    seen = outcome(count=3)
    blind = seen.model_copy(update={"steps": (*seen.steps[:2], seen.steps[2].model_copy(update={"ended": None}))})
    assert tokens_per_second(blind, WARMUP) is None
    assert tokens_per_second(seen, 3) is None


def test_optimum_benchmark_multiplies_its_throughput_by_the_number_of_steps() -> None:
    # The notes' example: 100 measured steps of a second, two rows each, are 2 rows a second and not 200.
    steps = [1.0] * 140
    own = {"report": report(steps, 40, 2), "launcher": "process", "launch_cpu_seconds": 150.0, "launch_wall_seconds": 151.0}
    seen = outcome(OPTIMUM, own=own, count=140)
    seen = seen.model_copy(
        update={"steps": tuple(s.model_copy(update={"ended": float(i)}) for i, s in enumerate(seen.steps))}
    )
    train, overall, memory, launcher = claims(seen, 40, rows_per_step=2)
    assert (train.says, train.measured, train.ratio) == (200.0, 2.0, 100.0)
    assert "200 rows / 1.0000 s" in train.why
    assert "100.00 times less" in train.why
    assert overall.ratio == pytest.approx(140.0)
    assert (memory.says, memory.measured) == (1500.0, 2**31 / 1e6)
    assert launcher.says == 150.0


def test_the_trainers_samples_per_second_hold_the_first_steps_and_all_between() -> None:
    steps = (step(0, 5.0, ended=6.0), step(1, 1.0, ended=7.5), *(step(i, 1.0, ended=7.5 + 1.25 * (i - 1)) for i in range(2, 10)))
    own = {"train_runtime": 20.0, "train_samples_per_second": 0.5, "train_loss": 3.0}
    log = {"num_input_tokens_seen": 2560.0, "train_tokens_per_second": 128.0}
    samples, tokens, speed, loss = claims(outcome(TRAINER, steps=steps, own=own, log=log), WARMUP, 1)
    assert samples.measured == pytest.approx(0.8)
    assert "10 rows / train_runtime 20.00 s" in samples.why
    assert "6.00 s are the first 2 steps and 4.00 s come before" in samples.why
    assert "the other 8 steps took 10.00 s" in samples.why
    assert (tokens.says, tokens.measured, tokens.ratio) == (2560.0, 640.0, 4.0)
    assert "640 tokens and 1,920 of padding" in tokens.why
    assert speed.measured == pytest.approx(64 / 1.25)
    assert "2,560 / 20.00 s" in speed.why
    assert (loss.says, loss.measured) == (3.0, 3.0)


def test_a_mean_loss_from_which_nan_was_filtered_stands_beside_nan() -> None:
    steps = (step(0), step(1), step(2, loss=math.nan, logged_loss=0.0), step(3, loss=math.nan, logged_loss=0.0))
    own = {"train_runtime": 5.0, "train_samples_per_second": 0.8, "train_loss": 1.5}
    *_, loss = claims(outcome(TRAINER, steps=steps, own=own), WARMUP, 1)
    assert loss.says == 1.5
    assert math.isnan(loss.measured)
    assert "2 of 4 steps were not finite, first in step 2" in loss.why


def test_a_loss_divided_by_labels_that_are_not_predicted_is_said() -> None:
    steps = tuple(step(i, divisor=31.0, loss=3.0 * 30 / 31) for i in range(4))
    own = {"train_runtime": 5.0, "train_loss": 3.0 * 30 / 31}
    *_, loss = claims(outcome(TRAINER, steps=steps, own=own), WARMUP, 1)
    assert loss.measured == pytest.approx(3.0)
    assert "step 0: 31 where 30 are predicted" in loss.why


def test_what_did_not_complete_claims_nothing() -> None:
    assert claims(outcome(TRAINER, status="crashed", own={"train_runtime": 1.0}), WARMUP, 1) == []


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"data_digest": "other"}, "other data"),
        ({"adapters_digest": "other"}, "other initial adapters"),
        ({"quantized_layers": 7}, "another number of quantized layers"),
        ({"steps": tuple(step(i, loss=3.0 * (1 + 1.5 * TOLERANCE)) for i in range(10))}, "losses differ by up to 0.0059"),
        ({"steps": tuple(step(i, loss=math.nan) for i in range(10))}, "losses differ by up to nan"),
    ],
)  # fmt: skip
def test_other_work_is_told_from_the_same(changes: dict[str, object], problem: str) -> None:
    assert compare(outcome(TRAINER), outcome()).problems == []
    assert compare(outcome(TRAINER, **changes), outcome()).problems == [problem]


def test_a_loss_that_is_nan_on_both_sides_is_the_same() -> None:
    bad = tuple(step(i, loss=math.nan) for i in range(10))
    found = compare(outcome(TRAINER, steps=bad), outcome(steps=bad))
    assert (found.problems, found.loss_difference, found.equal_losses) == ([], 0.0, 10)


def test_another_divisor_is_reckoned_with() -> None:
    steps = tuple(step(i, divisor=31.0, loss=3.0 * 30 / 31, gradient_norm=0.5 * 30 / 31) for i in range(10))
    found = compare(outcome(OPTIMUM, steps=steps), outcome())
    assert found.loss_difference == pytest.approx(0.0, abs=1e-12)
    assert found.norm_difference == pytest.approx(0.0, abs=1e-12)
    assert found.equal_losses == 10
    assert "in step 0 by 31 where 30 are predicted" in markdown(session([outcome(), outcome(OPTIMUM, steps=steps)]))


def test_arms_rotate_and_what_needs_no_repeat_is_not_repeated() -> None:
    turns = list(order(tuple(CASES.values()), 3))
    by_round = [[arm.name for place, arm in turns if (place.round, place.case) == (k, "bf16")] for k in range(3)]
    assert by_round == [
        [OURS, TRAINER, OPTIMUM, INLINE, OPTIMUM_TODAY],
        [TRAINER, OPTIMUM, INLINE, OURS],
        [INLINE, OURS, TRAINER],  # its launcher has had its two rounds
    ]
    assert [place.round for place, arm in turns if arm.name == BY_METHOD] == [0]
    assert {place.round for place, _ in turns if place.case == "bf16-no-target"} == {0}
    left = [turn for turn in turns if turn[0].round > 0]
    done = [outcome(arm.name, case=place.case) for place, arm in turns if place.round == 0]
    assert estimate(done, left) == pytest.approx(20.0 * len(left))


def test_the_committed_page_is_that_of_the_committed_session() -> None:
    folder = ROOT / "results" / "xeon-2-cores" / "peers"
    assert (folder / PAGE_FILE).read_text(encoding="utf-8") == markdown(read_session(folder))


def test_an_unknown_case_is_one_line_with_the_nearest() -> None:
    with pytest.raises(UserError, match="unknown case 'bnb-nf'; did you mean 'bnb-nf4'"):
        choose(["bnb-nf"])


# ---- what becomes of a process -------------------------------------------------------------------


def stand_in(tmp_path: Path, how: str, timeout_seconds: float = 60.0, python: str = sys.executable) -> Outcome:
    arm = Arm("a peer", "tests.stand_in_peer", "older", (how,))
    pythons = {"today": Path("/nowhere"), "older": Path(python)}
    return run_peer(arm, Place("bf16", 0), tmp_path / "work.json", tmp_path / "run", pythons, timeout_seconds)


def test_a_run_that_completes_keeps_what_it_left(tmp_path: Path) -> None:
    seen = stand_in(tmp_path, "complete")
    assert (seen.status, seen.stage, seen.quantized_layers) == ("completed", None, 0)
    assert seen.own == {"train_runtime": "Infinity"}


@pytest.mark.parametrize(
    ("how", "status", "message"),
    [
        ("raise", "error", "ImportError: cannot import name 'Gone' from 'library' (library/__init__.py)"),
        ("die", "crashed", "the process was ended by SIGKILL (the system may have run out of memory)"),
        ("nothing", "error", "it ended well and left no observed.json and no own.json"),
    ],
)
def test_a_run_that_does_not_is_a_row_with_its_stage_and_reason(
    tmp_path: Path, how: str, status: str, message: str
) -> None:
    seen = stand_in(tmp_path, how)
    assert (seen.status, seen.stage, seen.message) == (status, "load", message)
    assert seen.steps == ()


def test_a_run_that_hangs_is_ended(tmp_path: Path) -> None:
    seen = stand_in(tmp_path, "hang", timeout_seconds=1.0)
    assert (seen.status, seen.stage, seen.message) == ("timeout", "load", "no result within 1 s")


def test_no_peer_outlives_a_session_that_is_killed(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.stand_in_peer", "-", str(tmp_path), "hang"]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, cwd=ROOT, start_new_session=True)
    process.stdin.close()
    assert process.wait(30) == -signal.SIGKILL


def test_an_environment_that_is_not_there_is_said(tmp_path: Path) -> None:
    seen = stand_in(tmp_path, "complete", python=str(tmp_path / "older" / "bin" / "python"))
    assert (seen.status, seen.stage) == ("unavailable", "launch")
    assert "make peers" in seen.message


def test_a_record_of_ours_is_seen_in_the_same_terms() -> None:
    made = record("bnb-nf4")
    seen = outcome_of(made, Place("bnb-nf4", 1), {s.index: 2.0 * s.index for s in made.steps})
    assert (seen.arm, seen.round, seen.status, len(seen.steps)) == (OURS, 1, "completed", len(made.steps))
    assert [s.ended for s in seen.steps] == [2.0 * s.index for s in made.steps]
    assert seen.quantized_layers == made.quantization.layers
    assert outcome_of(record("bf16"), Place("bf16", 0), {}).quantized_layers == 0


def test_work_comes_back_as_it_was_written(tmp_path: Path) -> None:
    work = Work("m", "b", "a", "bf16", True, 8, 2, 1, 64, "sdpa", "non_reentrant", 2, 8, 16.0, ("q_proj",),
                1e-3, 0.9, 0.999, 1e-8, 0.0, None)  # fmt: skip
    assert Work.load(work.save(tmp_path / "work.json")) == work
    assert work.phase_step == 1


def test_a_configuration_is_written_so_that_older_libraries_read_the_same_model() -> None:
    today = {"model_type": "llama", "dtype": "bfloat16", "transformers_version": "5.24.0",
             "rope_parameters": {"rope_type": "default", "rope_theta": 1e5}}  # fmt: skip
    assert older_form(today) == {"model_type": "llama", "torch_dtype": "bfloat16", "rope_theta": 1e5}
    plain = {"model_type": "qwen2", "rope_theta": 1e6}
    assert older_form(plain) == plain
    with pytest.raises(ValueError, match="rope type 'yarn'"):
        older_form({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1.0}})


# ---- the page ------------------------------------------------------------------------------------


def session(outcomes: list[Outcome], rounds: int = 3) -> Session:
    asked = request("bf16", device="cpu")
    asked = asked.model_copy(update={"workload": asked.workload.model_copy(update={"warmup_steps": WARMUP})})
    return Session(
        started_at="2026-01-01T00:00:00+00:00", wall_seconds=600.0, rounds=rounds, cpu="a processor", threads=2,
        commit="0123456789abcdef", dirty=False,
        cases=(CaseFacts(name="bf16", says="not quantized", request=asked),), outcomes=tuple(outcomes),
    )  # fmt: skip


def test_the_page_has_speeds_ratios_sameness_claims_and_failures() -> None:
    own = {"report": report([1.1] * 10, WARMUP, 1)}
    rounds = range(3)
    page = markdown(
        session(
            [outcome(number=k) for k in rounds]
            + [outcome(OPTIMUM, number=k, own=own, step_peak_bytes=2**29) for k in rounds]
            + [outcome(OPTIMUM_TODAY, status="error", stage="import", message="ImportError: a|b", steps=())]
        )
    )
    speeds = next(line for line in page.splitlines() if line.startswith(f"| {OPTIMUM} "))
    assert "1.000 [1.000, 1.000]" in speeds
    assert "0.500 [0.500, 0.500]" in speeds
    assert "| the same" in page
    assert "`train.throughput.value`" in page
    assert "8.000" in next(line for line in page.splitlines() if "`train.throughput.value`" in line)
    failed = next(line for line in page.splitlines() if line.startswith(f"| {OPTIMUM_TODAY} "))
    assert "import" in failed
    assert r"a\|b" in failed


def test_a_page_is_made_of_whatever_there_is() -> None:
    failed = outcome(status="crashed", stage="train", message="the worker ended", steps=())
    assert "Did not run" in markdown(session([failed]))
    alone = markdown(session([failed, outcome(TRAINER)]))
    assert "| ? " in next(line for line in alone.splitlines() if line.startswith(f"| {TRAINER} "))
    one = markdown(session([outcome(), outcome(TRAINER)], rounds=1))
    assert "1.000 " in one
    assert "[" not in next(line for line in one.splitlines() if line.startswith(f"| {TRAINER} "))
    assert Session.model_validate_json(session([failed]).model_dump_json()) == session([failed])
