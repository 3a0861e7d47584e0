"""The peers' session for real, on the toy: transformers.Trainer beside this project's own worker.

The peers' environments are stood in for by one that borrows this one's libraries; in it there is no
optimum-benchmark unless somebody has installed it here, which is then a row with its reason.
"""

from __future__ import annotations

import math
import os
import subprocess
import sys
import sysconfig
import venv
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file, save_file

from tests.command import ROOT
from tests.peers.arithmetic import claims
from tests.peers.arms import Place, run_peer
from tests.peers.cases import ARMS, CASES, OPTIMUM, OPTIMUM_TODAY, OURS, TRAINER
from tests.peers.outcome import Outcome, Session
from tests.peers.preparing import SessionAsked, prepare
from tests.peers.sameness import compare
from tests.peers.work import Work

pytestmark = pytest.mark.soak
ROUNDS, STEPS, WARMUP = 2, 5, 1


@pytest.fixture(scope="module")
def environments(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of the peers' environments: today's, and none of older libraries."""
    folder = tmp_path_factory.mktemp("environments")
    venv.create(folder / "today", with_pip=False)
    packages = next((folder / "today").glob("lib/python*/site-packages"))
    borrowed = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_path("purelib")]
    (packages / "borrowed.pth").write_text("\n".join(borrowed) + "\n", encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def session(environments: Path, tmp_path_factory: pytest.TempPathFactory) -> Session:
    """A short session of every case, by the module's own command."""
    out = tmp_path_factory.mktemp("session")
    command = [sys.executable, "-m", "tests.peers", "--preset", "tiny", "--rounds", str(ROUNDS), "--steps", str(STEPS),
               "--warmup-steps", str(WARMUP), "--out", str(out), "--environments", str(environments)]  # fmt: skip
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=1800, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "min left" in done.stdout
    page = (out / "peers.md").read_text(encoding="utf-8")
    assert page.count("Is it the same work?") == len(CASES)
    return Session.model_validate_json((out / "peers.json").read_text(encoding="utf-8"))


def pairs(session: Session, case: str) -> list[tuple[Outcome, Outcome]]:
    return list(zip(session.of(case, TRAINER), session.of(case, OURS), strict=True))


@pytest.mark.parametrize("case", ["bf16", "bnb-nf4", "bf16-padded"])
def test_the_trainer_does_the_same_work_and_every_step_shows_it(session: Session, case: str) -> None:
    assert len(pairs(session, case)) == ROUNDS
    for trainer, ours in pairs(session, case):
        assert (trainer.status, ours.status) == ("completed", "completed")
        found = compare(trainer, ours)
        assert (found.same_data, found.same_adapters, found.same_quantization) == (True, True, True)
        assert found.problems == []
        assert found.steps == STEPS
        assert [step.tokens for step in trainer.steps] == [step.tokens for step in ours.steps]
        assert [step.loss_tokens for step in trainer.steps] == [step.loss_tokens for step in ours.steps]
        # The norm is as sensitive as a gradient, and taken before clipping on both sides.
        assert found.norm_difference < 0.05
        assert trainer.step_peak_bytes is not None
        assert trainer.process_peak_bytes >= trainer.step_peak_bytes
    quantized = {trainer.quantized_layers for trainer, _ in pairs(session, case)}
    assert quantized == ({14} if case == "bnb-nf4" else {0})


def test_padding_counts_as_tokens_for_the_trainer_and_not_here(session: Session) -> None:
    trainer, ours = pairs(session, "bf16-padded")[0]
    found = {claim.name: claim for claim in claims(trainer, WARMUP, 1)}
    tokens = found["num_input_tokens_seen"]
    length = next(case for case in session.cases if case.name == "bf16-padded").request.workload.sequence_length
    assert tokens.says == STEPS * length
    assert tokens.measured == sum(step.tokens for step in ours.steps) < tokens.says
    packed = {claim.name: claim for claim in claims(pairs(session, "bf16")[0][0], WARMUP, 1)}
    assert packed["num_input_tokens_seen"].ratio == 1.0


def test_the_trainers_mean_loss_hides_a_row_without_a_target(session: Session) -> None:
    trainer, ours = pairs(session, "bf16-no-target")[0]
    assert any(math.isnan(step.loss) for step in ours.steps)
    assert [math.isnan(step.loss) for step in trainer.steps] == [math.isnan(step.loss) for step in ours.steps]
    loss = next(claim for claim in claims(trainer, WARMUP, 1) if claim.name == "train_loss")
    assert math.isfinite(loss.says)
    assert math.isnan(loss.measured)


def test_what_could_not_run_is_a_row(session: Session) -> None:
    assert all(outcome.status == "unavailable" for outcome in session.of("bf16", OPTIMUM))
    (today,) = session.of("bf16", OPTIMUM_TODAY)
    assert (today.status, today.stage) == ("error", "import")
    assert "Error: " in today.message


def test_other_adapters_and_other_data_are_found_out(environments: Path, session: Session, tmp_path: Path) -> None:
    """What the page says about sameness could be otherwise."""
    asked = SessionAsked(
        preset="tiny", layers=None, settings=(), steps=STEPS, warmup_steps=WARMUP, rounds=1,
        cases=(CASES["bf16"],), out=tmp_path, pythons={}, timeout_seconds=600,
    )  # fmt: skip
    (ready,) = prepare(asked, tmp_path / "subject")
    work = Work.load(ready.work_file)
    pythons = {"today": environments / "today" / "bin" / "python"}
    ours = session.of("bf16", OURS)[0]

    def run(name: str, changed: Work) -> Outcome:
        file = changed.save(tmp_path / f"{name}.json")
        return run_peer(ARMS[TRAINER], Place("bf16", 0), file, tmp_path / name, pythons, 600)

    adapters = {name: values[..., ::-1].copy() for name, values in load_file(work.adapters_file).items()}
    save_file(adapters, tmp_path / "adapters.safetensors")
    other = compare(run("adapters", replace(work, adapters_file=str(tmp_path / "adapters.safetensors"))), ours)
    assert "other initial adapters" in other.problems
    # B is zero at first, so the losses say little; the norms say much.
    assert other.norm_difference > 0.05

    batches = {name: values[::-1].copy() for name, values in load_file(work.batches_file).items()}
    save_file(batches, tmp_path / "batches.safetensors")
    other = compare(run("batches", replace(work, batches_file=str(tmp_path / "batches.safetensors"))), ours)
    assert other.problems[0] == "other data"
    assert other.loss_difference > 2**-8

    plain = run("plain", replace(work, backend="bnb-nf4"))
    assert "another number of quantized layers" in compare(plain, ours).problems


def test_bad_input_is_one_line(tmp_path: Path) -> None:
    for flags, said in (
        (["--case", "bf61"], "unknown case 'bf61'; did you mean 'bf16'?"),
        (["--steps", "2"], "--warmup-steps (2) must be below --steps (2)"),
        (["--set", "workload.gradient_accumulation_steps=2"], "gradient_accumulation_steps must be 1"),
        (["--page"], "there is no"),
    ):
        command = [sys.executable, "-m", "tests.peers", "--preset", "tiny", "--out", str(tmp_path / "none"), *flags]
        done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
        assert (done.returncode, done.stdout) == (2, "")
        assert said in done.stderr
        assert len(done.stderr.strip().splitlines()) == 1
    assert list(tmp_path.iterdir()) == []
