import errno
import fcntl
import json
import math
import os
import tempfile

import pytest
from hypothesis import given
from hypothesis import strategies as st

from bench.errors import BrokenFile, CannotWrite, UserError
from bench.record.schema import Record, Step
from bench.record.store import Store, read_record
from bench.record.writing import write_atomically
from tests.committed import committed
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
    with pytest.raises(CannotWrite, match=r"cannot write '.*/x': disk full"):
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


def test_a_record_that_cannot_be_written_is_kept_elsewhere_and_the_line_says_where(tmp_path, monkeypatch):
    kept = tmp_path / "kept"
    kept.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(kept))
    (tmp_path / "records").write_text("no folder")
    made = record("hqq")
    with pytest.raises(CannotWrite) as caught:
        Store(tmp_path / "records").save(made)
    (file,) = kept.rglob("*.record.json")
    assert file.name == f"{made.key}.record.json"
    assert f"cannot write '{tmp_path}/records/{file.name}'" in str(caught.value)
    assert f"it is kept as '{file}': move it" in str(caught.value)
    assert read_record(file) == made


def test_a_record_that_can_be_kept_nowhere_is_said_to_be_lost(tmp_path, monkeypatch):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    (tmp_path / "records").write_text("no folder")
    with pytest.raises(CannotWrite, match="the record of this run is lost"):
        Store(tmp_path / "records").save(record("hqq"))


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
        ("skipped", False),
    ],
)
def test_what_says_nothing_about_a_backend_is_tried_again(tmp_path, status, stands):
    made = failed("hqq", status, "load", "why")
    Store(tmp_path).save(made)
    assert Store(tmp_path).finished(made.key) is stands


def test_what_says_nothing_about_a_backend_replaces_nothing_that_does(tmp_path):
    store, made = Store(tmp_path), record("hqq")
    nothing = failed("hqq", "interrupted", "train", "why").model_copy(
        update={"key": made.key, "request": made.request}
    )
    assert store.keep(nothing)
    assert store.keep(made)
    assert not store.keep(nothing)
    assert list(store.records()) == [made]
    crashed = nothing.model_copy(update={"status": "crashed"})
    assert store.keep(crashed), "what was observed later is the record"
    assert list(store.records()) == [crashed]
    store.path(made.key).write_text("{")
    assert store.keep(nothing), "a broken one is no loss"


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
    with Store(tmp_path / "a" / "b").open_for_writing():
        assert list((tmp_path / "a" / "b").iterdir()) == []


def test_a_folder_that_cannot_be_written_to_is_refused_before_anything_runs(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="--out"), Store(tmp_path / "file" / "below").open_for_writing():
        pass


def test_a_folder_is_written_to_by_one_at_a_time(tmp_path):
    with Store(tmp_path).open_for_writing():
        with pytest.raises(UserError, match="another command is writing to"), Store(tmp_path).open_for_writing():
            pass
        with Store(tmp_path / "below").open_for_writing():
            pass
    with Store(tmp_path).open_for_writing():
        pass


def test_a_folder_is_free_again_after_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), Store(tmp_path).open_for_writing():
        1 / 0  # noqa: B018
    with Store(tmp_path).open_for_writing():
        pass


def test_where_nothing_can_be_locked_there_is_no_lock(tmp_path, monkeypatch):
    def refuse(*_):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    with Store(tmp_path).open_for_writing(), Store(tmp_path).open_for_writing():
        pass


def test_what_killed_commands_left_is_removed_and_nothing_else(tmp_path):
    left = tmp_path / ".hqq-x.record.json.abc123.part"
    others = [tmp_path / name for name in (".report.html.abc123.part", ".hidden", "hqq-x.record.json")]
    for file in (left, *others):
        file.write_text("{")
    with Store(tmp_path).open_for_writing():
        assert sorted(tmp_path.iterdir()) == sorted(others)


@pytest.mark.parametrize(
    ("status", "failed"), [("completed", False), ("out_of_memory", True), ("skipped", True), ("interrupted", True)]
)
def test_a_run_has_failed_where_its_record_says_that_it_did_not_complete(tmp_path, status, failed):
    made = record("hqq").model_copy(update={"status": status})
    assert not Store(tmp_path).failed(made.key)
    Store(tmp_path).save(made)
    assert Store(tmp_path).failed(made.key) is failed


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


def test_what_is_the_same_in_many_records_is_held_once(tmp_path):
    """Of records with probes it is a fifth of their memory."""
    path = next(path for path in committed() if any(step.probe for step in read_record(path).steps))
    one, other = read_record(path), read_record(path)
    assert one.lora.names is other.lora.names
    for here, there in zip(one.steps, other.steps, strict=True):
        assert here.probe.zero_values is there.probe.zero_values
        assert here.probe.non_finite_values is there.probe.non_finite_values
