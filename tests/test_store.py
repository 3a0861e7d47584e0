import json
import math
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import BrokenFile, UserError
from bench.record.schema import Record, Step
from bench.record.store import Store, read_record, write_atomically
from tests.record_factory import eight_backends, failed, record, step

NUMBERS = st.floats()


def test_a_record_comes_back_as_it_was_saved(tmp_path):
    made = record("gptq")
    assert read_record(Store(tmp_path).save(made)) == made


def test_a_record_is_named_by_its_key(tmp_path):
    made = record("hqq")
    assert Store(tmp_path).save(made) == tmp_path / f"{made.key}.record.json"


def test_a_later_record_of_the_same_run_replaces_the_first(tmp_path):
    store = Store(tmp_path)
    store.save(failed("hqq", "interrupted", "train", "stopped"))
    store.save(record("hqq"))
    assert [found.status for found in store.records()] == ["completed"]


@pytest.mark.parametrize("function", ["fsync", "fdopen"])
def test_nothing_is_left_when_writing_fails_midway(tmp_path, monkeypatch, function):
    def fail(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(os, function, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(tmp_path / "x", "text")
    assert list(tmp_path.iterdir()) == []


def test_the_old_record_stands_when_writing_a_new_one_fails_midway(tmp_path, monkeypatch):
    store = Store(tmp_path)
    old = record("hqq")
    store.save(old)

    def fail(_):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises(KeyboardInterrupt):
        store.save(old.model_copy(update={"wall_seconds": 1.0}))
    monkeypatch.undo()
    assert list(store.records()) == [old]


def test_what_is_half_written_is_not_seen_as_a_record(tmp_path, monkeypatch):
    store = Store(tmp_path)
    seen = []
    monkeypatch.setattr(os, "fsync", lambda _: seen.append(list(store.records())))
    store.save(record("hqq"))
    assert seen[0] == []


def test_a_text_that_cannot_be_encoded_leaves_nothing(tmp_path):
    with pytest.raises(UnicodeEncodeError):
        write_atomically(tmp_path / "x", "\ud800")
    assert list(tmp_path.iterdir()) == []


def test_everybody_may_read_a_record(tmp_path):
    assert Store(tmp_path).save(record("hqq")).stat().st_mode & 0o777 == 0o644


@pytest.mark.parametrize("version", [0, 2, "1", None])
def test_a_record_of_another_schema_is_refused_by_its_version(tmp_path, version):
    path = Store(tmp_path).save(record("hqq"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": version}))
    with pytest.raises(BrokenFile, match=f"record schema {version!r}, this version reads 1"):
        read_record(path)


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "null", "{}", "\0"])
def test_a_corrupt_file_is_broken_and_named(tmp_path, text):
    path = tmp_path / "x.record.json"
    path.write_text(text)
    with pytest.raises(BrokenFile, match=r"x\.record\.json"):
        read_record(path)


@pytest.mark.parametrize("share", [0.1, 0.5, 0.99])
def test_a_truncated_record_is_broken(tmp_path, share):
    path = Store(tmp_path).save(record("hqq"))
    text = path.read_text()
    path.write_text(text[: int(len(text) * share)])
    with pytest.raises(BrokenFile):
        read_record(path)


def test_bytes_that_are_no_text_are_broken(tmp_path):
    path = tmp_path / "x.record.json"
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(BrokenFile):
        read_record(path)


def test_a_field_that_is_not_known_is_named(tmp_path):
    path = Store(tmp_path).save(record("hqq"))
    path.write_text(json.dumps(json.loads(path.read_text()) | {"mood": "good"}))
    with pytest.raises(BrokenFile, match="mood"):
        read_record(path)


def test_a_field_of_the_wrong_kind_is_named_with_its_place(tmp_path):
    path = Store(tmp_path).save(record("hqq"))
    body = json.loads(path.read_text())
    body["steps"][3]["seconds"] = -1
    path.write_text(json.dumps(body))
    with pytest.raises(BrokenFile, match=r"steps\.3\.seconds"):
        read_record(path)


@pytest.mark.parametrize(
    ("value", "word"), [(math.nan, "NaN"), (math.inf, "Infinity"), (-math.inf, "-Infinity")]
)
def test_numbers_that_are_not_finite_are_words_in_the_file_and_numbers_again(tmp_path, value, word):
    path = Store(tmp_path).save(record("hqq", steps=(step(0, losses=(value,), gradient_norm=value),)))

    def refuse(constant):
        raise AssertionError(f"bare {constant} in the file")

    body = json.loads(path.read_text(), parse_constant=refuse)
    assert (body["steps"][0]["losses"], body["steps"][0]["gradient_norm"]) == ([word], word)
    found = read_record(path).steps[0]
    assert repr(found.losses[0]) == repr(found.gradient_norm) == repr(value)


def test_a_run_without_a_record_is_not_finished(tmp_path):
    assert not Store(tmp_path).finished("none")


@pytest.mark.parametrize(
    ("status", "stands"),
    [
        ("out_of_memory", True),
        ("timeout", True),
        ("crashed", True),
        ("error", True),
        ("interrupted", False),
        ("unavailable", False),
    ],
)
def test_what_says_nothing_about_a_backend_is_tried_again(tmp_path, status, stands):
    made = failed("hqq", status, "load", "why")
    Store(tmp_path).save(made)
    assert Store(tmp_path).finished(made.key) is stands


def test_a_completed_run_is_finished(tmp_path):
    Store(tmp_path).save(record("hqq"))
    assert Store(tmp_path).finished(record("hqq").key)


def test_a_broken_record_is_not_taken_for_a_run_to_repeat(tmp_path):
    Store(tmp_path).path("x").write_text("{")
    with pytest.raises(BrokenFile):
        Store(tmp_path).finished("x")


def test_records_come_in_the_order_of_their_start_also_out_of_folders_below(tmp_path):
    made = eight_backends(repeats=2)
    for place, one in enumerate(reversed(made)):
        Store(tmp_path / str(place % 3)).save(one)
    assert [one.key for one in Store(tmp_path).records()] == [one.key for one in made]


def test_a_folder_that_does_not_exist_holds_no_records(tmp_path):
    with pytest.raises(BrokenFile, match="is not a folder of records"):
        list(Store(tmp_path / "none").records())


def test_other_files_are_not_records(tmp_path):
    (tmp_path / "report.json").write_text("{")
    assert list(Store(tmp_path).records()) == []


def test_opening_makes_the_folder_and_leaves_it_empty(tmp_path):
    Store(tmp_path / "a" / "b").open_for_writing()
    assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"):
        Store(tmp_path / "file" / "below").open_for_writing()


@given(
    losses=st.lists(NUMBERS, max_size=4),
    norm=NUMBERS,
    rate=NUMBERS,
    seconds=st.floats(min_value=0),
    scale=st.none() | NUMBERS,
)
def test_steps_of_any_numbers_come_back_to_the_bit(losses, norm, rate, seconds, scale):
    made = Step(
        index=0,
        warmup=False,
        losses=losses,
        gradient_norm=norm,
        learning_rate=rate,
        seconds=seconds,
        tokens=1,
        loss_tokens=1,
        applied=True,
        loss_scale=scale,
    )
    found = Step.model_validate_json(made.model_dump_json())
    for name in Step.model_fields:
        assert repr(getattr(found, name)) == repr(getattr(made, name))


@given(message=st.none() | st.text(st.characters(exclude_categories=["Cs"])))
def test_records_with_any_message_come_back(message):
    made = failed("hqq", "error", "load", message)
    assert Record.model_validate_json(made.model_dump_json()) == made
