"""The choice at the top of the report: it names who leads, what that costs, who is out, and claims no more."""

from __future__ import annotations

import math

from bench.judge.comparison import compare
from bench.judge.decision import MEMORY, SPEED, decide
from bench.record.schema import Record
from bench.show.decision import DecisionText, decision_of
from bench.show.drawing import Plot
from bench.show.page import page
from bench.show.plots import plots
from bench.show.tables import markdown
from tests.record_factory import GIB, eight_backends, failed, first_failure, record


def with_figures(
    backend: str, *, seconds: float, peak_gib: float, repeat: int = 0, **changes: object
) -> Record:
    """A record with other step times and another peak."""
    made = record(backend, repeat=repeat, **changes)
    steps = tuple(step.model_copy(update={"seconds": seconds}) for step in made.steps)
    readings = tuple(
        reading.model_copy(update={"peak_reserved_bytes": int(peak_gib * GIB)})
        for reading in made.memory.readings
    )
    memory = made.memory.model_copy(update={"readings": readings})
    return made.model_copy(update={"steps": steps, "memory": memory})


def told(records: list[Record]) -> DecisionText:
    text = decision_of(compare(records))
    assert text is not None
    return text


def repeated(backend: str, seconds: list[float], peaks: list[float]) -> list[Record]:
    return [
        with_figures(backend, seconds=s, peak_gib=p, repeat=k)
        for k, (s, p) in enumerate(zip(seconds, peaks, strict=True))
    ]


def test_a_trade_names_both_leaders_and_their_price() -> None:
    text = told([
        record("bf16"),
        with_figures("bnb-nf4", seconds=0.30, peak_gib=9.6),
        with_figures("bnb-nf4-dq", seconds=0.33, peak_gib=8.0),
    ])  # fmt: skip
    assert text.sentence.startswith(
        "Of the quantized backends, bnb-nf4-dq needs the least memory (8.00 GiB at the peak), bnb-nf4 is the fastest"
    )
    assert "the price of bnb-nf4-dq is 9.1 % fewer tokens/s, that of bnb-nf4 is 20 % more memory" in text.sentence
    assert "Each ran once" in text.sentence


def test_one_that_leads_in_both_is_the_answer() -> None:
    text = told([
        with_figures("bnb-nf4", seconds=0.30, peak_gib=8.0),
        with_figures("hqq", seconds=0.33, peak_gib=8.9),
    ])  # fmt: skip
    assert text.sentence.startswith("bnb-nf4 needs the least memory and is the fastest (8.00 GiB at the peak")
    assert text.others == ("hqq: 11 % more memory, 9.1 % fewer tokens/s; healthy",)


def test_the_unquantized_reference_is_no_choice() -> None:
    decision = decide(compare([
        with_figures("bf16", seconds=0.1, peak_gib=1.0),
        with_figures("hqq", seconds=0.33, peak_gib=8.9),
    ]))  # fmt: skip
    assert decision is not None
    assert decision.reference is not None
    assert [one.label for one in decision.candidates] == ["hqq"]


def test_the_unquantized_reference_stands_beside_the_leaders() -> None:
    text = told([
        with_figures("bf16", seconds=0.24, peak_gib=16.0),
        with_figures("bnb-nf4", seconds=0.30, peak_gib=9.6),
        with_figures("bnb-nf4-dq", seconds=0.33, peak_gib=8.0),
    ])  # fmt: skip
    said = "bf16, not quantized: 100 % more memory than bnb-nf4-dq, 25 % more tokens/s than bnb-nf4; healthy"
    assert said in text.others
    assert "Of the quantized backends" not in told([
        with_figures("bnb-nf4", seconds=0.30, peak_gib=8.0), with_figures("hqq", seconds=0.33, peak_gib=8.9)
    ]).sentence  # fmt: skip


def test_repeats_that_overlap_are_told_as_level() -> None:
    noisy = repeated("bnb-nf4", [0.30, 0.33, 0.31], [8.0, 8.0, 8.0])
    other = repeated("hqq", [0.31, 0.31, 0.33], [8.0, 8.0, 8.0])
    text = told([*noisy, *other])
    assert text.sentence.startswith("bnb-nf4 and hqq cannot be told apart, in memory or in speed.")
    assert "Each ran once" not in text.sentence


def test_the_first_is_first_within_the_repeats_that_both_completed() -> None:
    """The machine became faster, and the faster backend has the early repeats only."""
    drifting = repeated("bnb-nf4", [0.43, 0.43, 0.30, 0.30, 0.30], [8.0] * 5)
    faster = repeated("hqq", [0.375, 0.375], [8.0] * 2)
    decision = decide(compare([*repeated("bf16", [0.30, 0.30, 0.2, 0.2, 0.2], [9.0] * 5), *drifting, *faster]))
    assert decision is not None
    assert [one.label for one in decision.leaders[SPEED]] == ["hqq"]


def test_level_with_the_first_and_worse_than_another_is_no_leader() -> None:
    """The first scatters, so that all are level with it; the two others differ surely from each other."""
    scattered = repeated("eetq", [0.25, 0.25, 0.36], [8.0] * 3)
    faster = repeated("bnb-nf4", [0.300, 0.300, 0.301], [8.0] * 3)
    slower = repeated("hqq", [0.330, 0.331, 0.330], [8.0] * 3)
    decision = decide(compare([*scattered, *faster, *slower]))
    assert decision is not None
    assert [one.label for one in decision.leaders[SPEED]] == ["eetq", "bnb-nf4"]
    text = told([*scattered, *faster, *slower])
    (hqq,) = [line for line in text.others if line.startswith("hqq")]
    assert "fewer tokens/s" in hqq
    assert "than bnb-nf4" in hqq
    assert "hqq" not in text.sentence


def test_a_loss_of_nan_is_no_choice_though_synthetic_weights_are_not_judged() -> None:
    dead = with_figures("awq", seconds=0.1, peak_gib=2.0, weights="synthetic")
    steps = tuple(step.model_copy(update={"losses": (math.nan,)}) for step in dead.steps)
    dead = dead.model_copy(update={"steps": steps})
    others = [with_figures(name, seconds=0.3, peak_gib=8.0, weights="synthetic") for name in ("hqq", "bnb-nf4")]
    found = compare([dead, *others])
    text = decision_of(found)
    assert text is not None
    assert "awq" not in text.sentence
    assert "awq: the loss is NaN at step 0" in text.out
    (alone,) = [decision_of(compare([dead]))]
    assert alone is not None
    assert alone.lead == "None of the quantized backends trained soundly here."
    (pareto,) = [plot for plot in plots(found) if plot.name == "pareto"]
    assert "Crossed out, because their training broke: awq (non finite)" in pareto.alternative


def test_repeats_that_agree_tell_small_differences_apart_with_their_interval() -> None:
    fast = repeated("bnb-nf4", [0.300, 0.301, 0.300], [9.0, 9.0, 9.0])
    slow = repeated("hqq", [0.312, 0.312, 0.313], [8.0, 8.0, 8.0])
    decision = decide(compare([*fast, *slow]))
    assert decision is not None
    (hqq,) = [one for one in decision.candidates if one.label == "hqq"]
    assert hqq.differences[SPEED].certainty == "surely"
    assert hqq.differences[SPEED].better is False
    assert hqq.differences[MEMORY].better is None  # it is the first itself
    assert "fewer tokens/s (" in told([*fast, *slow]).sentence


def test_a_difference_within_the_noise_margin_of_one_run_is_none() -> None:
    text = told([
        with_figures("bnb-nf4", seconds=0.300, peak_gib=8.00),
        with_figures("hqq", seconds=0.301, peak_gib=8.03),
    ])  # fmt: skip
    assert "cannot be told apart" in text.sentence


def test_what_broke_or_failed_is_out_with_its_reason_however_small_and_fast() -> None:
    broken = with_figures("awq", seconds=0.1, peak_gib=2.0)
    broken = broken.model_copy(update={
        "steps": tuple(
            step.model_copy(update={"gradient_norm": float("nan"), "losses": (float("nan"),)})
            for step in broken.steps
        ),
        "first_failure": first_failure(step=3, module="model.layers.10.mlp.up_proj"),
    })  # fmt: skip
    text = told([
        with_figures("bnb-nf4", seconds=0.30, peak_gib=8.0),
        with_figures("hqq", seconds=0.33, peak_gib=8.9),
        broken,
        failed("bnb-int8", "out_of_memory", "train", "CUDA out of memory"),
    ])  # fmt: skip
    assert "awq" not in text.sentence
    assert text.out[0] == "awq: non finite at step 3 in model.layers.10.mlp.up_proj"
    assert text.out[1].startswith("bnb-int8: out of memory")


def test_what_is_not_alike_is_no_choice_and_it_is_said_why() -> None:
    text = told(eight_backends())
    assert "awq: stands apart (effective dtype float16 instead of bfloat16)" in text.out
    assert not [line for line in text.others if line.startswith("awq")]


def test_synthetic_weights_judge_no_stability() -> None:
    assert "Stability is not judged here." in told(eight_backends(weights="synthetic")).sentence


def test_nothing_is_said_where_no_quantized_backend_completed() -> None:
    assert decision_of(compare([record("bf16"), failed("hqq", "crashed", "load", "killed")])) is None
    assert decision_of(compare([])) is None


def test_the_page_and_the_markdown_begin_with_it() -> None:
    comparison = compare(eight_backends())
    sentence = told(eight_backends()).sentence
    assert sentence[:60] in page(comparison, drawn=[])
    assert markdown(comparison).startswith(f"**{sentence}**")


def figure_of(records: list[Record]) -> Plot:
    return next(plot for plot in plots(compare(records)) if plot.name == "pareto")


def test_the_figure_names_who_is_dominated_and_by_whom() -> None:
    words = figure_of([
        with_figures("bnb-nf4", seconds=0.30, peak_gib=9.0),
        with_figures("bnb-nf4-dq", seconds=0.33, peak_gib=8.0),
        with_figures("hqq", seconds=0.40, peak_gib=9.9),
    ]).alternative  # fmt: skip
    assert words.startswith("Nothing is better in both than bnb-nf4 (9.00 GiB")
    assert "bnb-nf4-dq (8.00 GiB" in words
    assert "Dominated, and drawn pale: hqq (by bnb-nf4)." in words


def test_what_broke_dominates_nothing_and_is_crossed_out() -> None:
    broken = with_figures("awq", seconds=0.1, peak_gib=2.0)
    steps = tuple(step.model_copy(update={"gradient_norm": math.nan}) for step in broken.steps)
    words = figure_of([
        with_figures("bnb-nf4", seconds=0.30, peak_gib=9.0),
        broken.model_copy(update={"steps": steps}),
    ]).alternative  # fmt: skip
    assert "Nothing is better in both than bnb-nf4" in words
    assert "Crossed out, because their training broke: awq (non finite)." in words


def test_there_is_no_figure_of_a_single_backend() -> None:
    assert not [plot for plot in plots(compare([record("hqq")])) if plot.name == "pareto"]


def test_runs_of_another_model_are_another_question() -> None:
    def of_model(name: str, backend: str) -> Record:
        made = record(backend)
        model = made.request.model.model_copy(update={"name": name, "note": f"a remark on {name}"})
        work = made.workload and made.workload.model_copy(update={"digest": name})
        return made.model_copy(update={
            "request": made.request.model_copy(update={"model": model}), "workload": work,
        })  # fmt: skip

    text = told([of_model("one", b) for b in ("bnb-nf4", "hqq", "bf16")] + [of_model("two", "bnb-nf4")])
    assert text.out == ("1 run of two: another model; compare them by themselves",)
    assert "a remark" not in text.sentence + "".join(text.others)
    assert "bnb-nf4 (model=one)" in text.sentence
