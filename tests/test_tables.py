import csv as standard_csv
import io
import math

import pytest
from rich.console import Console

from bench.judge.comparison import compare
from bench.show.columns import COLUMNS, MISSING, number, sections
from bench.show.escaping import escaped
from bench.show.tables import csv, markdown, terminal_table
from tests.record_factory import (
    FAILING_MODULE,
    eight_backends,
    failed,
    fidelity,
    margin_runs,
    overflowing,
    planted,
    probed,
    record,
    step,
    triage,
)


def mixed():
    broken = record(
        "gptq", steps=tuple(step(i, losses=(math.nan,), gradient_norm=math.inf) for i in range(8))
    )
    missing = failed("hqq", "unavailable", "load", "hqq is not installed | [red]x[/red]")
    return compare([record("bf16"), record("bnb-nf4"), broken, missing])


def drawn(comparison, width=160):
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(terminal_table(comparison))
    return console.export_text()


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, MISSING),
        (0, "0"),
        (0.212106, "0.212"),
        (2411.878, "2,412"),
        (63.2, "63.2"),
        (9.996, "10.0"),
        (math.nan, "NaN"),
        (math.inf, "Infinity"),
        (-math.inf, "-Infinity"),
        (1.5e-7, "1.50e-07"),
        (-0.5, "-0.500"),
    ],
)
def test_numbers_in_words(value, text):
    assert number(value) == text


@pytest.mark.parametrize("width", [80, 100, 160])
def test_the_terminal_table_never_breaks_a_name_or_a_number(width):
    text = drawn(compare(eight_backends()), width)
    for word in ("bnb-nf4-dq", "2,412", "0.212", "1.957→1.554", "completed", "fp16*"):
        assert word in text
    assert max(len(line) for line in text.splitlines()) <= width


def test_the_terminal_shows_failures_the_caveat_and_values_that_are_not_finite():
    text = drawn(mixed())
    assert "hqq: unavailable (load): hqq is not installed | [red]x[/red]" in text
    assert "no interval" in text
    assert "NaN" in text
    assert "Infinity" in text
    assert MISSING in text


def test_repeats_show_their_range():
    text = drawn(compare(eight_backends(repeats=3)), 120)
    assert "0.212–0.214" in text  # noqa: RUF001
    assert "(0.212 to 0.214)" in markdown(compare(eight_backends(repeats=3)))


def test_markdown_has_a_line_for_each_backend_and_marks_within_the_group():
    text = markdown(compare(eight_backends(), {"dtype"}))
    lines = [line for line in text.partition("**Stability**")[0].splitlines() if line.startswith("| ")]
    assert len(lines) == 9
    assert all(line.count("|") == len(COLUMNS) + 1 for line in lines)
    assert "**2,412**" in text
    assert "float16 (asked: bfloat16)" in text


def test_markdown_is_not_broken_by_what_a_message_holds():
    text = markdown(mixed())
    assert "\\| \\[red\\]" in text
    assert escaped("a|b\n<script>`x`") == "a\\|b &lt;script&gt;\\`x\\`"
    assert escaped("Foo.__init__() in up_proj, ~~not~~ _so_") == r"Foo.\_\_init\_\_() in up_proj, \~\~not\~\~ \_so\_"


def table_below(text, title):
    """Rows of the Markdown table below a title, cells stripped."""
    block = text.split(f"**{title}**", 1)[1].strip().split("\n\n")[0]
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in block.splitlines()]


def test_markdown_has_the_verdicts_with_their_evidence_and_the_first_failure():
    text = markdown(compare([probed(record("bf16")), overflowing()]))
    assert (
        "- gptq: poisoned: the trained weights are not all finite after the last step; the loss is NaN at step 5"
        in text
    )
    measures = table_below(text, "Measures beside their thresholds")
    ratio = [cell.startswith("norm over mean before (at most 8)") for cell in measures[0]].index(True)
    assert measures[2][0] == "bf16"
    assert float(measures[2][ratio]) < 8
    assert [cell for cell in measures[3] if cell.endswith("beyond")] == ["1 beyond", "3 beyond", "1 beyond"]
    assert "arXiv 2606.00539" in text
    (failure,) = table_below(text, "Where each run failed first")[2:]
    assert failure[0] == "gptq"
    for word in (
        "overflow in the forward",
        FAILING_MODULE,
        "step 5; micro-batch 0; forward",
        "61,440",
        "aten.mm",
    ):
        assert word in "; ".join(failure)
    healed = table_below(text, "What healed the failing micro-batch")[2:]
    assert [line[2] for line in healed] == [
        "no",
        "could not be tried (OutOfMemoryError: CUDA out of memory)",
        "yes",
    ]


def test_markdown_has_fidelity_margins_and_the_triage_where_there_are_any():
    comparison = compare([record("bf16", fidelity=fidelity(0.99998)), *margin_runs("hqq", 11)])
    text = markdown(comparison, triage())
    assert table_below(text, "LoRA gradient beside the unquantized model's, on one fixed batch")[2][:3] == [
        "bf16",
        "bfloat16",
        "0.99998",
    ]
    margins = table_below(text, "Stability margin: log2 of the largest factor that stays finite")
    assert margins[2][3:6] == ["11", "2,048", "4,096"]
    ladder = table_below(text, "The ladder of changes")
    assert [line[2] for line in ladder[2:]] == ["no", MISSING, "yes"]
    assert ladder[4][0] == "bfloat16 (chosen)"
    plain = markdown(compare([record("bf16")]))
    for title in ("**LoRA gradient", "**Stability margin", "**Triage", "failed first**", "**What healed"):
        assert title not in plain


def test_markdown_of_stability_is_not_broken_by_what_records_hold():
    evil = "a|b\n**x** <script>"
    text = markdown(compare([planted(evil), record("bf16")]), triage(evil))
    assert "<script>" not in text
    assert "**x**" not in text
    failures = table_below(text, "Where each run failed first")
    assert {line.count("|") for line in text.split("**Where each run failed first**")[1].strip().split("\n\n")[0]
            .replace("\\|", "").splitlines()} == {7}  # fmt: skip
    assert failures


def test_csv_has_the_first_failure_and_the_lowest_headroom():
    lines = list(
        standard_csv.DictReader(
            io.StringIO(csv(compare([probed(record("bf16", fidelity=fidelity())), overflowing()])))
        )
    )
    assert lines[1]["first_failure_module"] == FAILING_MODULE
    assert (lines[1]["first_failure_step"], lines[1]["first_failure_kind"]) == ("5", "forward_overflow")
    assert lines[0]["first_failure_step"] == ""
    assert float(lines[0]["lowest_headroom_bits"]) > 100
    assert float(lines[0]["gradient_cosine"]) == pytest.approx(0.981)
    assert lines[1]["gradient_cosine"] == ""


def test_csv_has_raw_values_empty_for_missing_and_words_for_what_is_not_finite():
    comparison = mixed()
    lines = list(standard_csv.DictReader(io.StringIO(csv(comparison))))
    assert [line["label"] for line in lines] == ["bf16", "bnb-nf4", "gptq", "hqq"]
    assert float(lines[0]["step_seconds_median"]) == comparison.rows[0].step_seconds_median
    assert int(lines[0]["peak_memory_bytes"]) == comparison.rows[0].peak_memory_bytes
    assert lines[2]["first_loss"] == "NaN"
    assert lines[2]["gradient_norm_max"] == "Infinity"
    assert lines[0]["quantized_weights_bytes"] == str(comparison.rows[0].tensor_bytes["quantized_weights"])
    assert lines[0]["kernel"] == "torch.nn.Linear"
    empty = {name for name, value in lines[3].items() if value == ""}
    assert {"step_seconds_median", "peak_memory_bytes", "load_seconds", "kernel", "non_finite_steps"} <= empty
    assert lines[3]["message"] == "hqq is not installed | [red]x[/red]"
    assert (lines[0]["group"], lines[3]["group"]) == ("1", "")


def test_the_lines_are_the_groups_and_then_the_failures():
    parts = sections(mixed())
    assert [part.title for part in parts] == ["Completed, all with the same work", "Did not complete"]
    assert not any(line.best for line in parts[1].lines)


def test_nothing_recorded_is_drawn_too():
    assert "No run completed" in drawn(compare([]))
    assert "No run completed" in markdown(compare([]))
    assert csv(compare([])).strip() == ""
