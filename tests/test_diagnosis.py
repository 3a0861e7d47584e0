import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import BadValue
from bench.judge.logs.diagnosis import diagnose
from bench.judge.logs.evidence import evidence, next_steps
from bench.judge.logs.filtered_loss import beginnings
from bench.judge.logs.ordinary_loss import LARGEST_SCATTER, OrdinaryLoss
from bench.judge.logs.windows import Span, micro_batches
from bench.record.logs.logged_values import window_of
from bench.record.logs.training_log import TrainingLog
from bench.show.diagnosis import diagnosis_document, diagnosis_text
from tests.command import ROOT

NAN, INF = math.nan, math.inf


def log(*rows, step=10, first=None, **about):
    """A log of (loss, norm) or (loss, norm, rate) rows, ``step`` steps apart; step=None: no steps."""
    windows = []
    for place, row in enumerate(rows):
        entry = dict(zip(("loss", "grad_norm", "learning_rate"), row, strict=False))
        if step is not None:
            entry["step"] = (first or step) + place * step
        entry = {key: value for key, value in entry.items() if value is not None}
        windows.append(window_of(entry, f"entry {place}", str(entry)))
    return TrainingLog(path=Path("some.log"), kind="trainer_state", windows=tuple(windows), **about)


HEALTHY = ((2.31, 0.41), (2.30012, 0.38), (2.29003, 0.40), (2.28011, 0.39))
LOST = ((0.0, NAN), (0.0, NAN))


def decaying(*rows):
    """Rows with a learning rate that goes down."""
    return tuple((*row, 1e-5 * (1 - place / 100)) for place, row in enumerate(rows))


# ---- the arithmetic --------------------------------------------------------------------------------


def replay(steps):
    """What Trainer logs of a window: its own loop, line for line, on the shares of the micro-batches."""
    total, last_logged = 0.0, 0
    for global_step, shares in enumerate(steps):
        for share in shares:
            if math.isnan(share):
                total += total / (1 + global_step - last_logged)
            else:
                total += share
    return total / (len(steps) - last_logged)


def broken(sizes, loss, place, micro_batch, pattern):
    """The shares of a window in which NaN begins there."""
    steps = [[loss / size] * size for size in sizes]
    steps[place][micro_batch:] = (
        [NAN, *steps[place][micro_batch + 1 :]]
        if pattern == "one_micro_batch"
        else [NAN] * (sizes[place] - micro_batch)
    )
    return steps[: place + 1] + [[NAN] * size for size in sizes[place + 1 :]]


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.floats(0.1, 20), st.data())
def test_every_prediction_is_what_the_trainers_loop_computes(sizes, loss, data):
    place = data.draw(st.integers(0, len(sizes) - 1))
    micro_batch = data.draw(st.integers(0, sizes[place] - 1))
    pattern = data.draw(st.sampled_from(["whole", "one_micro_batch"]))
    if pattern == "whole":
        pattern = "within_a_step" if micro_batch else "from_a_step"
    logged = replay(broken(sizes, loss, place, micro_batch, pattern))
    if logged == 0 or (pattern == "one_micro_batch" and sizes[place] == 1):
        return
    target = math.log(logged / loss)
    found = {(b.step, b.pattern): b for b in beginnings(100, sizes, 9, target, lambda *_: True)}
    nearest = found[101 + place, pattern]
    assert nearest.log_factor == pytest.approx(target, abs=1e-9)
    ties = replay(broken(sizes, loss, place, nearest.micro_batch - 1, pattern))
    assert ties == pytest.approx(logged)


@given(st.integers(1, 40), st.integers(1, 16), st.floats(0.1, 20))
def test_from_a_step_on_the_closed_form_holds(length, accumulation, loss):
    for beginning in beginnings(0, [accumulation] * length, accumulation, 0.0, lambda *_: True):
        if beginning.pattern == "from_a_step":
            passed = beginning.step - 1
            closed = passed * loss / length * ((length + 1) / (passed + 1)) ** accumulation
            assert loss * math.exp(beginning.log_factor) == pytest.approx(closed)


@given(st.lists(st.integers(1, 9), min_size=1, max_size=12), st.floats(-3, 30), st.floats(0, 3))
def test_leaving_out_what_is_not_wanted_leaves_out_nothing_else(sizes, target, slack):
    def wanted(low, high, _):
        return low - slack <= target <= high + slack

    every = beginnings(0, sizes, 9, target, lambda *_: True)
    assert list(beginnings(0, sizes, 9, target, wanted)) == [
        b for b in every if abs(b.log_factor - target) <= slack
    ]


def test_a_huge_accumulation_and_window_do_not_overflow():
    assert max(b.log_factor for b in beginnings(0, [256] * 500, 256, INF, lambda *_: True)) > 1000


# ---- the step of the first NaN -----------------------------------------------------------------------


def filtered(length, accumulation, passed, level=2.29, micro_batch=0, pattern="from_a_step", scatter=1e-5):
    """Healthy windows, the one in which NaN begins after ``passed`` steps, and lost ones."""
    rows = [(level * (1 + (-1) ** place * scatter), 0.4) for place in range(5)]
    logged = replay(broken([accumulation] * length, level, passed, micro_batch, pattern))
    return log(*rows, (logged, NAN), *LOST, step=length)


@pytest.mark.parametrize("accumulation", [1, 2, 4, 8, 32])
@pytest.mark.parametrize("length", [2, 5, 10, 25])
def test_every_step_of_a_window_is_recovered(length, accumulation):
    for passed in range(1, length):
        found = diagnose(filtered(length, accumulation, passed), accumulation=accumulation)
        assert (found.verdict, found.began) == ("filtered_nan", 5)
        assert found.first_nan.step == 5 * length + passed + 1


@pytest.mark.parametrize("pattern", ["within_a_step", "one_micro_batch"])
def test_every_micro_batch_of_a_window_leads_to_its_step_or_to_an_interval_that_says_so(pattern):
    for passed in range(10):
        for micro_batch in range(1, 7):
            found = diagnose(
                filtered(10, 8, passed, micro_batch=micro_batch, pattern=pattern), accumulation=8
            ).first_nan
            assert found.earliest <= 51 + passed <= found.latest
            if found.earliest == found.latest:
                best = found.best.beginning
                # Half of the first step's loss doubled is as much as all of it: second and third are one.
                same = {2, 3} if passed == 0 and micro_batch in (1, 2) else {micro_batch + 1}
                assert best.pattern == pattern
                assert best.micro_batch in same


def test_two_beginnings_with_one_prediction_are_both_named():
    found = diagnose(filtered(10, 8, 0, micro_batch=1, pattern="one_micro_batch"), accumulation=8)
    assert (found.first_nan.step, found.first_nan.earliest, found.first_nan.latest) == (52, 51, 52)
    assert "predicts the same: nothing in the log tells them apart" in " ".join(diagnosis_text(found).split())


@pytest.mark.parametrize(("accumulation", "passed"), [(4, 1), (8, 1), (8, 3)])
def test_measured_values_of_a_real_trainer_are_explained(accumulation, passed):
    """Losses that a real Trainer logged, filter on, logging_steps 10 (loss before: 4.19)."""
    logged = {(4, 1): 575.8, (8, 1): 525767.0, (8, 3): 6165.0}[accumulation, passed]
    level = {(4, 1): 6.2925, (8, 1): 6.28, (8, 3): 6.28}[accumulation, passed]
    found = diagnose(log(*[(level, 1.0)] * 4, (logged, NAN), (0.0, NAN)), accumulation=accumulation).first_nan
    assert found.best.beginning.finite_steps == pytest.approx(passed, abs=0.01)


def test_a_first_entry_without_a_loss_to_compare_with_lists_what_each_beginning_implies():
    """hiyouga/LlamaFactory#5660: 344093.2 is the first entry; the same run in float16 began at 4.5 to 4.7."""
    case = log((344093.2, NAN), *LOST)
    found = diagnose(case, accumulation=8).first_nan
    assert found.step is None
    implied = {
        c.beginning.step: c.implied_loss for c in found.candidates if c.beginning.pattern == "from_a_step"
    }
    assert implied[2] == pytest.approx(4.11, abs=0.005)
    assert all(0.1 <= c.implied_loss <= 12.48 for c in found.candidates)
    told = diagnose(case, accumulation=8, finite_loss=4.5).first_nan
    assert told.step == 2


def test_with_the_accumulation_unknown_every_one_that_fits_is_listed_and_none_is_chosen():
    case = filtered(10, 4, 6, scatter=0.002)
    found = diagnose(case).first_nan
    assert found.step is None
    assert (57, 4) in {(c.beginning.step, c.beginning.accumulation) for c in found.candidates}
    assert len({c.beginning.step for c in found.candidates}) > 1
    assert found.tried_accumulation == 256
    for candidate in found.candidates:
        assert abs(candidate.log_error) < 0.1
    text = diagnosis_text(diagnose(case))
    assert "somewhere in optimizer steps" in text
    assert any(line.strip().startswith("accumulation 4: ") and "57" in line for line in text.splitlines())
    assert "--accumulation N" in text


def test_where_the_loss_scatters_the_interval_is_wide_and_a_whole_step_is_preferred():
    rows = [(2.2, 0.4), (2.4, 0.4), (2.1, 0.4), (2.5, 0.4), (2.2, 0.4)]
    logged = replay(broken([4] * 10, 2.3, 5, 0, "from_a_step"))
    found = diagnose(log(*rows, (logged, NAN), *LOST), accumulation=4).first_nan
    assert found.earliest < found.step == 56 < found.latest
    assert found.ordinary.scatter > 0.1


def test_few_steps_scatter_more_than_a_window_up_to_a_limit_and_an_assumed_scatter_is_left_alone():
    measured = OrdinaryLoss(2.3, "", 0.01, "", scatter_is_measured=True)
    assert measured.tolerance(100, 100, 3) == pytest.approx(3 * 0.01 * math.sqrt(2))
    assert measured.tolerance(100, 4, 3) == pytest.approx(3 * 0.01 * math.sqrt(1 + 25))
    assert measured.tolerance(10**6, 0.5, 3) == pytest.approx(3 * math.hypot(0.01, LARGEST_SCATTER))
    assumed = OrdinaryLoss(2.3, "", 0.1, "", scatter_is_measured=False)
    assert assumed.tolerance(100, 1, 3) == assumed.tolerance(100, 100, 3) == pytest.approx(0.3 * math.sqrt(2))


def test_few_entries_leave_the_scatter_assumed_and_said_so():
    found = diagnose(
        log((2.3, 0.4), (replay(broken([4] * 10, 2.3, 5, 0, "from_a_step")), NAN), *LOST), accumulation=4
    )
    assert not found.first_nan.ordinary.scatter_is_measured
    assert "assumed" in diagnosis_text(found)


def test_what_nothing_explains_is_said_to_fit_nothing():
    found = diagnose(log(*HEALTHY, (1e9, NAN), *LOST), accumulation=2)
    assert not found.first_nan.fits
    assert "Several processes" in diagnosis_text(found)
    unknown = diagnose(log(*HEALTHY, (1e200, NAN), *LOST, step=2))
    assert (unknown.first_nan.fits, unknown.first_nan.earliest, unknown.first_nan.latest) == (False, 9, 10)
    assert "No accumulation from 1 to 256 explains" in diagnosis_text(unknown)
    too_many = diagnose(log(*HEALTHY, (1e9, NAN), *LOST), accumulation=10**6)
    assert (too_many.first_nan.earliest, too_many.first_nan.latest) == (41, 50)


def test_a_healthy_entry_before_the_zeros_makes_the_step_certain():
    found = diagnose(log(*HEALTHY, *LOST))
    assert (found.first_nan.step, found.first_nan.certain, found.began) == (41, True, 4)
    first = diagnose(log(*LOST, step=5))
    assert (first.first_nan.step, first.first_nan.certain) == (1, True)


def test_logging_every_step_makes_the_step_certain_whatever_the_accumulation():
    found = diagnose(log(*HEALTHY, (9.7, NAN), *LOST, step=1)).first_nan
    assert (found.step, found.earliest, found.latest, found.certain) == (5, 5, 5, True)


@pytest.mark.parametrize("rows", [(*HEALTHY, (5661.0, NAN), *LOST), (*HEALTHY, *LOST)])
def test_without_step_numbers_nothing_is_made_up(rows):
    found = diagnose(log(*rows, step=None))
    assert found.verdict == "filtered_nan"
    assert (found.first_nan.step, found.first_nan.earliest, found.first_nan.span) == (None, None, None)
    assert "--logging-steps N" in diagnosis_text(found)
    told = diagnose(log(*rows, step=None), logging_steps=10, accumulation=4)
    assert told.first_nan.step is not None
    assert any("no step numbers" in note for note in told.notes)


def test_without_gradient_norms_the_zeros_are_enough():
    rows = [(2.29, None)] * 4
    logged = replay(broken([8] * 10, 2.29, 3, 0, "from_a_step"))
    found = diagnose(log(*rows, (logged, None), (0.0, None)), accumulation=8)
    assert (found.verdict, found.first_nan.step, found.began) == ("filtered_nan", 44, 4)
    assert any("no gradient norm" in note for note in found.notes)
    after = diagnose(log(*rows, (2.29, None), (0.0, None)), accumulation=8)
    assert (after.first_nan.step, after.began) == (51, 5)


# ---- where the windows lie -----------------------------------------------------------------------------


def test_windows_follow_the_steps_of_the_entries():
    found = diagnose(log(*HEALTHY)).windows
    assert [(s.first, s.last) for s in found.spans] == [(1, 10), (11, 20), (21, 30), (31, 40)]
    late = diagnose(log(*HEALTHY, first=110))
    assert (late.windows.spans[0].first, late.windows.spans[0].last) == (101, 110)
    assert any("begins at step 110" in note for note in late.notes)
    first = log(*HEALTHY)
    entries = tuple(replace(w, step=step) for w, step in zip(first.windows, (1, 10, 20, 30), strict=True))
    spans = diagnose(replace(first, windows=entries), logging_steps=10).windows.spans
    assert [(s.first, s.last) for s in spans] == [(1, 1), (2, 10), (11, 20), (21, 30)]
    short = diagnose(log(*HEALTHY[:1], step=7)).windows
    assert (short.spans[0].first, short.spans[0].last) == (1, 7)


def test_what_contradicts_the_file_is_refused():
    with pytest.raises(
        BadValue, match=r"--logging-steps 5 contradicts 'some\.log', whose entries are 10 steps apart"
    ):
        diagnose(log(*HEALTHY), logging_steps=5)
    with pytest.raises(BadValue, match=r"--accumulation 4 contradicts 'some\.log', which says 8"):
        diagnose(log(*HEALTHY, accumulation=8), accumulation=4)


def test_an_accumulation_in_the_file_is_used():
    case = filtered(10, 8, 3)
    found = diagnose(
        TrainingLog(path=case.path, kind=case.kind, windows=case.windows, accumulation=8)
    ).first_nan
    assert (found.step, found.accumulation) == (54, 8)


def epochs(step, epoch):
    entry = {"loss": 2.0, "step": step, "epoch": epoch}
    return window_of(entry, "entry", "")


@pytest.mark.parametrize("rounded", [False, True])
def test_a_short_step_at_the_end_of_an_epoch_is_found_from_the_epochs(rounded):
    def shown(value):
        return f"{value:.4g}" if rounded else value

    # 53 micro-batches an epoch: 13 steps of 4 and one of 1.
    rows = [epochs(10, shown(40 / 53)), epochs(20, shown(1 + 24 / 53)), epochs(30, shown(2 + 8 / 53))]
    case = TrainingLog(Path("x"), "trainer_state", tuple(rows))
    assert micro_batches(case, Span(11, 20), 4) == [4, 4, 4, 1, 4, 4, 4, 4, 4, 4]
    assert micro_batches(case, Span(21, 30), 4) == [4, 4, 4, 4, 4, 4, 4, 1, 4, 4]


@pytest.mark.parametrize(
    "rows", [[(10, 0.05)], [(10, 40 / 53), (20, 1.6)], [(10, None)], [(10, 3.0)], [(10, 1e-310)], [(10, 0.5)]]
)
def test_epochs_that_do_not_settle_it_leave_every_step_full(rows):
    case = TrainingLog(Path("x"), "trainer_state", tuple(epochs(*row) for row in rows))
    assert micro_batches(case, Span(11, 20), 4) == [4] * 10


# ---- the words ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "verdict", "words"),
    [
        (HEALTHY, "finite", "every loss and gradient norm of 4 entries"),
        ([(loss, None) for loss, _ in HEALTHY], "finite", "no gradient norm"),
        ([*HEALTHY * 2, (2.3, 40.0), *HEALTHY], "spiking", "gradient norm of 40 at entry 8, is 100 times"),
        ([*HEALTHY * 2, (30.0, 0.4), *HEALTHY], "spiking", "loss of 30 at entry 8"),
        ([(2.3, 0.0), (2.31, 0.0)], "dead", "exactly 0 in the last 2 entries"),
        ([*HEALTHY, (2.3, 0.0), (2.31, 0.0)], "dead", "from entry 4 on"),
        ([(0.0, 0.0), (0.0, 0.0)], "dead", "exactly 0"),
        ([(2.3, None)] * 3, "dead", "the loss is 2.3 in all 3 entries"),
        ([*HEALTHY, (2.3, 0.0), (2.31, 0.4)], "finite", ""),
        ([(2.3, None)] * 2, "finite", ""),
        ([(0.0008, None), (0.0002, None), (0.0, None)], "finite", ""),
        ([(0.0, 0.4), (0.0, 0.3)], "finite", ""),
        ([*HEALTHY, (NAN, NAN)], "non_finite", "the loss is NaN at entry 4"),
        ([*HEALTHY, (-INF, NAN)], "non_finite", "the loss is -Infinity at entry 4"),
        ([*HEALTHY, (2.28, INF), *HEALTHY], "non_finite", "gradient norm is Infinity at entry 4 while the loss is ordinary"),
        ([*HEALTHY, *LOST], "filtered_nan", "exactly 0.0 with a gradient norm of NaN at entry 4"),
        ([*HEALTHY, (500.0, NAN)], "filtered_nan", "a loss of 500 there is what the NaN filter makes of NaN"),
        ([*HEALTHY, (0.0, None)], "filtered_nan", "exactly 0.0 at entry 4"),
        (LOST, "filtered_nan", "at entry 0"),
    ],
)  # fmt: skip
def test_the_verdict_and_its_reason(rows, verdict, words):
    found = diagnose(log(*rows))
    assert found.verdict == verdict
    assert words in found.reason


def test_ordinary_scatter_is_no_spike():
    rows = [(2.3 + 0.1 * math.sin(7 * place), 0.4 + 0.1 * math.cos(5 * place)) for place in range(60)]
    assert diagnose(log(*rows)).verdict == "finite"


@pytest.mark.parametrize(("factor", "spikes"), [(1.9, 0), (2.1, 1)])
def test_a_spike_has_to_be_twice_the_median(factor, spikes):
    quiet = [(2.3, 0.4)] * 8
    assert len(diagnose(log(*quiet, (2.3 * factor, 0.4))).spikes) == spikes


def test_spikes_before_the_nan_are_kept_and_those_it_makes_are_not():
    found = diagnose(log(*HEALTHY * 2, (2.3, 40.0), *HEALTHY, (500.0, NAN), *LOST))
    assert [(s.window.where, s.quantity) for s in found.spikes] == [("entry 8", "gradient norm")]


# ---- poisoned, skipped -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rows", "poisoned", "skipped"),
    [
        (HEALTHY, False, False),
        # The rate goes on: the updates were applied.
        (decaying(*HEALTHY, (500.0, NAN), *LOST), True, False),
        # The rate moved until the NaN and stands still since.
        ((*decaying(*HEALTHY), (500.0, NAN, 9.6e-6), (0.0, NAN, 9.6e-6)), False, True),
        ((*decaying(*HEALTHY), *[(2.3, NAN, 9.6e-6)] * 3), False, True),
        # Still 0, as a warm-up begins: nothing was ever trained.
        ([(2.3, NAN, 0.0), (2.31, NAN, 0.0)], False, True),
        # A decay that ended at 0 is no warm-up.
        ((*decaying(*HEALTHY), (500.0, NAN, 0.0), (0.0, NAN, 0.0)), None, None),
        # A constant schedule: the log cannot tell.
        ([(*row, 1e-5) for row in (*HEALTHY, (500.0, NAN), *LOST)], None, None),
        ([(2.3, NAN, 1e-5), (2.31, NAN, 1e-5)], None, None),
        # No rates, or one entry only.
        ((*HEALTHY, (500.0, NAN), *LOST), None, None),
        (decaying(*HEALTHY, (500.0, NAN)), None, None),
        # It recovered.
        (decaying(*HEALTHY, (500.0, NAN), *HEALTHY), False, False),
        (decaying(*HEALTHY, (NAN, NAN), (NAN, 0.4)), False, False),
        # Whole entries with an ordinary loss and a rate that goes on: some updates were applied.
        (decaying((2.3, NAN), (2.31, NAN), (2.28, NAN)), False, False),
        # Unfiltered: the loss stays NaN in any case, so norms decide, and two are too few.
        (decaying(*HEALTHY, (NAN, NAN), (NAN, NAN), (NAN, NAN)), True, False),
        (decaying(*HEALTHY, (NAN, NAN), (NAN, NAN)), None, False),
        (decaying(*[(loss, None) for loss, _ in HEALTHY], *[(NAN, None)] * 4), None, False),
    ],
)  # fmt: skip
def test_whether_the_weights_are_poisoned_and_the_updates_skipped(rows, poisoned, skipped):
    flags = diagnose(log(*rows)).flags
    assert (flags.poisoned.value, flags.skipped.value) == (poisoned, skipped)
    for flag in (flags.poisoned, flags.skipped):
        assert flag.reason
        assert (flag.would_tell is None) == (flag.value is not None)


# ---- evidence, what next, and how it is said -----------------------------------------------------------


def test_the_entries_that_count_are_shown_as_they_were_read():
    found = diagnose(
        log(
            *HEALTHY,
            (500.0, NAN),
            *LOST * 3,
            train_loss_at=("line 99", "{'train_loss': 1.1}"),
            train_loss=1.1,
        )
    )
    shown = evidence(found)
    assert [item.where for item in shown] == [
        "entry 2",
        "entry 3",
        "entry 4",
        "entry 5",
        "entry 6",
        "entry 10",
        "line 99",
    ]
    assert shown[2].meaning == "NaN began here"
    assert shown[2].text == str({"loss": 500.0, "grad_norm": NAN, "step": 50})
    assert shown[3].meaning == "no finite loss in any of its micro-batches"
    assert "says nothing" in shown[-1].meaning
    for item in shown:
        assert item.text in diagnosis_text(found)


def test_what_to_do_next_is_concrete():
    steps = next_steps(diagnose(log(*decaying(*HEALTHY, *LOST * 2))))
    texts = " ".join(step.text for step in steps)
    assert "Keep no checkpoint saved after step 39: its trained weights are NaN." in texts
    assert "logging_nan_inf_filter=False" in texts
    commands = [step.command for step in steps if step.command]
    assert any(c.startswith("qlora-bench triage ") and c.endswith("--steps 41") for c in commands)
    assert any("--dtype bfloat16" in c for c in commands)
    assert next_steps(diagnose(log(*HEALTHY))) == ()
    assert any(
        "check BACKEND" in (s.command or "") for s in next_steps(diagnose(log((2.3, 0.0), (2.2, 0.0))))
    )


def test_the_document_is_json_without_bare_nan_and_has_everything():
    found = diagnose(log(*HEALTHY, (500.0, NAN), *LOST, train_loss=NAN), accumulation=4)
    document = json.loads(json.dumps(diagnosis_document(found), allow_nan=False))
    assert document["train_loss"] == "NaN"
    assert document["first_nan"]["window"]["gradient_norm"] == "NaN"
    assert document["first_nan"]["window"]["learning_rate"] is None
    assert document["first_nan"]["step"] == found.first_nan.step
    assert len(document["first_nan"]["candidates"]) == len(found.first_nan.candidates)
    assert document["poisoned"]["value"] is None
    assert document["accumulation"] == 4
    assert {"verdict", "reason", "evidence", "notes", "next", "spikes", "every_update_skipped"} <= set(
        document
    )


@pytest.mark.parametrize(
    "rows", [HEALTHY, (*HEALTHY, (500.0, NAN), *LOST), (*HEALTHY, (NAN, NAN)), LOST, ((2.3, 0.0),) * 3]
)
def test_no_line_of_prose_is_wider_than_a_terminal_allows(rows):
    for line in diagnosis_text(diagnose(log(*rows), accumulation=4)).splitlines():
        assert len(line) <= 110 or "grad_norm" in line or "qlora-bench" in line


# ---- the command -------------------------------------------------------------------------------------

CONSOLE = """\
noise 5/9
{'loss': 2.29, 'grad_norm': 0.39, 'learning_rate': 1e-05, 'epoch': 0.1}
{'loss': 5661.0, 'grad_norm': nan, 'learning_rate': 9.5e-06, 'epoch': 0.2}
{'loss': 0.0, 'grad_norm': nan, 'learning_rate': 9e-06, 'epoch': 0.3}
"""


@pytest.fixture
def console(tmp_path):
    path = tmp_path / "console [1].log"
    path.write_text(CONSOLE)
    return path


def test_the_command_answers_in_text_and_in_json(command, console):
    done = command.run("diagnose", console, "--logging-steps", "10", "--accumulation", "8")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout.startswith("filtered NaN: ")
    assert "line 3" in done.stdout
    document = command.json("diagnose", console, "--logging-steps", "10", "--accumulation", "8")
    assert document["verdict"] == "filtered_nan"
    assert document["first_nan"]["step"] == diagnosed_step(document)
    assert document["file"] == str(console)


def diagnosed_step(document):
    """The step that the brackets of the document's own candidates allow."""
    first = document["first_nan"]
    assert first["earliest"] <= first["step"] <= first["latest"]
    return first["step"]


@pytest.mark.parametrize(
    ("content", "words"),
    [(None, "cannot be read"), (b"", "is empty"), (b"\0\1", "binary file"), (b"hello", "no training loss"), (b'{"log_history": [', "cut short")],
)  # fmt: skip
def test_the_command_refuses_in_one_line(command, tmp_path, content, words):
    path = tmp_path / "x.log"
    if content is not None:
        path.write_bytes(content)
    assert words in command.refused("diagnose", path)


@pytest.mark.parametrize(
    "flags",
    [("--accumulation", "0"), ("--logging-steps", "x"), ("--finite-loss", "-1"), ("--finite-loss", "nan")],
)
def test_the_command_refuses_bad_flags_in_one_line(command, console, flags):
    assert command.refused("diagnose", console, *flags)


def test_the_command_imports_neither_torch_nor_transformers(console):
    code = ("import sys; from bench.cli.diagnose import diagnose\n"
            "diagnose.main(sys.argv[1:], standalone_mode=False)\n"
            "print([name for name in ('torch', 'transformers', 'pandas') if name in sys.modules])")  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", code, console], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.splitlines()[-1] == "[]"
