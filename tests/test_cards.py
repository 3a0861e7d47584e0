import pytest

from bench.ask.cards import GIB, Cards, cards_here, parse_cards
from bench.errors import BadValue


@pytest.mark.parametrize(
    ("text", "count", "label"),
    [
        ("7x24GB", 7, "7x24GB"),
        ("24GB", 1, "1x24GB"),
        (" 1 x 80 gb ", 1, "1x80GB"),
        ("2X79.1GiB", 2, "2x79.1GiB"),
        ("8x141G", 8, "8x141GB"),
    ],
)
def test_cards_are_read_as_people_write_them(text, count, label):
    cards = parse_cards(text)
    assert (cards.count, cards.label) == (count, label)


def test_gib_is_exact_and_gb_is_what_cuda_sees_of_it():
    assert parse_cards("79.25GiB").capacity_bytes == int(79.25 * GIB)
    # torch reports 23.55 to 23.70 GiB of a card of 24 GB, and 79.10 to 79.15 of one of 80.
    assert parse_cards("24GB").capacity_bytes == int(23.55 * GIB)
    assert 78 * GIB < parse_cards("80GB").capacity_bytes < 79.10 * GIB


@pytest.mark.parametrize(
    "text",
    [
        "",
        "7",
        "x24GB",
        "7x",
        "24",
        "seven x 24GB",
        "7x24TB",
        "7x24GB,80GB",
        "-1x24GB",
        "7*24GB",
        "nanGB",
        "1e3GB",
    ],
)
def test_nonsense_is_refused_with_an_example(text):
    with pytest.raises(BadValue) as refusal:
        parse_cards(text)
    line = str(refusal.value)
    assert f"'{text}'" in line
    assert "--cards 7x24GB" in line


@pytest.mark.parametrize("text", ["0x24GB", "0GB", "2000x24GB", "1x99999GB"])
def test_sizes_that_no_machine_has_are_refused(text):
    with pytest.raises(BadValue, match="between"):
        parse_cards(text)


def test_the_same_cards_written_differently_are_equal():
    assert parse_cards("24GB") == parse_cards("1x24gb")


def test_cards_of_this_machine_are_grouped_by_their_memory():
    found = cards_here([24 * GIB, None, 80 * GIB, 24 * GIB])
    assert [(cards.count, cards.label) for cards in found] == [(1, "1x80.0GiB"), (2, "2x24.0GiB")]
    # The driver counts what it keeps for itself; CUDA does not.
    assert found[1].capacity_bytes == parse_cards("24GB").capacity_bytes


def test_a_machine_without_cards_has_none():
    assert cards_here([]) == []
    assert Cards(1, "a", 1) != Cards(1, "a", 2)
