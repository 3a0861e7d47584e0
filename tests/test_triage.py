"""The triage: what is tried, what heals, which change is chosen, what is kept and shown, one real one."""

from __future__ import annotations

import ast
import json
from collections.abc import Mapping
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import yaml
from rich.console import Console

from bench.ask.experiment import Lora, Optimizer, Workload
from bench.ask.plan import RunRequest
from bench.cli.reports import written_report
from bench.cli.triage import climbed_triage
from bench.errors import BadValue, BrokenFile
from bench.judge.ladder import ORDER, cause, evidence, smallest_first
from bench.record.triage import FILE_NAME, Rung, Triage, read_triage, save_triage
from bench.run.asked import Asked
from bench.run.one_by_one import OneByOne
from bench.run.rungs import OTHER_BACKENDS, Change, find_changes
from bench.run.triage import FEW_STEPS, SEEDS, TriagePlan, arrange_triage
from bench.show.ladder import ladder_text
from bench.show.progress import Silent
from tests.command import Command
from tests.fake_worker import Outcome, failing, out_of_memory, record_of, skipping
from tests.record_factory import overflowing, request

MODULE = "model.layers.1.mlp.up_proj"

# ---- what may be changed -------------------------------------------------------------------------


def others(base: RunRequest) -> dict[str, RunRequest]:
    options: Mapping[str, Any] = {"bnb-nf4": {"quant_type": "nf4", "double_quantization": False}}
    return {
        backend: request(backend, options=options.get(backend, {}), dtype=base.dtype)
        for backend in OTHER_BACKENDS
        if backend != base.backend
    }


def changes_of(base: RunRequest) -> dict[str, Change]:
    found = find_changes(base, others(base))
    assert len({change.name for change in found}) == len(found)
    return {change.name: change for change in found}


def difference(base: RunRequest, other: RunRequest) -> set[str]:
    """Dotted names in which two requests differ."""

    def flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
        found: dict[str, Any] = {}
        for name, value in values.items():
            found |= flat(value, f"{prefix}{name}.") if isinstance(value, dict) else {prefix + name: value}
        return found

    one, two = flat(base.model_dump()), flat(other.model_dump())
    return {name for name in one.keys() | two.keys() if one.get(name) != two.get(name)}


def test_each_rung_changes_one_thing() -> None:
    base = request("bf16", dtype="float16")
    for name, change in changes_of(base).items():
        if change.request is None or change.kind == "backend":
            continue
        assert difference(base, change.request) == set(change.settings), name
        assert change.request.key != base.key


def test_every_kind_of_change_is_there() -> None:
    found = changes_of(request("bf16", dtype="float16"))
    assert {"dtype=bfloat16", "lora.precision=float32", "attention=sdpa_math", "attention=eager",
            "attention=sdpa_flash", "attention=sdpa_efficient", "checkpointing=reentrant", "checkpointing=none",
            "workload.padding=right", "workload.padding=left", "optimizer.max_gradient_norm=null", "placement=one",
            "optimizer.learning_rate=2e-05", "double_quantization=off"} <= set(found)  # fmt: skip
    backends = [change.name for change in found.values() if change.kind == "backend"]
    assert backends == [f"backend={name}" for name in OTHER_BACKENDS if name != "bf16"]


def test_what_does_not_apply_stays_with_its_reason() -> None:
    found = changes_of(request("bf16", device="cpu", lora=Lora(precision="float32")))
    assert {name: change.note for name, change in found.items() if change.request is None} == {
        "double_quantization=off": "the backend has none",
        "dtype=bfloat16": "already",
        "lora.precision=float32": "already",
        "attention=sdpa_flash": "needs CUDA",
        "attention=sdpa_efficient": "needs CUDA",
        "placement=one": "the run has one device",
    }


def test_clipping_goes_on_where_it_was_off() -> None:
    found = changes_of(request("bf16", optimizer=Optimizer(max_gradient_norm=None)))
    assert found["optimizer.max_gradient_norm=1"].settings == {"optimizer.max_gradient_norm": 1.0}


def test_the_other_modes_of_each_are_offered() -> None:
    asked = request("bf16", checkpointing="none", workload=Workload(padding="left"), attention="eager")
    found = set(changes_of(asked))
    assert {"checkpointing=reentrant", "checkpointing=non_reentrant", "workload.padding=packed",
            "workload.padding=right", "attention=sdpa"} <= found  # fmt: skip
    assert not {"checkpointing=none", "workload.padding=left", "attention=eager"} & found


def test_double_quantization_off_is_the_plain_backend_and_is_run_once() -> None:
    base = request("bnb-nf4-dq", options={"quant_type": "nf4", "double_quantization": True})
    found = changes_of(base)
    off = found["double_quantization=off"]
    assert off.request is not None
    assert off.request.key == others(base)["bnb-nf4"].key
    assert found["backend=bnb-nf4"].request is None
    assert found["backend=bnb-nf4"].note == "the same run as 'double quantization off'"


def test_double_quantization_keeps_the_other_options() -> None:
    base = request("bnb-nf4-dq", options={"quant_type": "fp4", "double_quantization": True})
    off = changes_of(base)["double_quantization=off"].request
    assert off is not None
    assert off.options == {"quant_type": "fp4", "double_quantization": False}
    assert changes_of(base)["backend=bnb-nf4"].request is not None


def test_double_quantization_by_an_option_of_the_plain_backend() -> None:
    on = request("bnb-nf4", options={"quant_type": "nf4", "double_quantization": True})
    off = request("bnb-nf4", options={"quant_type": "nf4", "double_quantization": False})
    turned = changes_of(on)["options.double_quantization=False"].request
    assert turned is not None
    assert turned.options["double_quantization"] is False
    assert changes_of(off)["double_quantization=off"].note == "already off"


# ---- the ladder, with a stand-in for the worker --------------------------------------------------


def healed_by(*healing: str, at: int = 0) -> Outcome:
    """Fails unless one of the names is true of the request; ``at``: the failing step."""

    def outcome(asked: RunRequest) -> dict[str, Any]:
        values = {
            f"backend={asked.backend}", f"dtype={asked.dtype}", f"attention={asked.attention}",
            f"padding={asked.workload.padding}", f"precision={asked.lora.precision}",
            f"rate={asked.optimizer.learning_rate:g}",
        }  # fmt: skip
        return {} if values & set(healing) else failing(asked, at=at)

    return outcome


def planned(out: Path, only: tuple[str, ...] = (), **flags: Any) -> TriagePlan:
    known = {"preset": "tiny", "backends": ("hqq",), "dtype": "float16", "steps": 8, "out": out}
    return arrange_triage(Asked(**(known | flags)), only)


def triaged(plan: TriagePlan) -> Triage:
    return climbed_triage(plan, OneByOne(plan.sweep, Silent(), evidence))


def written(found: Triage | None) -> str:
    """As text: a NaN is not equal to itself."""
    assert found is not None
    return found.model_dump_json()


def by_name(found: Triage) -> dict[str, Rung]:
    return {rung.name: rung for rung in found.rungs}


def test_a_healthy_run_ends_at_once(worker: Any, out: Path) -> None:
    fake = worker(lambda asked: {})
    found = triaged(planned(out))
    assert [asked.workload.steps for asked in fake.ran] == [FEW_STEPS, 8]
    assert (found.failed, found.rungs, found.chosen, found.configurations) == (False, (), None, ())
    assert found.conclusion.startswith("nothing failed")


def test_the_precision_is_smaller_than_the_backend(worker: Any, out: Path) -> None:
    worker(healed_by("dtype=bfloat16", "backend=bf16"))
    found = triaged(planned(out))
    assert found.chosen == "dtype=bfloat16"
    assert {name for name, rung in by_name(found).items() if rung.heals} == {"dtype=bfloat16", "backend=bf16"}
    assert found.confirmed is True


def test_a_setting_is_smaller_than_the_precision(worker: Any, out: Path) -> None:
    worker(healed_by("dtype=bfloat16", "attention=eager"))
    assert triaged(planned(out)).chosen == "attention=eager"


def test_the_learning_rate_costs_more_than_the_precision(worker: Any, out: Path) -> None:
    worker(healed_by("precision=float32", "rate=2e-05"))
    assert triaged(planned(out)).chosen == "lora.precision=float32"


def test_the_order_is_stable_within_a_kind() -> None:
    assert ORDER == ("setting", "precision", "training", "backend")
    rungs = [
        Rung(name=f"{kind}{n}", group="", kind=kind, change="", settings={}, evidence=None, heals=n != 1)
        for kind in ("backend", "training", "setting", "precision")
        for n in range(3)
    ]
    names = [rung.name for rung in smallest_first(rungs)]
    assert names == ["setting0", "setting2", "precision0", "precision2", "training0", "training2", "backend0",
                     "backend2"]  # fmt: skip


def test_nothing_heals(worker: Any, out: Path) -> None:
    worker(healed_by())
    found = triaged(planned(out))
    assert (found.failed, found.chosen, found.configurations) == (True, None, ())
    assert found.conclusion.startswith("no single change healed it")
    assert not any(rung.heals for rung in found.rungs)


def test_it_is_reproduced_small(worker: Any, out: Path) -> None:
    fake = worker(healed_by("dtype=bfloat16"))
    found = triaged(planned(out))
    assert found.base.steps == FEW_STEPS
    rungs = {rung.evidence.steps for rung in found.rungs if rung.evidence}
    assert rungs == {2}
    healed = [asked for asked in fake.ran if asked.dtype == "bfloat16" and asked.workload.steps == 8]
    assert [asked.seed for asked in healed] == [0, 1, 2]


def test_a_late_failure_takes_the_steps_it_needs(worker: Any, out: Path) -> None:
    fake = worker(healed_by("dtype=bfloat16", at=5))
    found = triaged(planned(out))
    assert [asked.workload.steps for asked in fake.ran[:2]] == [FEW_STEPS, 8]
    assert found.base.failing_step == 5
    assert {rung.evidence.steps for rung in found.rungs if rung.evidence} == {6}
    assert found.chosen == "dtype=bfloat16"


def test_a_change_that_only_delays_the_failure_is_not_chosen(worker: Any, out: Path) -> None:
    def outcome(asked: RunRequest) -> dict[str, Any]:
        return failing(asked, at=6) if asked.attention == "eager" else healed_by("dtype=bfloat16")(asked)

    worker(outcome)
    found = triaged(planned(out))
    assert by_name(found)["attention=eager"].heals is True
    assert found.chosen == "dtype=bfloat16"
    assert [(seed.rung, seed.heals) for seed in found.confirmations] == [
        ("attention=eager", False), *[("dtype=bfloat16", True)] * SEEDS]  # fmt: skip


def test_a_change_that_fails_on_another_seed_is_not_chosen(worker: Any, out: Path) -> None:
    def outcome(asked: RunRequest) -> dict[str, Any]:
        return {} if asked.dtype == "bfloat16" and asked.seed < 2 else failing(asked)

    worker(outcome)
    found = triaged(planned(out))
    assert found.chosen is None
    assert [seed.heals for seed in found.confirmations] == [True, True, False]
    assert found.conclusion == "no single change healed every seed (the first seed was healed by: bfloat16)"


def test_a_seed_that_does_not_fail_as_asked_is_said(worker: Any, out: Path) -> None:
    def outcome(asked: RunRequest) -> dict[str, Any]:
        return {} if asked.seed == 1 else healed_by("dtype=bfloat16")(asked)

    fake = worker(outcome)
    found = triaged(planned(out))
    assert (found.chosen, found.confirmed) == ("dtype=bfloat16", False)
    assert "2 of 3 seeds fail as asked" in found.conclusion
    unhealed = [asked.workload.steps for asked in fake.ran if asked.seed == 1 and asked.dtype == "float16"]
    assert unhealed == [FEW_STEPS, 8]


def test_a_rung_that_does_not_complete_is_a_rung_with_that_outcome(worker: Any, out: Path) -> None:
    def outcome(asked: RunRequest) -> dict[str, Any]:
        return out_of_memory(asked) if asked.backend == "bf16" else healed_by("dtype=bfloat16")(asked)

    worker(outcome)
    rung = by_name(triaged(planned(out)))["backend=bf16"]
    assert rung.evidence is not None
    assert (rung.evidence.outcome, rung.heals, rung.evidence.finite) == ("out_of_memory", None, None)


def test_a_base_that_does_not_complete_ends_it(worker: Any, out: Path) -> None:
    fake = worker(out_of_memory)
    found = triaged(planned(out))
    assert len(fake.ran) == 1
    assert found.base.finite is None
    assert found.conclusion == "nothing can be said: CUDA out of memory"


def test_a_scaler_that_never_settles_is_a_failure_that_bfloat16_heals(worker: Any, out: Path) -> None:
    """Loss finite, norm not, nothing trained: a plain four steps would not tell it from a scaler at work."""
    worker(lambda asked: skipping(asked, until=99) if asked.dtype == "float16" else {})
    found = triaged(planned(out))
    assert found.base.finite is False
    assert "lowering the scale to 1 did not help" in found.base.reason
    assert found.chosen == "dtype=bfloat16"


def test_the_same_command_again_runs_nothing(worker: Any, out: Path) -> None:
    worker(healed_by("dtype=bfloat16"))
    first = triaged(planned(out))
    again = worker(lambda asked: {})
    second = triaged(planned(out))
    assert again.ran == []
    assert written(second.model_copy(update={"ended_at": first.ended_at})) == written(first)


def test_force_repeats_each_run_once(worker: Any, out: Path) -> None:
    fake = worker(healed_by("dtype=bfloat16"))
    triaged(planned(out))
    forced = worker(healed_by("dtype=bfloat16"))
    triaged(planned(out, force=True))
    assert [asked.key for asked in forced.ran] == [asked.key for asked in fake.ran]


def test_only_some_changes(worker: Any, out: Path) -> None:
    fake = worker(healed_by("dtype=bfloat16", "attention=eager"))
    found = triaged(planned(out, only=("compute-dtype",)))
    assert found.chosen == "dtype=bfloat16"
    assert by_name(found)["attention=eager"].note == "not asked for (--only)"
    assert {asked.attention for asked in fake.ran} == {"sdpa"}


def test_the_healed_configuration_is_the_healed_run(worker: Any, out: Path) -> None:
    worker(healed_by("dtype=bfloat16"))
    found = {one.target: one.text for one in triaged(planned(out, seed=7)).configurations}
    assert yaml.safe_load(found["llamafactory"])["bf16"] is True
    assert yaml.safe_load(found["axolotl"])["seed"] == 7
    assert "dtype=torch.bfloat16," in found["python"]
    ast.parse(found["python"])


def test_the_base_key_names_a_record(worker: Any, out: Path) -> None:
    worker(healed_by("dtype=bfloat16"))
    found = triaged(planned(out))
    keys = [found.base.key, *(rung.evidence.key for rung in found.rungs if rung.evidence),
            *(seed.healed.key for seed in found.confirmations)]  # fmt: skip
    for key in keys:
        assert (out / f"{key}.record.json").is_file()


# ---- what is asked -------------------------------------------------------------------------------


@pytest.mark.parametrize("backends", [(), ("all",), ("bf16", "hqq"), ("bf16,hqq",)])
def test_exactly_one_backend(backends: tuple[str, ...], out: Path) -> None:
    with pytest.raises(BadValue, match="exactly one backend"):
        planned(out, backends=backends)


def test_the_same_backend_twice_is_one(out: Path) -> None:
    assert planned(out, backends=("hqq,hqq",)).base.backend == "hqq"


def test_bad_input_is_one_line(command: Command) -> None:
    assert "exactly one backend" in command.refused("triage", "--preset", "tiny")
    assert "did you mean 'attention'" in command.refused(
        "triage", "--preset", "tiny", "--backend", "bf16", "--only", "atention"
    )
    assert "No such option '--repeats'" in command.refused("triage", "--repeats", "2")


# ---- what is kept and shown ----------------------------------------------------------------------


def test_it_is_read_as_it_was_written(worker: Any, out: Path) -> None:
    worker(healed_by("dtype=bfloat16"))
    found = triaged(planned(out))
    assert read_triage(out) is None
    assert save_triage(out, found) == out / FILE_NAME
    assert written(read_triage(out)) == written(found)
    assert json.loads((out / FILE_NAME).read_text())["triage_version"] == 1


@pytest.mark.parametrize("text", ["", "[]", '{"triage_version": 1}', "\x00"])
def test_a_broken_file_is_named(text: str, tmp_path: Path) -> None:
    (tmp_path / FILE_NAME).write_text(text)
    with pytest.raises(BrokenFile, match=r"triage\.json' is not a triage"):
        read_triage(tmp_path)


def test_losses_that_are_not_finite_survive_the_file(worker: Any, out: Path) -> None:
    worker(healed_by())
    save_triage(out, triaged(planned(out)))
    read = read_triage(out)
    assert read is not None
    assert str(read.base.first_loss) == "nan"


def test_the_cause_is_the_located_one() -> None:
    told = cause(overflowing())
    assert told is not None
    assert not told.startswith("first failure")
    assert "down_proj" in told
    assert cause(record_of(request("bf16"))) is None


def shown(found: Triage) -> str:
    text = StringIO()
    Console(width=300, file=text).print(ladder_text(found))
    return text.getvalue()


def test_the_text_says_what_helped_and_why(worker: Any, out: Path) -> None:
    worker(healed_by("dtype=bfloat16"))
    text = shown(triaged(planned(out)))
    lines = {line.split("  ")[0]: line for line in text.splitlines()}
    assert " yes " in lines["bfloat16"]
    assert " no " in lines["clipping off"]
    assert "the loss is NaN at step 0; first in model.layers.0.mlp.down_proj" in lines["clipping off"]
    assert "not applicable: needs CUDA" in lines["attention kernel sdpa_flash"]
    assert "synthetic" in text
    assert "smallest first" in text
    assert "Seed 2: as asked, the loss is NaN at step 0; with bfloat16, all losses" in text
    assert "Result: the smallest change that heals it: bfloat16 (3 of 3 seeds" in text


def test_a_ladders_runs_stand_in_the_ladder_and_not_in_every_table(worker: Any, out: Path) -> None:
    """Twenty runs that differ in one setting each would bury the two that matter."""
    worker(healed_by("dtype=bfloat16"))
    plan = planned(out)
    found = triaged(plan)
    save_triage(out, found)
    records = list(plan.sweep.store.records())
    comparison, files = written_report(records, out)
    (first, *_) = [seed for seed in found.confirmations if seed.rung == found.chosen]
    assert {row.record.key for row in comparison.rows} == {found.base.key, first.healed.key}
    assert found.rung_keys == {record.key for record in records} - {found.base.key, first.healed.key}
    page = files.html.read_text(encoding="utf-8")
    assert "Triage of a failing run" in page
    assert all(rung.change in page for rung in found.rungs)


def test_what_was_recorded_is_no_markup(worker: Any, out: Path) -> None:
    worker(lambda asked: failing(asked, module="[red]x[/red]"))
    assert "[red]x[/red]" in shown(triaged(planned(out)))


# ---- the real thing ------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_dial_overflows_float16_and_bfloat16_heals_it(command: Command, out: Path) -> None:
    done = command.run(
        "triage", "--preset", "tiny", "--backend", "bf16", "--dtype", "float16", "--stress", f"{MODULE}=1048576",
        "--only", "compute-dtype", "--out", out, "--json", timeout=500)  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = Triage.model_validate_json(done.stdout)
    assert written(read_triage(out)) == written(found)
    assert (found.failed, found.chosen, found.confirmed) == (True, "dtype=bfloat16", True)
    assert found.base.failing_module == MODULE
    assert found.cause is not None
    assert MODULE in found.cause


@pytest.mark.slow
def test_a_run_without_a_failure_exits_with_0_and_no_healing_change_with_1(
    command: Command, out: Path
) -> None:
    fine = command.run("triage", "--preset", "tiny", "--backend", "bf16", "--steps", "2", "--out", out)
    assert fine.returncode == 0, fine.stderr
    assert "Result: nothing failed" in fine.stdout
    none = command.run("triage", "--preset", "tiny", "--backend", "bf16", "--dtype", "float16", "--stress",
                       f"{MODULE}=1048576", "--steps", "2", "--only", "clipping", "--out", out)  # fmt: skip
    assert none.returncode == 1, none.stderr
    assert "Result: no single change healed it, of 1 that were tried" in none.stdout
