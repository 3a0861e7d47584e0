"""The stability margin: the bisection, what the records say of it, the table, and one real measurement."""

from __future__ import annotations

import json
import math
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from bench.ask.plan import RunRequest
from bench.ask.stress import parse_stress
from bench.errors import BadValue
from bench.judge.finiteness import judge_finiteness
from bench.judge.ladder import evidence
from bench.judge.margin import Margin, find_margins, next_exponent
from bench.judge.scaler import PATIENCE_SKIPS
from bench.record.schema import Record
from bench.run.asked import Asked
from bench.run.margin import arrange_margin, default_module, measure_margins, stressed
from bench.run.one_by_one import SETTLING_STEPS, OneByOne
from bench.show.margin import bits_in_words, dtype_in_words, ending_in_words, margin_table, margin_values
from bench.show.progress import Silent
from tests.command import Command
from tests.fake_worker import Outcome, failing, out_of_memory, record_of, skipping
from tests.record_factory import eight_backends, first_failure, probed, quantization, request, step

MODULE = "model.layers.1.mlp.up_proj"

# ---- did it train with finite numbers? -----------------------------------------------------------


def of_steps(*steps: Any, **changes: Any) -> Record:
    return record_of(request("bf16"), steps=steps, **changes)


def skipped(index: int, **changes: Any) -> Any:
    return step(index, applied=False, gradient_norm=math.inf, **changes)


def test_a_finite_run_is_finite() -> None:
    assert judge_finiteness(record_of(request("bf16"))).finite is True


def test_short_and_synthetic_runs_are_judged_too() -> None:
    short = of_steps(step(0, warmup=True), step(1, warmup=False))
    synthetic = record_of(request("bf16", weights="synthetic"))
    broken = record_of(request("bf16", weights="synthetic"), **failing(request("bf16")))
    assert judge_finiteness(short).finite is True
    assert judge_finiteness(synthetic).finite is True
    assert judge_finiteness(broken).finite is False


@pytest.mark.parametrize(
    ("bad", "name"),
    [
        ({"losses": (1.0, math.nan)}, "the loss is NaN at step 3"),
        ({"losses": (math.inf,), "applied": False}, "the loss is Infinity at step 3"),
        ({"gradient_norm": math.inf}, "the gradient norm is Infinity at step 3"),
    ],
)
def test_what_fails_fails_where_it_stands(bad: dict[str, Any], name: str) -> None:
    found = judge_finiteness(of_steps(step(0), step(1), step(2), step(3, **bad), step(4)))
    assert (found.finite, found.name, found.step, found.reason) == (False, "non_finite", 3, name)


def test_the_scaler_at_work_is_no_failure() -> None:
    assert judge_finiteness(of_steps(skipped(0), skipped(1), step(2))).finite is True
    assert judge_finiteness(of_steps(step(0), step(1), skipped(2))).finite is True


def test_a_scaler_that_never_applied_a_step_says_nothing_yet() -> None:
    found = judge_finiteness(of_steps(*(skipped(index) for index in range(PATIENCE_SKIPS - 1))))
    assert (found.finite, found.name) == (None, "unsettled")


def test_a_scaler_at_its_end_is_a_failure() -> None:
    skips = [skipped(index) for index in range(1, PATIENCE_SKIPS + 1)]
    found = judge_finiteness(of_steps(step(0), *skips))
    assert (found.finite, found.name, found.step) == (False, "skipped", 1)


def test_the_longer_run_is_long_enough_to_tell() -> None:
    assert SETTLING_STEPS > PATIENCE_SKIPS


def test_a_skipped_overflow_is_no_failure_and_an_unskipped_one_is() -> None:
    spared = of_steps(skipped(0), step(1), first_failure=first_failure(step=0, skipped_by_scaler=True))
    hidden = of_steps(step(0), step(1), first_failure=first_failure(step=1))
    assert judge_finiteness(spared).finite is True
    assert judge_finiteness(hidden).finite is False
    assert judge_finiteness(hidden).module == first_failure().module


def test_poisoned_dead_and_broken() -> None:
    poisoned = record_of(request("bf16"), trainable_weights_finite=False)
    dead = of_steps(step(0), *(step(index, gradient_norm=0.0) for index in range(2, 5)))
    proof = record_of(request("bf16")).proof.model_copy(update={"weights_finite": False})
    broken = record_of(request("bf16"), proof=proof)
    assert [judge_finiteness(one).finite for one in (poisoned, dead, broken)] == [False] * 3
    assert [judge_finiteness(one).name for one in (poisoned, dead, broken)] == [
        "poisoned",
        "dead",
        "non_finite",
    ]


def test_a_run_that_did_not_complete_says_nothing_but_its_failing_numbers() -> None:
    asked = request("bf16")
    ended = record_of(asked, **out_of_memory(asked))
    both = record_of(asked, **failing(asked), status="crashed", stage="train", message="killed")
    assert (judge_finiteness(ended).finite, judge_finiteness(ended).name) == (None, "out_of_memory")
    assert judge_finiteness(both).finite is False


def test_the_module_is_that_of_the_failing_step_only() -> None:
    asked = request("bf16")
    steps = failing(asked, at=3)["steps"]
    other = record_of(asked, steps=steps, first_failure=first_failure(step=0, skipped_by_scaler=True))
    assert judge_finiteness(other).step == 3
    assert judge_finiteness(other).module is None


def test_dead_tensors_are_a_failure() -> None:
    from tests.record_factory import probe

    made = probed(record_of(request("bf16")))
    assert judge_finiteness(made).finite is True
    silent = {
        f"step_{index}": probe(index).model_copy(
            update={"tensor_norms": (0.0,) * len(probe(index).tensor_norms),
                    "zero_values": (9,) * len(probe(index).zero_values)}
        )
        for index in range(8)
    }  # fmt: skip
    assert judge_finiteness(probed(made, **silent)).name == "dead"


# ---- the bisection -------------------------------------------------------------------------------


def searched(last_finite: int, max_bits: int) -> dict[int, bool | None]:
    known: dict[int, bool | None] = {}
    while (exponent := next_exponent(known, max_bits)) is not None:
        assert exponent not in known
        assert 0 <= exponent <= max_bits
        known[exponent] = exponent <= last_finite
    return known


@given(max_bits=st.integers(1, 126), last_finite=st.integers(-1, 130))
def test_the_bisection_brackets_the_limit(max_bits: int, last_finite: int) -> None:
    known = searched(last_finite, max_bits)
    assert len(known) <= 2 + math.ceil(math.log2(max_bits))
    finite = [exponent for exponent, fine in known.items() if fine]
    if last_finite < 0:
        assert known == {0: False}
    elif last_finite >= max_bits:
        assert known == {0: True, max_bits: True}
    else:
        assert max(finite) == last_finite
        assert known[last_finite + 1] is False


@pytest.mark.parametrize("known", [{0: None}, {0: True, 8: None}, {0: True, 8: False, 4: None}])
def test_what_cannot_be_said_ends_the_search(known: dict[int, bool | None]) -> None:
    assert next_exponent(known, 8) is None


# ---- what records say ----------------------------------------------------------------------------


def made(
    exponent: int, last_finite: int = 5, backend: str = "bf16", module: str = MODULE, **changes: Any
) -> Record:
    """A record at 2**exponent, finite up to ``last_finite``."""
    stress = {module: 2.0**exponent} if exponent else {}
    asked = request(backend, stress=stress, **changes)
    return record_of(asked, **({} if exponent <= last_finite else failing(asked, module=module)))


def test_ordinary_folders_hold_no_margin() -> None:
    assert find_margins([]) == ()
    assert find_margins(eight_backends(repeats=2)) == ()


def test_a_whole_bisection() -> None:
    (found,) = find_margins([made(exponent) for exponent in (0, 24, 12, 6, 3, 4, 5)])
    assert (found.largest_finite_factor, found.smallest_failing_factor) == (32, 64)
    assert (found.bits, found.exact, found.censored, found.ended_by) == (5, True, False, None)
    assert [probe.factor for probe in found.probes] == [1, 8, 16, 32, 64, 4096, 2**24]
    assert [probe.verdict for probe in found.probes] == ["finite"] * 4 + ["non_finite"] * 3
    assert {probe.module for probe in found.probes} == {None, MODULE}
    assert (found.module, found.requested_dtype, found.effective_dtype) == (MODULE, "bfloat16", "bfloat16")


def test_a_bound_is_no_exact_margin() -> None:
    (found,) = find_margins([made(0), made(8), made(3)])
    assert (found.bits, found.exact, found.censored) == (3, False, False)


def test_nothing_failed_means_censored() -> None:
    (found,) = find_margins([made(0, 99), made(24, 99)])
    assert (found.bits, found.exact, found.censored, found.smallest_failing_factor) == (24, False, True, None)


def test_a_failing_control_leaves_no_margin() -> None:
    (found,) = find_margins([made(0, -1), made(1, -1)])
    assert (found.bits, found.censored, found.smallest_failing_factor) == (None, False, 1)


def test_a_finite_run_above_a_failing_one_does_not_count() -> None:
    (found,) = find_margins([made(0), made(8), made(9, 99)])
    assert (found.bits, found.smallest_failing_factor) == (0, 256)


def test_one_factor_is_no_margin_unless_it_was_asked_for() -> None:
    assert find_margins([made(4)]) == ()
    assert find_margins([made(0)]) == ()
    (found,) = find_margins([made(0, -1)], MODULE)
    assert (found.bits, found.module) == (None, MODULE)


def test_the_control_is_shared_by_patterns_and_not_by_settings() -> None:
    records = [made(0), made(2), made(3, module="model.layers.0.mlp.up_proj"), made(8, 3, dtype="float16")]
    found = {margin.module: margin for margin in find_margins(records)}
    assert {module: margin.bits for module, margin in found.items()} == {
        MODULE: 2,
        "model.layers.0.mlp.up_proj": 3,
    }


def test_several_patterns_and_small_factors_are_left_out() -> None:
    both = request("bf16", stress={MODULE: 4.0, "model.layers.0.mlp.up_proj": 4.0})
    small = request("bf16", stress={MODULE: 0.25})
    records = [made(0), record_of(both), record_of(small)]
    assert find_margins(records) == ()
    (found,) = find_margins([*records, made(2)])
    assert [probe.factor for probe in found.probes] == [1, 4]


def test_what_differs_in_a_setting_is_another_margin_with_a_label_of_its_own() -> None:
    from bench.ask.experiment import Lora

    records = [
        *(made(exponent) for exponent in (0, 5)),
        *(made(exponent, lora=Lora(rank=16)) for exponent in (0, 5)),
        *(made(exponent, seed=1, repeat=1) for exponent in (0, 5)),
    ]
    found = find_margins(records)
    assert len(found) == 3
    assert len({margin.label for margin in found}) == 3
    assert sorted(margin.label for margin in found if "seed" in margin.label) == [
        "bf16 (rank=8), seed 0", "bf16 (rank=8), seed 1"]  # fmt: skip


def test_what_is_only_watched_or_said_does_not_part_runs() -> None:
    (found,) = find_margins(
        [made(0), made(3, trace=True), made(4, timeout_seconds=1.0), made(5, fidelity=True)]
    )
    assert len(found.probes) == 4


def test_the_longer_run_decides_a_factor() -> None:
    short = request("bf16", stress={MODULE: 4.0}, workload=request().workload.model_copy(update={"steps": 3}))
    long = request("bf16", stress={MODULE: 4.0})
    undecided = record_of(short, **skipping(short, until=99))
    for records in ([made(0), undecided, record_of(long)], [record_of(long), undecided, made(0)]):
        (found,) = find_margins(records)
        assert (found.bits, found.probes[1].key) == (2, long.key)


def test_another_failure_ends_it_and_is_named() -> None:
    asked = request("bf16", stress={MODULE: 2.0**12})
    (found,) = find_margins([made(0), record_of(asked, **out_of_memory(asked))])
    assert (found.bits, found.ended_by, found.censored) == (0, "out_of_memory", True)
    (settled,) = find_margins([made(0), record_of(asked, **out_of_memory(asked)), made(6), made(5)])
    assert settled.ended_by is None


def test_the_dtype_that_was_computed_in_is_told() -> None:
    stress = {MODULE: 4.0}
    forced = quantization("awq", effective_dtype="float16")
    records = [record_of(request("awq", **extra), quantization=forced) for extra in ({}, {"stress": stress})]
    (found,) = find_margins(records)
    assert (found.requested_dtype, found.effective_dtype) == ("bfloat16", "float16")
    assert dtype_in_words(found) == "bf16 (computed in fp16)"


# ---- measuring, with a stand-in for the worker ---------------------------------------------------


def exponent_of(asked: RunRequest) -> float:
    return math.log2(next(iter(asked.stress.values()), 1.0))


def limits(**last_finite: int) -> Outcome:
    """Finite up to so many bits, by dtype."""
    return lambda asked: {} if exponent_of(asked) <= last_finite[asked.dtype] else failing(asked)


def measured(out: Path, *backends: str, force: bool = False, max_bits: int = 24) -> tuple[Margin, ...]:
    asked = Asked(preset="tiny", backends=backends, out=out, force=force)
    plan = arrange_margin(asked, dtypes=(), module=None, max_bits=max_bits)
    runner = OneByOne(plan.sweep, Silent(), evidence)
    measure_margins(plan, runner, next_exponent)
    return find_margins(runner.records, plan.module)


def test_every_backend_and_dtype_gets_its_margin(worker: Any, out: Path) -> None:
    fake = worker(limits(float16=11, bfloat16=30))
    found = measured(out, "bf16", "hqq")
    assert [(margin.backend, margin.requested_dtype, margin.bits) for margin in found] == [
        ("bf16", "float16", 11), ("hqq", "float16", 11), ("bf16", "bfloat16", 24), ("hqq", "bfloat16", 24)]  # fmt: skip
    assert [margin.censored for margin in found] == [False, False, True, True]
    assert {asked.workload.steps for asked in fake.ran} == {2}
    assert {asked.fidelity for asked in fake.ran} == {False}
    assert {asked.seed for asked in fake.ran} == {0}


def test_the_same_command_again_runs_nothing_and_says_the_same(worker: Any, out: Path) -> None:
    worker(limits(float16=11, bfloat16=30))
    first = measured(out, "bf16")
    again = worker(limits(float16=0, bfloat16=0))
    assert measured(out, "bf16") == first
    assert again.ran == []


def test_force_repeats_each_probe_once(worker: Any, out: Path) -> None:
    fake = worker(limits(float16=11, bfloat16=30))
    measured(out, "bf16")
    count = len(fake.ran)
    forced = worker(limits(float16=11, bfloat16=30))
    measured(out, "bf16", force=True)
    assert len(forced.ran) == count
    assert len({asked.key for asked in forced.ran}) == count


def test_a_scaler_that_was_still_searching_gets_more_steps(worker: Any, out: Path) -> None:
    def outcome(asked: RunRequest) -> dict[str, Any]:
        return skipping(asked, until=5) if exponent_of(asked) == 3 else limits(float16=3, bfloat16=3)(asked)

    fake = worker(outcome)
    found = measured(out, "bf16", max_bits=6)
    assert [margin.bits for margin in found] == [3, 3]
    longer = [asked for asked in fake.ran if asked.workload.steps == SETTLING_STEPS]
    assert [exponent_of(asked) for asked in longer] == [3, 3]


def test_a_run_out_of_memory_ends_that_backend_only(worker: Any, out: Path) -> None:
    def outcome(asked: RunRequest) -> dict[str, Any]:
        return out_of_memory(asked) if asked.backend == "hqq" else limits(float16=2, bfloat16=2)(asked)

    fake = worker(outcome)
    found = {margin.backend: margin for margin in measured(out, "hqq", "bf16", max_bits=4)}
    assert (found["hqq"].bits, found["hqq"].ended_by) == (None, "out_of_memory")
    assert found["bf16"].bits == 2
    assert sum(asked.backend == "hqq" for asked in fake.ran) == 2


def test_the_folder_alone_says_the_same(worker: Any, out: Path) -> None:
    from bench.record.store import Store

    worker(limits(float16=11, bfloat16=30))
    found = measured(out, "bf16")
    assert {margin.bits for margin in find_margins(list(Store(out).records()))} == {
        margin.bits for margin in found
    }


def test_exponent_zero_is_the_unstressed_run() -> None:
    control = request("bf16")
    assert stressed(control, MODULE, 0) is control
    assert stressed(control, MODULE, 7).stress == parse_stress([f"{MODULE}=128"])


# ---- what is asked -------------------------------------------------------------------------------


def test_the_layer_a_third_of_the_way_up() -> None:
    assert default_module({"num_hidden_layers": 30}, None) == "model.layers.10.mlp.up_proj"
    assert default_module({"num_hidden_layers": 30}, 4) == "model.layers.1.mlp.up_proj"
    assert default_module({"num_hidden_layers": 2}, 99) == "model.layers.0.mlp.up_proj"


def test_the_first_line_says_what_is_scaled(out: Path) -> None:
    asked = Asked(preset="tiny", backends=("bf16",), out=out)
    chosen = arrange_margin(asked, dtypes=(), module=None, max_bits=4)
    assert chosen.headline.startswith("scaling model.layers.0.mlp.up_proj (chosen: ")
    given = arrange_margin(asked, dtypes=("float16", "float16"), module=MODULE, max_bits=4)
    assert given.headline.startswith(f"scaling {MODULE} by 2^0 to 2^4: ")
    assert [asked.dtype for asked in given.sweep.requests] == ["float16"]


@pytest.mark.parametrize("max_bits", [0, -3, 127])
def test_bits_out_of_range_are_refused(max_bits: int, out: Path) -> None:
    with pytest.raises(BadValue, match="--max-bits"):
        arrange_margin(Asked(preset="tiny", out=out), dtypes=(), module=None, max_bits=max_bits)


def test_one_step_has_no_warm_up(out: Path) -> None:
    asked = Asked(preset="tiny", backends=("bf16",), steps=1, out=out)
    plan = arrange_margin(asked, dtypes=(), module=None, max_bits=4)
    assert plan.sweep.requests[0].workload.warmup_steps == 0


def test_bad_input_is_one_line(command: Command) -> None:
    assert "--module 'nothing*' matches no linear layer" in command.refused(
        "margin", "--preset", "tiny", "--module", "nothing*"
    )
    assert "did you mean 'float16'" in command.refused("margin", "--preset", "tiny", "--dtype", "float61")
    assert "No such option '--stress'" in command.refused(
        "margin", "--preset", "tiny", "--stress", f"{MODULE}=2"
    )


# ---- what is shown -------------------------------------------------------------------------------


def shown(*margins: Margin) -> str:
    text = StringIO()
    Console(width=120, file=text).print(margin_table(margins))
    return text.getvalue()


def test_the_table_says_bound_and_place() -> None:
    (exact,) = find_margins([made(exponent, 5) for exponent in (0, 5, 6)])
    (bound,) = find_margins([made(0, 99, "hqq"), made(24, 99, "hqq")])
    (failed,) = find_margins([made(0, -1, "eetq")], MODULE)
    assert [bits_in_words(margin) for margin in (exact, bound, failed)] == ["5", "≥ 24", "–"]  # noqa: RUF001
    assert ending_in_words(exact) == f"non finite, first in {MODULE}"
    assert ending_in_words(bound) == "no factor failed"
    assert ending_in_words(failed).startswith("unstressed already: non finite")
    text = shown(exact, bound, failed)
    assert "2^5" in text
    assert "synthetic" not in text


def test_synthetic_weights_are_said() -> None:
    asked = [request("bf16", weights="synthetic", stress=stress) for stress in ({}, {MODULE: 4.0})]
    assert "synthetic" in shown(*find_margins([record_of(one) for one in asked]))


def test_what_was_recorded_is_no_markup() -> None:
    name = "[red]x[/red]"
    asked = [request("bf16", stress=stress) for stress in ({}, {name: 4.0})]
    assert name in shown(*find_margins([record_of(one) for one in asked]))


def test_as_plain_values() -> None:
    (values,) = margin_values(find_margins([made(0), made(5), made(6)]))
    assert json.loads(json.dumps(values))["exact"] is True
    assert values["probes"][0]["factor"] == 1


# ---- the real thing ------------------------------------------------------------------------------


@pytest.mark.slow
def test_float16_has_a_margin_on_the_toy(command: Command, out: Path) -> None:
    """2**24 times the weights of the toy is beyond float16 in any case; 1 is not."""
    arguments = ("margin", "--preset", "tiny", "--backend", "bf16", "--dtype", "float16", "--max-bits", "24",
                 "--module", MODULE, "--out", out)  # fmt: skip
    (found,) = command.json(*arguments)
    assert (found["backend"], found["requested_dtype"], found["weights"]) == ("bf16", "float16", "synthetic")
    assert found["exact"] is True
    assert 0 < found["bits"] < 24
    assert found["smallest_failing_factor"] == 2 * found["largest_finite_factor"]
    (where,) = {p["module"] for p in found["probes"] if p["factor"] == found["smallest_failing_factor"]}
    assert where is not None
    assert where.startswith("model.layers.1.")
    records = sorted(out.glob("*.record.json"))
    assert len(records) == len(found["probes"])
    before = [path.stat().st_mtime_ns for path in records]
    assert command.json(*arguments) == [found]
    assert [path.stat().st_mtime_ns for path in sorted(out.glob("*.record.json"))] == before
