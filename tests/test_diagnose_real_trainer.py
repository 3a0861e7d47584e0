"""The step of the first NaN, recovered from the logs of real Trainer runs in which it is known."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from bench.judge.logs.diagnosis import Diagnosis, diagnose
from bench.record.logs.training_log import read_training_log
from tests import toy_trainer as toy
from tests.command import ROOT

pytestmark = pytest.mark.soak

FORMATS = ("trainer_state.json", "console.log")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the logs of every case, trained once."""
    folder = tmp_path_factory.mktemp("runs")
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "CUDA_VISIBLE_DEVICES": "",
        "OMP_NUM_THREADS": "1",
        # As on a terminal: entries and progress bars in the order in which they were written.
        "PYTHONUNBUFFERED": "1",
    }
    subprocess.run(
        [sys.executable, "-m", "tests.toy_trainer", folder], check=True, timeout=500, env=environment
    )
    return folder


def diagnosed(runs: Path, case: toy.Case, file: str, *, accumulation: bool = True) -> Diagnosis:
    log = read_training_log(runs / case.name / file)
    return diagnose(log, case.logging_steps, case.accumulation if accumulation else None)


@pytest.mark.parametrize("file", FORMATS)
@pytest.mark.parametrize("case", toy.EXACT, ids=lambda case: case.name)
def test_the_step_is_exact_where_logging_steps_and_accumulation_are_known(runs, case, file):
    found = diagnosed(runs, case, file)
    assert found.verdict == "filtered_nan"
    assert found.first_nan.step == case.step
    assert found.first_nan.fits
    assert found.first_nan.earliest >= case.step - 1
    assert found.first_nan.latest == case.step


@pytest.mark.parametrize(
    "case", [case for case in toy.EXACT if case.micro_batch > 1], ids=lambda case: case.name
)
def test_a_beginning_within_a_step_is_told_from_one_with_a_step(runs, case):
    found = diagnosed(runs, case, "trainer_state.json").first_nan
    if case.how == "one" and case.micro_batch == case.accumulation:
        # The last micro-batch of a step alone is the same as from it on.
        assert found.best.beginning.pattern == "within_a_step"
    elif case.name == "G2-N1-from_on-step7.2":
        # Half of the loss, doubled: the logged value is that of a healthy step, and only the norm is bad.
        assert found.best.beginning.pattern == "after_the_window"
    else:
        assert found.best.beginning.pattern == ("one_micro_batch" if case.how == "one" else "within_a_step")
        assert found.best.beginning.micro_batch == case.micro_batch


@pytest.mark.parametrize("file", FORMATS)
@pytest.mark.parametrize("case", (*toy.EXACT, *toy.NOISY, toy.UNEVEN), ids=lambda case: case.name)
def test_the_truth_is_among_the_candidates_where_the_accumulation_is_not_known(runs, case, file):
    found = diagnosed(runs, case, file, accumulation=False).first_nan
    if found.certain and not found.candidates:
        # The entry before is healthy and this one 0.0: no accumulation is needed to know.
        assert (found.step, case.micro_batch) == (case.step, 1)
        return
    truth = [
        c
        for c in found.candidates
        if c.beginning.step == case.step and c.beginning.accumulation == case.accumulation
    ]
    assert truth
    assert found.earliest <= case.step <= found.latest
    if found.step is not None:
        assert {c.beginning.step for c in found.candidates} == {found.step} == {case.step}


@pytest.mark.parametrize("file", FORMATS)
@pytest.mark.parametrize("case", toy.NOISY, ids=lambda case: case.name)
def test_where_the_loss_scatters_the_truth_is_in_the_interval(runs, case, file):
    found = diagnosed(runs, case, file).first_nan
    assert found.earliest <= case.step <= found.latest
    assert found.latest - found.earliest <= 2
    assert found.ordinary.scatter_is_measured


@pytest.mark.parametrize("file", FORMATS)
def test_a_shorter_last_step_of_an_epoch_is_reckoned_with(runs, file):
    found = diagnosed(runs, toy.UNEVEN, file).first_nan
    assert found.step == toy.UNEVEN.step
    assert abs(found.best.log_error) < 1e-3
    level, length, passed = found.ordinary.level, 10, 1
    closed_form = passed * level / length * ((length + 1) / (passed + 1)) ** toy.UNEVEN.accumulation
    assert closed_form > 1.2 * found.window.loss


@pytest.mark.parametrize("file", FORMATS)
def test_a_backward_pass_that_fails_within_an_entry_shows_in_the_step_after(runs, file):
    found = diagnosed(runs, toy.BACKWARD_INSIDE, file).first_nan
    assert found.step == toy.BACKWARD_INSIDE.step + 1
    assert found.best.beginning.pattern == "from_a_step"


@pytest.mark.parametrize("file", FORMATS)
def test_a_backward_pass_that_fails_in_an_entrys_last_step_shows_in_its_norm(runs, file):
    found = diagnosed(runs, toy.BACKWARD_LAST, file).first_nan
    assert found.step == toy.BACKWARD_LAST.step
    assert found.best.beginning.pattern == "after_the_window"


@pytest.mark.parametrize("file", FORMATS)
def test_a_sum_that_outgrows_float32_is_known_for_the_filters_doing(runs, file):
    found = diagnosed(runs, toy.OVERFLOWING, file)
    assert found.verdict == "filtered_nan"
    assert "Infinity" in found.reason
    assert found.first_nan.earliest <= toy.OVERFLOWING.step <= found.first_nan.latest
    unknown = diagnosed(runs, toy.OVERFLOWING, file, accumulation=False)
    assert unknown.verdict == "non_finite"
    assert any("from an accumulation of " in note for note in unknown.notes)


@pytest.mark.parametrize("file", FORMATS)
def test_without_the_filter_nan_is_seen_and_stays(runs, file):
    found = diagnosed(runs, toy.UNFILTERED, file)
    assert found.verdict == "non_finite"
    assert (found.first_nan.earliest, found.first_nan.latest) == (11, 15)
    assert all(window.loss != window.loss for window in found.log.windows[2:])
    assert found.flags.poisoned.value is True


@pytest.mark.parametrize("file", FORMATS)
def test_a_healthy_run_is_finite(runs, file):
    found = diagnosed(runs, toy.HEALTHY, file, accumulation=False)
    assert (found.verdict, found.first_nan) == ("finite", None)


@pytest.mark.parametrize("case", toy.CASES, ids=lambda case: case.name)
def test_the_console_tells_what_the_state_tells(runs, case):
    state, console = (read_training_log(runs / case.name / file) for file in FORMATS)
    assert [window.step for window in console.windows] == [window.step for window in state.windows]
    assert console.windows[0].step == case.logging_steps
    for printed, stored in zip(console.windows, state.windows, strict=True):
        assert printed.loss == pytest.approx(stored.loss, rel=5e-4, abs=1e-12, nan_ok=True)
        assert printed.gradient_norm == pytest.approx(stored.gradient_norm, rel=5e-4, nan_ok=True)
        assert printed.learning_rate == pytest.approx(stored.learning_rate, rel=5e-4)
    assert console.train_loss == pytest.approx(state.train_loss, rel=5e-4, nan_ok=True)
