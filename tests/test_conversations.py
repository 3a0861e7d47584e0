import hashlib
import json

import pytest

from bench.ask.conversations import file_digest, read_conversations
from bench.errors import BrokenFile

PAIR = {"prompt": "two and two?", "response": "four"}
CHAT = [
    {"role": "system", "content": "be brief"},
    {"role": "user", "content": "hello"},
    {"role": "assistant", "content": "hi"},
]


def written(path, *lines):
    file = path / "text.jsonl"
    file.write_text("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines))
    return file


def test_prompt_and_response_become_two_messages(tmp_path):
    assert read_conversations(written(tmp_path, PAIR)) == [
        [{"role": "user", "content": "two and two?"}, {"role": "assistant", "content": "four"}]
    ]


def test_messages_are_taken_as_they_are(tmp_path):
    assert read_conversations(written(tmp_path, {"messages": CHAT})) == [CHAT]


def test_other_keys_are_left_out(tmp_path):
    found = read_conversations(
        written(tmp_path, {**PAIR, "id": 7}, {"messages": [{**m, "x": 1} for m in CHAT]})
    )
    assert all(message.keys() == {"role", "content"} for talk in found for message in talk)


def test_blank_lines_are_skipped_and_still_counted(tmp_path):
    with pytest.raises(BrokenFile, match="line 4"):
        read_conversations(written(tmp_path, PAIR, "", "   ", "oops"))


def test_line_separators_inside_a_json_text_do_not_split_a_line(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_text(
        json.dumps({"prompt": "a\u2028b\x85c", "response": "d"}, ensure_ascii=False), encoding="utf-8"
    )
    assert read_conversations(file)[0][0]["content"] == "a\u2028b\x85c"


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ("{", "not JSON"),
        ("[1, 2]", "not an object"),
        ("3", "not an object"),
        ({"prompt": "alone"}, "neither prompt and response"),
        ({"messages": CHAT[:1]}, "at least two messages"),
        ({"messages": "hello"}, "at least two messages"),
        ({"prompt": 3, "response": "four"}, "as text"),
        ({"messages": [{"role": "user"}, CHAT[2]]}, "as text"),
        ({"messages": ["a", "b"]}, "as text"),
        ({"messages": CHAT[:2]}, "the last message is not the assistant's"),
    ],
)
def test_a_broken_line_is_named_with_what_is_wrong(tmp_path, line, why):
    with pytest.raises(BrokenFile, match=why) as caught:
        read_conversations(written(tmp_path, PAIR, line, PAIR))
    assert "line 2" in str(caught.value)


def test_an_empty_file_holds_no_conversations(tmp_path):
    with pytest.raises(BrokenFile, match="holds no conversations"):
        read_conversations(written(tmp_path, "", " "))


def test_a_missing_file_is_a_broken_file(tmp_path):
    with pytest.raises(BrokenFile, match="not readable"):
        read_conversations(tmp_path / "none.jsonl")


def test_bytes_that_are_no_text_are_a_broken_file(tmp_path):
    file = tmp_path / "text.jsonl"
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(BrokenFile, match="not readable"):
        read_conversations(file)


def test_a_deeply_nested_line_is_a_broken_file(tmp_path):
    with pytest.raises(BrokenFile, match="line 1"):
        read_conversations(written(tmp_path, "[" * 100_000))


def test_the_digest_is_that_of_the_bytes(tmp_path):
    file = written(tmp_path, PAIR)
    assert file_digest(file) == hashlib.sha256(file.read_bytes()).hexdigest()
