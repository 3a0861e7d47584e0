"""Like with like: what splits runs, what a person may allow, and that every figure then says so."""

from __future__ import annotations

import csv
import io
import itertools
import json
import random
import re
from pathlib import Path
from typing import Any

import pytest

from bench.ask.plan import RunRequest
from bench.errors import BadValue
from bench.judge.checks import CHECKS, Check, checks_of
from bench.judge.comparison import Comparison, compare
from bench.judge.families import ALLOWABLE, BY_NAME, FAMILIES, parse_allowed
from bench.record.schema import Record
from bench.record.store import Store
from bench.show.columns import sections
from bench.show.differences import noted, notes_on
from bench.show.drawing import hand_drawn
from bench.show.page import page
from bench.show.tables import markdown
from tests.command import ROOT, Command
from tests.record_factory import FIGURES, digest, eight_backends, environment, failed, margin_runs, record

OLD, NEW = "a" * 40, "b" * 40


def changed(made: Record, part: str, **changes: Any) -> Record:
    return made.model_copy(update={part: getattr(made, part).model_copy(update=changes)})


def with_library(backend: str, name: str, version: str, **more: Any) -> Record:
    made = record(backend, **more)
    assert made.environment
    return changed(made, "environment", versions={**made.environment.versions, name: version})


def labels(comparison: Comparison) -> list[list[str]]:
    return [[row.label for row in group.rows] for group in comparison.groups]


def text_of(comparison: Comparison) -> str:
    return "\n".join(comparison.warnings)


# ---- the names that --allow takes


def test_every_condition_that_splits_has_a_family_and_every_family_has_one() -> None:
    families = {check.family for check in CHECKS if check.family}
    assert families == set(BY_NAME)
    assert {check.name for check in CHECKS if check.family is None} == {
        "quantized model loaded from cache", "requested dtype", "uncommitted changes in the harness",
    }  # fmt: skip


def test_names_are_taken_one_by_one_and_with_commas() -> None:
    assert parse_allowed(()) == frozenset()
    assert parse_allowed(("dtype, commit", "versions")) == {"dtype", "commit", "versions"}


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("dtypes", "unknown difference 'dtypes' in --allow; did you mean 'dtype'?"),
        ("Commit", "did you mean 'commit'?"),
        ("", "unknown difference '' in --allow; valid: dtype, attention"),
        ("dtype,,commit", "unknown difference ''"),
        ("all", "unknown difference 'all'"),
    ],
)
def test_an_unknown_name_is_one_line_with_the_nearest(text: str, words: str) -> None:
    with pytest.raises(BadValue, match=re.escape(words)):
        parse_allowed((text,))


@pytest.mark.parametrize("family", [family for family in FAMILIES if family.never], ids=lambda f: f.name)
def test_what_makes_it_other_work_can_never_be_allowed(family: Any) -> None:
    with pytest.raises(BadValue) as refused:
        parse_allowed(("dtype", family.name))
    assert str(refused.value).startswith(f"--allow {family.name} is not possible: {family.never}; ")


def test_the_readme_explains_every_family() -> None:
    readme = " ".join((ROOT / "README.md").read_text(encoding="utf-8").split())
    for family in FAMILIES:
        assert f"| `{family.name}` | {family.meaning} |" in readme
        assert family.never is None or family.never in readme


# ---- who is alike


OTHER = {
    "dtype": lambda r: changed(r, "quantization", effective_dtype="float16"),
    "attention": lambda r: changed(r, "workload", attention="eager"),
    "checkpointing": lambda r: changed(r, "request", checkpointing="none"),
    "optimizer": lambda r: changed(
        r, "request", optimizer=r.request.optimizer.model_copy(update={"learning_rate": 1e-3})
    ),
    "stress": lambda r: changed(r, "request", stress={"model.layers.1.mlp.up_proj": 2.0}),
    "trace": lambda r: changed(r, "request", trace=True),
    "placement": lambda r: changed(r, "request", placement="ddp", device_count=2),
    "device": lambda r: changed(r, "environment", cpu_threads=3),
    "sharing": lambda r: r.model_copy(update={"shared_machine_with": ("another run",)}),
    "versions": lambda r: changed(r, "environment", versions={**r.environment.versions, "peft": "0.22"}),
    "commit": lambda r: changed(r, "environment", commit=NEW),
}


@pytest.mark.parametrize("name", ALLOWABLE)
def test_a_family_splits_and_its_name_and_no_other_allows_it(name: str) -> None:
    records = [record("bf16"), record("bnb-nf4"), OTHER[name](record("hqq"))]
    others = set(ALLOWABLE) - {name}
    assert [len(compare(records, allow).groups) for allow in ((), others, {name})] == [2, 2, 1]
    apart = compare(records)
    assert f"--allow {name} puts it beside group 1" in text_of(apart)
    assert "Largest alike group: 2 runs: bf16, bnb-nf4; shown first." in text_of(apart)
    allowed = compare(records, {name})
    assert {item.family for item in allowed.allowed} == {name}
    assert not any("alike" in warning or "group" in warning for warning in allowed.warnings)


def test_what_can_never_be_allowed_stays_apart_whatever_is_allowed() -> None:
    for change in (
        lambda r: changed(r, "workload", digest=digest("other")),
        lambda r: changed(r, "lora", initial_digest=digest("other")),
        lambda r: changed(r, "request", model=r.request.model.model_copy(update={"fingerprint": "x"})),
        lambda r: changed(r, "request", device="cpu"),
    ):
        comparison = compare([record("bf16"), change(record("hqq"))], ALLOWABLE)
        assert labels(comparison) == [["bf16"], ["hqq"]]
        assert "Nothing can allow that" in text_of(comparison)
        assert "--allow" not in text_of(comparison)


def test_the_message_names_the_fields_and_both_values_and_shortens_digests() -> None:
    newer = changed(record("hqq", environment=environment(commit=NEW)), "workload", attention="eager")
    comparison = compare([record("bf16", environment=environment(commit=OLD)), newer])
    (said,) = (warning for warning in comparison.warnings if warning.startswith("Group 2 (hqq)"))
    assert "attention eager instead of sdpa" in said
    assert f"harness commit {NEW[:12]} instead of {OLD[:12]}." in said
    assert NEW not in said
    assert "--allow attention,commit" in said


def test_another_environment_is_allowed_as_versions_and_is_not_to_be_repeated_away() -> None:
    older = with_library("gptq", "transformers", "4.51.3")
    older = changed(older, "request", backend="auto-gptq", environment="legacy")
    records = [record("bf16"), record("gptq"), older]
    assert labels(compare(records)) == [["bf16", "gptq"], ["auto-gptq"]]
    (said,) = (warning for warning in compare(records).warnings if warning.startswith("Group 2 (auto-gptq)"))
    assert "environment legacy instead of current; transformers version 4.51.3 instead of" in said
    assert "--allow versions puts it beside group 1" in said
    assert "--force" not in said  # no repetition makes two stacks one
    together = compare(records, {"versions"})
    assert labels(together) == [["bf16", "gptq", "auto-gptq"]]
    assert {item.name for item in together.allowed} == {"environment", "transformers version"}


def test_one_backend_in_two_environments_is_two_lines() -> None:
    both = [record("bf16"), changed(record("bf16"), "request", environment="legacy")]
    assert labels(compare(both, {"versions"})) == [["bf16 (environment=current)", "bf16 (environment=legacy)"]]


def test_awq_on_cuda_is_told_how_to_be_allowed() -> None:
    comparison = compare(eight_backends())
    assert labels(comparison)[1:] == [["awq"]]
    assert "Group 2 (awq) differs from group 1 in: effective dtype float16 instead of bfloat16. --allow dtype" in (
        text_of(comparison)
    )
    assert [part.title for part in sections(comparison)] == [
        "Group 1 of 2: the largest group of alike runs", "Group 2 of 2: apart by effective dtype",
    ]  # fmt: skip


def test_those_that_compute_in_the_same_other_dtype_stand_together() -> None:
    made = [*eight_backends()[:-1], OTHER["dtype"](record("eetq"))]
    assert labels(compare(made))[1:] == [["awq", "eetq"]]


def test_a_failed_run_splits_nothing() -> None:
    broken = failed("hqq", "error", "load", "x", environment=environment(commit=NEW))
    assert len(compare([record("bf16"), broken]).groups) == 1


def test_only_libraries_that_a_run_used_matter() -> None:
    nf4, hqq = with_library("bnb-nf4", "bitsandbytes", "0.49"), with_library("hqq", "hqq", "0.2.8")
    assert len(compare([record("bf16"), nf4, hqq]).groups) == 1
    other = with_library("bnb-int8", "bitsandbytes", "0.50")
    comparison = compare([record("bf16"), nf4, hqq, other])
    assert labels(comparison) == [["bf16", "bnb-nf4", "hqq"], ["bnb-int8"]]
    assert "bitsandbytes version 0.50 instead of 0.49" in text_of(comparison)
    assert len(compare([record("bf16"), nf4, hqq, other], {"versions"}).groups) == 1


def test_a_library_name_with_a_dot_is_a_name() -> None:
    made = [with_library(name, "ruamel.yaml", version) for name, version in (("hqq", "1"), ("gptq", "2"))]
    assert [item.name for item in compare(made).differences] == ["ruamel.yaml version"]


def test_the_reference_joins_the_largest_of_those_that_do_not_agree_with_one_another() -> None:
    versions = {"bnb-int8": "0.49", "bnb-nf4": "0.50", "bnb-nf4-dq": "0.50"}
    made = [record("bf16"), *(with_library(name, "bitsandbytes", found) for name, found in versions.items())]
    for order in itertools.permutations(made):
        first, second = compare(order).groups
        assert {row.label for row in first.rows} == {"bf16", "bnb-nf4", "bnb-nf4-dq"}
        assert [row.label for row in second.rows] == ["bnb-int8"]


def test_sets_that_a_third_one_links_are_one() -> None:
    made = [record("bf16"), record("hqq", repeat=1), record("gptq"), record("gptq", repeat=1)]
    for order in itertools.permutations(made):
        assert [len(group.rows) for group in compare(order).groups] == [4]


def test_two_paths_of_one_data_file_are_one_workload() -> None:
    made = [
        record("bf16", ask={"data_digest": digest("file")}),
        record("hqq", ask={"data_digest": digest("file")}),
    ]
    made[1] = changed(made[1], "request", workload=made[1].request.workload.model_copy(update={"data": "b"}))
    assert len(compare(made).groups) == 1


def test_several_processes_may_be_allowed_beside_one_that_accumulates() -> None:
    one = record("bf16")
    one = changed(
        one, "request", workload=one.request.workload.model_copy(update={"gradient_accumulation_steps": 2})
    )
    two = changed(record("hqq"), "request", placement="ddp", device_count=2)
    assert [len(compare([one, two], allow).groups) for allow in ((), {"placement"})] == [2, 1]


def test_two_dirty_runs_of_one_commit_are_warned_about_and_not_split() -> None:
    made = [record(name, environment=environment(dirty=True)) for name in ("bf16", "hqq")]
    comparison = compare(made)
    assert len(comparison.groups) == 1
    assert "two such runs of one commit may be of different code" in text_of(comparison)


@pytest.mark.parametrize("seed", range(40))
def test_every_two_runs_of_a_group_agree_in_all_that_is_known_of_both(seed: int) -> None:
    draw = random.Random(seed)
    made = []
    for name in draw.choices(list(FIGURES), k=9):
        one = record(name, repeat=draw.randrange(3))
        if draw.random() < 0.4:
            one = with_library(name, "bitsandbytes", draw.choice(["0.49", "0.50"]), repeat=one.request.repeat)
        if draw.random() < 0.3:
            one = changed(one, "workload", digest=digest(draw.choice("ab")))
        if draw.random() < 0.2:
            one = OTHER[draw.choice(("dtype", "device", "commit"))](one)
        made.append(one)
    comparison = compare(made)
    rows = [row for group in comparison.groups for row in group.rows]
    assert sorted(map(id, rows)) == sorted(map(id, comparison.rows))
    sizes = [len(group.rows) for group in comparison.groups]
    assert sizes == sorted(sizes, reverse=True)
    breaking = [check for check in checks_of(rows) if check.family]
    for group in comparison.groups:
        for check, (one, two) in itertools.product(breaking, itertools.combinations(group.rows, 2)):
            values = check.read_if_used(one), check.read_if_used(two)
            assert check.scope(one) != check.scope(two) or None in values or len(set(values)) == 1
    for group in comparison.groups[1:]:
        first = {row.repeat for row in comparison.groups[0].rows}
        assert group.differences or first.isdisjoint(row.repeat for row in group.rows)


# ---- names


def other_card(made: Record) -> Record:
    assert made.environment
    card = made.environment.devices[0].model_copy(update={"name": "NVIDIA L4"})
    return changed(made, "environment", devices=(card,))


def test_nothing_is_averaged_over_two_cards_even_where_they_are_allowed() -> None:
    made = [record("hqq"), other_card(record("hqq")), record("bf16")]
    for allow in ((), {"device"}):
        names = [row.label for row in compare(made, allow).rows]
        assert names == ["hqq (device names=NVIDIA GeForce RTX 4090)", "hqq (device names=NVIDIA L4)", "bf16"]
    (group,) = compare(made, {"device"}).groups
    assert [summary.figures["step_seconds_median"].runs for summary in group.summaries] == [1, 1, 1]


def test_a_sweep_that_another_commit_went_on_with_is_one_set_of_repeats_once_that_is_allowed() -> None:
    made = [
        record(name, repeat=repeat, environment=environment(commit=OLD if repeat < 2 else NEW))
        for repeat in range(3)
        for name in ("bf16", "hqq")
    ]
    apart = compare(made)
    assert [len(group.rows) for group in apart.groups] == [4, 2]
    assert "harness commit bbbbbbbbbbbb instead of aaaaaaaaaaaa. --allow commit" in text_of(apart)
    assert "or run the recorded ones again (--force)" in text_of(apart)
    (group,) = compare(made, {"commit"}).groups
    assert [summary.figures["step_seconds_median"].runs for summary in group.summaries] == [3, 3]


def test_one_repeat_under_two_commits_is_two_lines() -> None:
    made = [record("hqq", environment=environment(commit=commit)) for commit in (OLD, NEW)]
    for allow, count in (((), 2), ({"commit"}, 1)):
        comparison = compare(made, allow)
        assert [row.label for row in comparison.rows] == [
            f"hqq (harness commit={OLD[:12]})", f"hqq (harness commit={NEW[:12]})",
        ]  # fmt: skip
        assert len(comparison.groups) == count


def test_settings_and_observations_stand_in_one_pair_of_brackets() -> None:
    asked = {"options": {"group_size": 128}}
    made = [record("hqq"), record("hqq", ask=asked), other_card(record("hqq", ask=asked))]
    assert [row.label for row in compare(made).rows] == [
        "hqq (group_size=64)",
        "hqq (group_size=128, device names=NVIDIA GeForce RTX 4090)",
        "hqq (group_size=128, device names=NVIDIA L4)",
    ]


# ---- what every figure says


NOTE = "Allowed difference: effective dtype (bfloat16: 7 others; float16: awq)."


def tables_of_runs(text: str) -> list[str]:
    """The captions of the page's tables, without those whose subject is no figure of the runs."""
    captions = re.findall(r"<caption[^>]*>(.*?)</caption>", text, flags=re.S)
    other = ("Memory keeps the unit", "Meaning and source", "Breaking:", "What each backend", "Outcome of every")
    return [caption for caption in captions if not caption.startswith(other)]


def test_an_allowed_difference_stands_at_every_table_of_the_page() -> None:
    text = page(compare(eight_backends(), {"dtype"}), ())
    captions = tables_of_runs(text)
    assert len(captions) >= 5
    assert all(caption.endswith(NOTE) for caption in captions)
    top = text.split("<nav")[0]
    assert f'<p class="unlike">{NOTE}</p>' in top
    for section in ("fit", "memory", "throughput", "stability"):
        assert f'<p class="unlike">{NOTE}</p>' in text.split(f'<section id="{section}"')[1].split("</h2>")[1][:200]
    plain = page(compare([record("bf16"), record("hqq")]), ())
    assert "Allowed difference" not in plain
    assert 'class="unlike"' not in plain


def test_an_allowed_difference_stands_below_every_table_of_the_markdown() -> None:
    text = markdown(compare(eight_backends(), {"dtype"}))
    tables = re.findall(r"\n\|[:\-| ]+\|\n(?:\|.*\n)+\n(.*)\n", text)
    assert len(tables) >= 3
    assert set(tables) == {f"*{NOTE}*"}
    assert "Allowed" not in markdown(compare(eight_backends()))


def test_runs_that_stand_apart_are_named_at_what_shows_them_beside_the_others() -> None:
    comparison = compare(eight_backends())
    note = "Not all alike, compare within a group only; group 2: awq (apart by effective dtype)."
    assert notes_on(comparison) == (note,)
    assert all(caption.endswith(note) for caption in tables_of_runs(page(comparison, ())))


def test_of_many_groups_a_figure_says_how_many() -> None:
    made = [record(name, environment=environment(cpu_threads=n)) for n, name in enumerate(FIGURES)]
    assert notes_on(compare(made)) == (
        "The runs stand in 8 groups that are not alike: compare within a group only.",
    )
    assert len([warning for warning in compare(made).warnings if warning.startswith("Group")]) == 5
    assert "2 more groups stand apart: CPU threads." in compare(made).warnings


def test_a_bisection_is_not_told_that_its_factors_are_not_alike() -> None:
    assert notes_on(compare(margin_runs("hqq", 11))) == ()


def test_a_note_is_written_into_the_figure_and_told_in_words() -> None:
    plot = hand_drawn("<path/>", (460, 100), "x", "A title", "What it shows & more.")
    drawn = noted(plot, ["<b>one</b> " * 30, "Second."])
    assert drawn.alternative.endswith("Second.")
    assert 'aria-label="What it shows &amp; more. &lt;b&gt;' in drawn.svg
    lines = re.findall(r"<text [^>]*>([^<]*)</text>", drawn.svg)
    assert lines[-1] == "Second."
    assert all(len(line.replace("&lt;", "<").replace("&gt;", ">")) <= 84 for line in lines)
    height = float(re.search(r'viewBox="0 0 460 ([\d.]+)"', drawn.svg).group(1))  # type: ignore[union-attr]
    assert height > 100 + 12 * len(lines)
    assert drawn.svg.endswith("</text></svg>")
    assert noted(plot, ()) is plot


# ---- through the front door


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Records of four backends, AWQ's in float16."""
    for made in eight_backends():
        if made.request.backend in ("bf16", "bnb-nf4", "hqq", "awq"):
            Store(tmp_path).save(made)
    return tmp_path


def test_a_report_with_an_allowed_difference_prints_it_at_every_figure(command: Command, folder: Path) -> None:
    done = command.run("report", folder, "--allow", "dtype", "--json")
    assert done.returncode == 0, done.stderr
    written = json.loads(done.stdout)
    note = "Allowed difference: effective dtype (bfloat16: 3 others; float16: awq)."
    assert len(written["plots"]) >= 7
    for plot in written["plots"]:
        svg = Path(plot).read_text(encoding="utf-8")
        shown = " ".join(re.findall(r"<text[^>]*>([^<]*)</text>", svg))
        assert note in shown, plot
        assert note in re.search(r'aria-label="([^"]*)"', svg).group(1)  # type: ignore[union-attr]
    text = Path(written["page"]).read_text(encoding="utf-8")
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text, flags=re.S)
    assert len(captions) == len(written["plots"])
    assert all(note in caption for caption in captions)
    assert f"*{note}*" in Path(written["markdown"]).read_text(encoding="utf-8")
    lines = list(csv.DictReader(io.StringIO(Path(written["csv"]).read_text(encoding="utf-8"))))
    assert {line["label"]: (line["group"], line["allowed_differences"]) for line in lines} == {
        "bf16": ("1", "effective dtype=bfloat16"),
        "bnb-nf4": ("1", "effective dtype=bfloat16"),
        "hqq": ("1", "effective dtype=bfloat16"),
        "awq": ("1", "effective dtype=float16"),
    }


@pytest.mark.parametrize(
    ("allow", "words"),
    [
        ("dtyp", "qlora-bench: unknown difference 'dtyp' in --allow; did you mean 'dtype'?"),
        ("data", "qlora-bench: --allow data is not possible: runs on other tokens did other work; what can be"),
    ],
)
def test_a_bad_name_is_refused_before_anything_is_written(
    command: Command, folder: Path, allow: str, words: str
) -> None:
    before = sorted(folder.iterdir())
    assert command.refused("report", folder, "--allow", allow).startswith(words)
    assert command.refused("run", "--preset", "tiny", "--out", folder, "--allow", allow).startswith(words)
    assert sorted(folder.iterdir()) == before


def recorded(command: Command, out: Path) -> list[str]:
    """The flags of a sweep of two backends whose runs are all recorded, the second by another commit."""
    flags = ["--preset", "tiny", "--backend", "bf16,eetq", "--out", str(out)]
    planned = command.json("run", *flags, "--dry-run")
    for body, commit in zip(planned, (OLD, NEW), strict=True):
        asked = RunRequest.model_validate(body)
        made = record(asked.backend, cpu=True, environment=environment(cpu=True, commit=commit))
        Store(out).save(made.model_copy(update={"request": asked, "key": asked.key}))
    return flags


def test_a_sweep_that_another_commit_went_on_with_is_told_so_before_and_after(
    command: Command, out: Path
) -> None:
    flags = recorded(command, out)
    apart = " ".join(command.run("run", *flags).stdout.split())
    assert f"harness commit {NEW[:12]} instead of {OLD[:12]}. --allow commit" in apart
    assert "shown first" in apart
    allowed = " ".join(command.run("run", *flags, "--allow", "commit").stdout.split())
    assert f"Allowed difference: harness commit ({OLD[:12]}: bf16; {NEW[:12]}: eetq)." in allowed
    assert "not all alike" not in allowed
    next(out.glob("eetq-*.record.json")).unlink()
    before = " ".join(command.run("run", *flags, "--dry-run").stdout.split())
    assert f"1 run is recorded already, by another commit of the harness ({OLD[:12]}; now " in before
    assert "--force runs them again; --allow commit" in before


def test_every_condition_is_read_once_a_run(monkeypatch: pytest.MonkeyPatch) -> None:
    """Names, groups and the table of conditions ask for each; of thousands of runs the reading is what takes long."""
    read: list[tuple[str, str]] = []
    spell = Check._text
    monkeypatch.setattr(Check, "_text", lambda self, made: read.append((self.path, made.key)) or spell(self, made))
    records = eight_backends(repeats=2)
    compare(records)
    assert len(set(read)) == len(read) >= len(CHECKS) * len({made.key for made in records})
