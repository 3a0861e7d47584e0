import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from bench.run.instructions import conversation

ROOT = Path(__file__).resolve().parents[1]
KINDS = 6


def talk(index):
    question, answer = conversation(index)
    return question["content"], answer["content"]


def numbers(text):
    return [int(found) for found in re.findall(r"\d+", text)]


def of_kind(kind, count=200):
    return [kind + KINDS * index for index in range(count)]


def test_a_conversation_is_a_question_and_an_answer():
    assert [message["role"] for message in conversation(17)] == ["user", "assistant"]


def test_the_same_index_gives_the_same_text():
    assert [conversation(index) for index in range(50)] == [conversation(index) for index in range(50)]


def test_another_process_with_another_hash_seed_gives_the_same_text():
    code = "from bench.run.instructions import conversation; print([conversation(i) for i in range(30)])"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=60,
        env={**os.environ, "PYTHONHASHSEED": "3", "PYTHONPATH": str(ROOT)},
        check=True,
    )
    assert done.stdout.strip() == str([conversation(index) for index in range(30)])


def test_the_text_of_one_index_is_pinned():
    assert talk(1) == (
        "Convert 459 kilograms to grams, and say how you did it.",
        "One of the kilograms holds 1000 grams, so multiply: 459 x 1000 = 459000. "
        "The answer is 459000 grams.",
    )


def test_conversations_differ():
    assert len({talk(index) for index in range(300)}) > 250


@pytest.mark.parametrize("index", of_kind(0))
def test_crates_and_parts_add_up(index):
    question, answer = talk(index)
    morning, lunch, crate = numbers(question)
    first, second, total, divisor, crates, _, _, packed, rest = numbers(answer)
    assert (first, second, total, divisor) == (morning, lunch, morning + lunch, crate)
    assert packed == crates * crate
    assert packed + rest == total
    assert 0 <= rest < crate


@pytest.mark.parametrize("index", of_kind(1))
def test_units_are_converted_with_the_right_factor(index):
    question, answer = talk(index)
    amount, large, small = re.match(r"Convert (\d+) (\w+) to (\w+),", question).groups()
    factor = {"kilometres": 1000, "hours": 60, "kilograms": 1000, "days": 24, "metres": 100, "litres": 1000}[
        large
    ]
    assert numbers(answer) == [factor, int(amount), factor, int(amount) * factor, int(amount) * factor]
    assert answer.endswith(f"The answer is {int(amount) * factor} {small}.")


@pytest.mark.parametrize("index", of_kind(2, 30))
def test_numbers_are_sorted_and_have_their_median(index):
    question, answer = talk(index)
    given = numbers(question)
    assert numbers(answer)[:6] == sorted(given)
    assert answer.endswith(f": {(sorted(given)[2] + sorted(given)[3]) / 2}.")


@pytest.mark.parametrize("index", of_kind(3, 30))
def test_an_object_is_json_of_what_was_said(index):
    question, answer = talk(index)
    assert all(str(value) in question for value in json.loads(answer).values())


@pytest.mark.parametrize("index", of_kind(4, 30))
def test_a_word_is_spelt_backwards_and_its_vowels_counted(index):
    question, answer = talk(index)
    word = re.search(r"'(\w+)'", question)[1]
    assert f"'{''.join(reversed(word))}'" in answer
    assert answer.endswith(f"which makes {len(re.findall('[aeiou]', word))}.")
