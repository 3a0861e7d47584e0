"""Bad input in files that are read: records and the documents beside them, and logs for ``diagnose``. Each is
shown, or refused in one line that names the file, with exit code 2."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from hypothesis import strategies as st

from bench.errors import UserError
from bench.judge.comparison import compare
from bench.record.depths import read_times
from bench.record.forecast import save_forecast
from bench.record.schema import Record
from bench.record.store import SUFFIX
from bench.record.triage import save_triage
from bench.show import report as written
from tests.fit_factory import backend_forecast, forecast, on_cards
from tests.forecast_factory import times
from tests.front import Front
from tests.fuzzing import budgets, fuzzed
from tests.mutation import damaged, mutants, spelt
from tests.record_factory import (
    failed,
    fidelity,
    margin_runs,
    overflowing,
    probed,
    record,
    steps,
    triage,
)
from tests.test_fuzz_asked import SOAK as SOAK_ASKED

QUICK, SOAK = budgets(records=(400, 3500), reports=(80, 2500), drawn=(3, 500), documents=(80, 1500), logs=(400, 3000), times=(100, 800))


@cache
def seeds() -> tuple[Any, ...]:
    """Records of every kind, small: what completed, failed, was probed, compared, spread over cards."""
    small = probed(record("hqq", steps=steps("hqq", count=3), fidelity=fidelity(count=3)), layers=3)
    failing = overflowing("gptq", steps=tuple(s.model_copy(update={"probe": None}) for s in overflowing("gptq").steps[3:7]))
    made: tuple[Record, ...] = (
        small, failing, failed("awq", "out_of_memory", "load", "CUDA out of memory"), record("bf16", cpu=True, weights="synthetic"),
        on_cards("bnb-nf4", count=2), *margin_runs("hqq", 11)[:2],
    )  # fmt: skip
    return tuple(json.loads(one.model_dump_json()) for one in made)


def put(folder: Path, document: Any, name: str = f"a{SUFFIX}") -> None:
    """Write a document's bytes, or a document, into a folder."""
    folder.mkdir(exist_ok=True)
    (folder / name).write_bytes(document if isinstance(document, bytes) else spelt(document).encode())


def emptied(folder: Path) -> Path:
    """The folder, without the files of the input before."""
    for path in folder.rglob("*") if folder.is_dir() else ():
        if path.is_file():
            path.unlink()
    return folder


@fuzzed("records", QUICK, SOAK)
def test_records_are_listed_or_refused(front: Front, data: st.DataObject) -> None:
    folder = Path("records")
    put(folder, data.draw(damaged(spelt(data.draw(mutants(data.draw(st.sampled_from(seeds()))))))))
    front.holds(["runs", "records", *data.draw(st.sampled_from(((), ("--json",))))], f"a{SUFFIX}")


def reported(front: Front, data: st.DataObject) -> None:
    """A report of one mutated record beside others."""
    folder = emptied(Path("records"))
    put(folder, data.draw(mutants(data.draw(st.sampled_from(seeds())), alike=8)))
    for place, other in enumerate(data.draw(st.lists(st.sampled_from(seeds()), max_size=2))):
        put(folder, other, f"b{place}{SUFFIX}")
    front.holds(["report", "records", *data.draw(st.sampled_from(((), ("--json",))))], f"a{SUFFIX}")


@fuzzed("reports", QUICK, SOAK)
def test_reports_are_written_or_refused(front: Front, data: st.DataObject) -> None:
    """Page, Markdown and CSV; the figures, which take a second, have inputs of their own."""
    with pytest.MonkeyPatch.context() as without:
        without.setattr(written, "plots", lambda *_: ())
        reported(front, data)
    # And the table of the terminal, which `run` prints of the same records.
    show_table(front)


def show_table(front: Front) -> None:
    """What ``run`` prints at its end."""
    from bench.record.store import Store
    from bench.show.tables import terminal_table
    from bench.show.terminal import Terminal

    try:
        records = list(Store(Path("records")).records())
    except UserError:
        return
    with Path("table.txt").open("w", encoding="utf-8") as file:
        Terminal(file=file, width=160).print(terminal_table(compare(records)))


@fuzzed("drawn", QUICK, SOAK)
def test_reports_with_their_figures_are_written_or_refused(front: Front, data: st.DataObject) -> None:
    reported(front, data)


@cache
def documents() -> dict[str, Any]:
    """What stands beside records, by its name."""
    folder = Path("made")
    folder.mkdir(exist_ok=True)
    answer = forecast(backend_forecast("bnb-nf4"), backend_forecast("hqq"))
    paths = {"triage.json": save_triage(folder, triage()), "forecast.json": save_forecast(folder, answer)}
    return {name: json.loads(path.read_text(encoding="utf-8")) for name, path in paths.items()}


@fuzzed("documents", QUICK, SOAK)
def test_documents_beside_the_records_are_shown_or_refused(front: Front, data: st.DataObject) -> None:
    folder = emptied(Path("records"))
    name = data.draw(st.sampled_from(sorted(documents())))
    put(folder, seeds()[0])
    put(folder, data.draw(damaged(spelt(data.draw(mutants(documents()[name], alike=7))))), name)
    with pytest.MonkeyPatch.context() as without:
        if data.draw(st.integers(0, 40)):
            without.setattr(written, "plots", lambda *_: ())
        front.holds(["report", "records"], name)


@fuzzed("times", QUICK, SOAK)
def test_step_times_are_read_or_refused(front: Front, data: st.DataObject) -> None:
    """No command prints them; ``forecast`` reads those of a run before."""
    known = json.loads(times([{2: 1.0, 4: 2.0}, {2: 1.1, 4: 2.1}]).model_dump_json())
    put(Path("records"), data.draw(damaged(spelt(data.draw(mutants(known))))), "key.depths.json")
    front.inputs += 1
    try:
        found = read_times(Path("records"), "key")
    except UserError as error:
        front.refusals += 1
        assert "key.depths.json" in str(error)
        assert "\n" not in str(error)
    else:
        assert found is None or found.rounds() is not None


def test_the_soak_part_gives_20_000_inputs_or_more() -> None:
    """Each of its tests asserts that the command was given as many as stand here."""
    assert sum(SOAK.values()) + sum(SOAK_ASKED.values()) >= 20_000


# ---- logs -------------------------------------------------------------------------------------------

STATE = {
    "epoch": 0.3, "global_step": 30, "logging_steps": 10, "max_steps": 100,
    "log_history": [
        {"epoch": 0.1, "grad_norm": 0.39, "learning_rate": 1e-05, "loss": 2.29, "step": 10},
        {"epoch": 0.1, "eval_loss": 2.3, "step": 10},
        {"epoch": 0.2, "grad_norm": float("nan"), "learning_rate": 9.5e-06, "loss": 5661.4512, "step": 20},
        {"epoch": 0.3, "grad_norm": float("nan"), "learning_rate": 9e-06, "loss": 0.0, "step": 30},
        {"epoch": 0.3, "train_loss": 1887.9, "step": 30},
    ],
}  # fmt: skip
LINES = [
    {"current_steps": 10 * n, "total_steps": 100, "loss": loss, "lr": 1e-05, "epoch": 0.1 * n, "percentage": 10.0 * n, "elapsed_time": "0:00:10"}
    for n, loss in enumerate((2.29, 5661.4512, 0.0), start=1)
]  # fmt: skip
BETWEEN = ("", "\r", " 25%|##   | 5/20 [00:00<00:00, 144.32it/s]\r", "\x1b[32m", "Gradient Accumulation steps = 8\n", "  Total optimization steps = 1,000\n", "{", "}", "{{'loss'", "\0")


@fuzzed("logs", QUICK, SOAK)
def test_logs_are_diagnosed_or_refused(front: Front, data: st.DataObject) -> None:
    kind = data.draw(st.sampled_from(("state", "lines", "console")))
    if kind == "state":
        text = spelt(data.draw(mutants(data.draw(st.sampled_from((STATE, STATE["log_history"]))))))
    elif kind == "lines":
        text = "\n".join(spelt(line) for line in data.draw(mutants(LINES)) if line)
    else:
        entries = data.draw(mutants(STATE["log_history"]))
        spell = data.draw(st.sampled_from((str, spelt)))
        text = "".join(f"{data.draw(st.sampled_from(BETWEEN))}{spell(entry)}\n" for entry in entries)
    Path("log.txt").write_bytes(data.draw(damaged(text)))
    flags = data.draw(st.sampled_from(((), ("--json",), ("--logging-steps", "10"), ("--accumulation", "8", "--finite-loss", "2.3"))))
    front.holds(["diagnose", "log.txt", *flags], "log.txt", "--logging-steps", "--finite-loss", "--accumulation")
