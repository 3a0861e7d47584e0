import json
import math
import os

import pytest

from bench.record.schema import Step
from bench.run.events import Channel, parse_event
from tests.record_factory import step


@pytest.fixture
def pipe():
    read_end, write_end = os.pipe()
    channel = Channel(write_end)
    with os.fdopen(read_end, encoding="utf-8") as lines:
        yield channel, lines
        channel._stream.close()


def test_an_event_is_one_line_that_parses_again(pipe):
    channel, lines = pipe
    channel.send("progress", done=3, total=7)
    assert parse_event(lines.readline()) == {"event": "progress", "done": 3, "total": 7}


def test_an_event_arrives_before_the_channel_is_closed_and_without_a_flush(pipe):
    channel, lines = pipe
    channel.stage("load")
    assert parse_event(lines.readline())["name"] == "load"


def test_a_text_with_line_breaks_stays_one_line(pipe):
    channel, lines = pipe
    channel.send("outcome", message="a\nb\r\u2028c")
    assert parse_event(lines.readline())["message"] == "a\nb\r\u2028c"


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_a_record_with_values_that_are_not_finite_survives_the_pipe(pipe, value):
    channel, lines = pipe
    sent = step(3, losses=(value, 1.5), gradient_norm=value)
    channel.send("step", step=sent)
    assert Step.model_validate(parse_event(lines.readline())["step"]) == sent


def test_nan_survives_the_pipe(pipe):
    channel, lines = pipe
    channel.send("step", step=step(0, losses=(math.nan,)))
    assert math.isnan(Step.model_validate(parse_event(lines.readline())["step"]).losses[0])


def test_a_list_of_records_is_sent_as_plain_values(pipe):
    channel, lines = pipe
    channel.send("readings", readings=[step(0), step(1)])
    assert [one["index"] for one in parse_event(lines.readline())["readings"]] == [0, 1]


def test_a_section_may_be_a_truth_value(pipe):
    channel, lines = pipe
    channel.section("trainable_weights_finite", False)
    assert parse_event(lines.readline()) == {
        "event": "section",
        "name": "trainable_weights_finite",
        "value": False,
    }


def test_a_bare_number_that_is_not_finite_is_refused_and_not_written_as_bad_json(pipe):
    channel, lines = pipe
    with pytest.raises(ValueError, match="not JSON compliant"):
        channel.send("progress", done=math.nan)
    channel.send("progress", done=1)
    assert json.loads(lines.readline())["done"] == 1


@pytest.mark.parametrize("line", ["", "hello", "3", "[]", "null", "{}", '{"event": 3}', '{"event": "x"'])
def test_a_line_that_is_no_event_is_none(line):
    assert parse_event(line) is None


def test_a_deeply_nested_line_is_none():
    assert parse_event("[" * 100_000) is None
