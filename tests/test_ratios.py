"""Ratios, intervals and ranks as they are shown: terminal, Markdown, CSV, page, plot."""

from __future__ import annotations

import csv
import io
import math
import random
import re

import pytest
from rich.console import Console

from bench.judge.comparison import Comparison, compare
from bench.record.schema import Record
from bench.show.drawing import Plot
from bench.show.figures_csv import COLUMNS, figures_csv
from bench.show.page import page
from bench.show.ratio_plots import ratio_plots
from bench.show.ratios import ratio_tables
from bench.show.styles import assign_styles
from bench.show.tables import markdown, terminal_table
from tests.record_factory import eight_backends, planted, record, step


def repeated(repeats: int = 5, noise: float = 0.01) -> list[Record]:
    rng = random.Random(4)
    made = []
    for one in eight_backends(repeats=repeats):
        factor = math.exp(rng.gauss(0, noise))
        timed = [s.model_copy(update={"seconds": s.seconds * factor}) for s in one.steps]
        made.append(one.model_copy(update={"steps": tuple(timed)}))
    return made


@pytest.fixture(scope="module")
def comparison() -> Comparison:
    return compare(repeated(), allow={"dtype"})


def its_plots(comparison: Comparison) -> list[Plot]:
    """Of all figures of a page, the ones that are looked at here."""
    return list(ratio_plots(comparison, assign_styles([row.label for row in comparison.rows])))


def its_page(comparison: Comparison) -> str:
    return page(comparison, its_plots(comparison))


def drawn(comparison: Comparison, width: int) -> str:
    console = Console(width=width, file=io.StringIO(), record=True)
    console.print(terminal_table(comparison))
    return console.export_text()


@pytest.mark.parametrize("width", [80, 120])
def test_the_terminal_has_ratio_rank_and_interval_and_breaks_none(comparison: Comparison, width: int) -> None:
    text = drawn(comparison, width)
    below = text.partition("Ratios to bf16")[2]
    assert max(len(line) for line in text.splitlines()) <= width
    (line,) = [line for line in below.splitlines() if line.startswith("gptq ")]
    assert re.search(r"0\.260 #2= +\S+ #6 +2\.\d\d #\d=? +0\.4\d\d #\d=?", line), line
    assert re.search(r"\d\.\d\d–\d\.\d\d", below), "an interval stands below its ratio"  # noqa: RUF001
    assert "cannot be told apart" in below


def test_one_run_each_shows_no_ratio_and_says_what_cannot_be_concluded() -> None:
    single = compare(eight_backends())
    assert ratio_tables(single) == ()
    for text in (drawn(single, 120), markdown(single), its_page(single)):
        assert "Ratios to" not in text
        assert "one run gives no interval" in " ".join(text.split())
    assert its_plots(single) == []


def test_two_runs_each_say_how_little_they_tell() -> None:
    text = markdown(compare(repeated(2)))
    assert "Ratios to bf16" in text
    assert "Two runs give intervals so wide" in text


def test_markdown_and_page_have_every_backend_with_its_ratio_interval_and_rank(comparison: Comparison) -> None:
    (table,) = ratio_tables(comparison)
    place = table.fields.index("step_seconds_median")
    texts = markdown(comparison), its_page(comparison)
    for line in table.lines:
        cell = line.cells[place]
        assert cell.rank
        assert cell.ranked_text in texts[0]
        for part in (cell.ratio, cell.range, f"rank {cell.rank}"):
            assert part in texts[1]
    assert table.lines[0].cells[place].ratio == "1"
    for text in texts:
        assert "a backend in the middle of the field had to differ by" in text.replace("\n", " ")


def test_marks_follow_the_ranks() -> None:
    # Two backends that are equal but for noise, and a slow one.
    rng = random.Random(2)
    records = [
        record(backend, repeat=repeat, steps=tuple(step(i, seconds=seconds * rng.gauss(1, 0.01)) for i in range(8)))
        for repeat in range(5)
        for backend, seconds in (("bf16", 1.0), ("hqq", 1.0), ("gptq", 2.0))
    ]
    text = markdown(compare(records)).split("**Ratios")[0]
    rows = [line.split("|") for line in text.splitlines() if line.startswith("| ")]
    step_times = {cells[1].strip(): cells[6].strip() for cells in rows}
    assert step_times["bf16"].startswith("**")
    assert step_times["hqq"].startswith("**")
    assert not step_times["gptq"].startswith("**")
    assert "Bold: nobody is surely better, and somebody is surely worse." in markdown(compare(records))


def test_the_csv_of_figures_is_raw_and_complete(comparison: Comparison) -> None:
    lines = list(csv.DictReader(io.StringIO(figures_csv(comparison))))
    assert tuple(lines[0]) == COLUMNS
    found = {(line["label"], line["figure"]): line for line in lines}
    group = comparison.groups[0]
    for (label, field), line in found.items():
        standing = group.standing(field, label)
        assert standing is not None
        assert standing.ratio is not None
        assert float(line["ratio"]) == standing.ratio.estimate
        assert line["rank"] == ("" if standing.rank is None else str(standing.rank))
    assert found["hqq", "last_loss"]["rank"] == ""
    assert found["hqq", "last_loss"]["ratio_low"] != ""


def test_the_csv_of_single_runs_has_ratios_without_intervals() -> None:
    lines = list(csv.DictReader(io.StringIO(figures_csv(compare(eight_backends())))))
    assert {line["ratio_low"] for line in lines} == {""}
    assert {line["rank"] for line in lines} == {""}
    assert all(float(line["ratio"]) > 0 for line in lines)
    assert figures_csv(compare([])).strip() == ",".join(COLUMNS)


def test_what_is_not_finite_is_written_out() -> None:
    broken = [record("hqq", repeat=k, steps=tuple(step(i, losses=(math.nan,)) for i in range(8))) for k in (0, 1)]
    made = compare([record("bf16"), record("bf16", repeat=1), *broken])
    lines = {(line["label"], line["figure"]): line for line in csv.DictReader(io.StringIO(figures_csv(made)))}
    assert lines["hqq", "last_loss"]["ratio"] == "NaN"
    assert lines["hqq", "last_loss"]["ratio_low"] == ""
    below = markdown(made).split("**Ratios")[1].splitlines()
    assert "NaN" in next(line for line in below if line.startswith("| hqq"))


def test_the_plot_says_in_words_what_it_shows(comparison: Comparison) -> None:
    found = {plot.name: plot for plot in its_plots(comparison)}
    plot = found["ratio-step-time"]
    assert plot.title == "Step time against bf16"
    assert re.search(r"bnb-nf4 1\.4\d \(1\.\d\d to 1\.\d\d\)", plot.alternative)
    assert {"ratio-peak-memory", "ratio-load-time"} <= set(found)
    assert plot.svg in its_page(comparison)


def test_an_interval_of_any_width_can_be_drawn() -> None:
    def held_up(backend: str, repeat: int, seconds: float) -> Record:
        return record(backend, repeat=repeat, steps=tuple(step(i, seconds=seconds) for i in range(8)))

    records = [held_up(b, k, s) for b, ks in (("bf16", (1, 1)), ("hqq", (1e-3, 1e3))) for k, s in enumerate(ks)]
    (plot,) = [plot for plot in its_plots(compare(records)) if plot.name == "ratio-step-time"]
    assert "hqq 1.00 (" in plot.alternative
    assert "nan" not in plot.svg


def test_each_group_has_its_own_table_and_baseline() -> None:
    narrow = [
        one.model_copy(update={"lora": one.lora.model_copy(update={"shapes_digest": "other"})})
        for one in repeated(3)
        if one.lora and one.request.backend in ("gptq", "awq")
    ]
    wide = [one for one in repeated(3) if one.request.backend in ("bf16", "hqq", "eetq")]
    found = ratio_tables(compare([*wide, *narrow], {"dtype"}))
    assert [table.title for table in found] == ["Ratios to bf16 (group 1)", "Ratios to gptq (group 2)"]
    assert [table.title for table in ratio_tables(compare([*wide, *narrow], {"dtype"}, "awq"))] == [
        "Ratios to bf16 (group 1)", "Ratios to awq (group 2)"]  # fmt: skip


@pytest.mark.parametrize("label", ['=HYPERLINK("http://evil.invalid")', "[/]", "[v2]"])
def test_a_label_is_no_formula_and_no_markup_of_the_terminal(label: str) -> None:
    asked = [one.request.model_copy(update={"backend": label}) for one in repeated(3) if one.request.backend == "bf16"]
    made = [one.model_copy(update={"request": request, "key": f"{label}{request.repeat}"})
            for one, request in zip([one for one in repeated(3) if one.request.backend == "bf16"], asked, strict=True)]  # fmt: skip
    found = compare([*made, *(one for one in repeated(3) if one.request.backend == "hqq")], baseline=label)
    cells = [cell for line in csv.reader(io.StringIO(figures_csv(found))) for cell in line]
    assert not [cell for cell in cells if cell.startswith("=")]
    assert label in cells or f"'{label}" in cells
    assert f"Ratios to {label}" in drawn(found, 160)


def test_nothing_that_a_record_holds_becomes_markup() -> None:
    evil = "<script>x</script>|**y**"
    records = []
    for repeat in range(2):
        one = planted(evil, repeat=repeat)
        asked = one.request.model_copy(update={"repeat": repeat, "seed": 1})
        records.append(one.model_copy(update={"request": asked, "key": f"{evil}{repeat}"}))
        other = asked.model_copy(update={"backend": f"{evil}2"})
        records.append(one.model_copy(update={"request": other, "key": f"{evil}{repeat}b"}))
    made = compare(records)
    assert ratio_tables(made)
    assert "<script>x" not in its_page(made)
    text = markdown(made)
    assert "<script>" not in text
    assert "**y**" not in text
