import csv as standard_csv
import io
import math

import pytest
from rich.console import Console

from bench.judge.comparison import compare
from bench.show.columns import COLUMNS, MISSING, number, sections
from bench.show.tables import csv, escaped, markdown, terminal_table
from tests.record_factory import eight_backends, failed, record, step


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
    text = markdown(compare(eight_backends()))
    lines = [line for line in text.splitlines() if line.startswith("| ")]
    assert len(lines) == 9
    assert all(line.count("|") == len(COLUMNS) + 1 for line in lines)
    assert "**2,412**" in text
    assert "float16 (asked: bfloat16)" in text


def test_markdown_is_not_broken_by_what_a_message_holds():
    text = markdown(mixed())
    assert "\\| \\[red\\]" in text
    assert escaped("a|b\n<script>`x`") == "a\\|b &lt;script&gt;\\`x\\`"


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
