"""The training text that the project makes itself: a small instruction set, the same on every machine.

Conversations of one question and one answer over arithmetic, units, words, lists, dates and small JSON
objects. Each is made from its index alone, so any number of them can be made anywhere without a download.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable

from bench.ask.conversations import Message

_ANIMALS = ("heron", "otter", "lynx", "beetle", "marten", "plover", "salmon", "badger", "falcon", "newt")
_CITIES = ("Lisbon", "Oslo", "Nairobi", "Lima", "Kyoto", "Turin", "Quebec", "Hanoi", "Porto", "Accra")
_COLOURS = ("amber", "teal", "crimson", "ivory", "indigo", "olive", "slate", "coral", "plum", "ochre")
_TRADES = (
    "baker",
    "surveyor",
    "nurse",
    "welder",
    "gardener",
    "pilot",
    "teacher",
    "mason",
    "tailor",
    "chemist",
)
_UNITS = (
    ("kilometres", "metres", 1000),
    ("hours", "minutes", 60),
    ("kilograms", "grams", 1000),
    ("days", "hours", 24),
    ("metres", "centimetres", 100),
    ("litres", "millilitres", 1000),
)


class _Draw:
    """Small whole numbers that depend on the conversation's index and nothing else."""

    def __init__(self, index: int) -> None:
        self._bits = int.from_bytes(hashlib.sha256(f"instruction {index}".encode()).digest(), "big")

    def below(self, limit: int) -> int:
        self._bits, value = divmod(self._bits, limit)
        return value

    def of(self, choices: tuple[str, ...]) -> str:
        return choices[self.below(len(choices))]


def _arithmetic(draw: _Draw) -> tuple[str, str]:
    a, b, c = draw.below(900) + 100, draw.below(90) + 10, draw.below(9) + 2
    return (
        f"A workshop packs {a} parts in the morning and {b} more after lunch. If each crate takes {c} "
        f"parts, how many crates are full, and how many parts are left over?",
        f"Together there are {a} + {b} = {a + b} parts. Dividing by {c} gives {(a + b) // c} full crates, "
        f"since {(a + b) // c} x {c} = {(a + b) // c * c}. The remainder is {(a + b) % c} parts.",
    )


def _units(draw: _Draw) -> tuple[str, str]:
    large, small, factor = _UNITS[draw.below(len(_UNITS))]
    amount = draw.below(480) + 3
    return (
        f"Convert {amount} {large} to {small}, and say how you did it.",
        f"One of the {large} holds {factor} {small}, so multiply: {amount} x {factor} = "
        f"{amount * factor}. The answer is {amount * factor} {small}.",
    )


def _sorting(draw: _Draw) -> tuple[str, str]:
    numbers = [draw.below(500) for _ in range(6)]
    return (
        f"Sort these numbers from smallest to largest and give their median: {', '.join(map(str, numbers))}.",
        f"In order they are {', '.join(map(str, sorted(numbers)))}. With six numbers the median is the "
        f"mean of the third and the fourth: {(sorted(numbers)[2] + sorted(numbers)[3]) / 2}.",
    )


def _object(draw: _Draw) -> tuple[str, str]:
    person = {
        "trade": draw.of(_TRADES),
        "city": draw.of(_CITIES),
        "age": draw.below(50) + 18,
        "favourite_colour": draw.of(_COLOURS),
    }
    return (
        f"Write as JSON: a {person['trade']} of {person['age']} who lives in {person['city']} and likes "
        f"the colour {person['favourite_colour']}.",
        json.dumps(person, indent=2),
    )


def _letters(draw: _Draw) -> tuple[str, str]:
    word = draw.of(_ANIMALS + _COLOURS + _TRADES)
    return (
        f"Spell the word '{word}' backwards and count its vowels.",
        f"Backwards it reads '{word[::-1]}'. Its vowels are "
        f"{', '.join(letter for letter in word if letter in 'aeiou')}, which makes "
        f"{sum(letter in 'aeiou' for letter in word)}.",
    )


def _story(draw: _Draw) -> tuple[str, str]:
    animal, city, colour, trade = draw.of(_ANIMALS), draw.of(_CITIES), draw.of(_COLOURS), draw.of(_TRADES)
    return (
        f"Tell a story of three sentences about a {trade} from {city} and a {animal}.",
        f"Every evening the {trade} walked home along the water in {city}, past the {colour} boats. One "
        f"night a {animal} sat on the last mooring post and would not move, so the two of them waited "
        f"for the rain to stop. By morning the {trade} had named the {animal} after the street, and it "
        f"never left.",
    )


_KINDS: tuple[Callable[[_Draw], tuple[str, str]], ...] = (
    _arithmetic,
    _units,
    _sorting,
    _object,
    _letters,
    _story,
)


def conversation(index: int) -> list[Message]:
    """The conversation of this index: a user message and an assistant message."""
    draw = _Draw(index)
    question, answer = _KINDS[index % len(_KINDS)](draw)
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


CALIBRATION_TEXTS = 32
"""Of about 300 tokens each: minutes for a small model on two cores. Published checkpoints use more."""
CALIBRATION_START = 1_000_000


def calibration_texts() -> list[str]:
    """The texts that packed checkpoints are calibrated on: generated conversations as plain text, from an
    index range that the training does not reach."""
    groups = range(CALIBRATION_START, CALIBRATION_START + 3 * CALIBRATION_TEXTS, 3)
    return [
        "\n".join(message["content"] for index in range(first, first + 3) for message in conversation(index))
        for first in groups
    ]
