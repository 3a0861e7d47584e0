import pytest

from bench.errors import BadValue, BrokenFile, MissingLibrary, MissingModel, UserError, nearest, unknown


def test_the_line_a_person_reads_is_message_and_hint():
    assert str(UserError("it broke", "mend it")) == "it broke; mend it"


def test_without_a_hint_the_line_is_the_message_alone():
    assert str(UserError("it broke")) == "it broke"


def test_the_line_is_one_line_whatever_the_message_holds():
    assert str(BadValue("first\nsecond\t third", "do\r\nthis")) == "first second third; do this"


@pytest.mark.parametrize("kind", [BadValue, MissingLibrary, MissingModel, BrokenFile])
def test_every_kind_is_caught_as_a_user_error(kind):
    with pytest.raises(UserError):
        raise kind("x")


def test_an_unknown_name_suggests_the_nearest():
    error = unknown("backend", "bnb-n4", ["hqq", "bnb-nf4", "awq"])
    assert str(error) == "unknown backend 'bnb-n4'; did you mean 'bnb-nf4'?"


def test_an_unknown_name_that_is_near_to_nothing_lists_all_names_sorted():
    assert str(unknown("backend", "zzzzzz", ["hqq", "awq"])) == "unknown backend 'zzzzzz'; valid: awq, hqq"


def test_names_that_come_as_an_iterator_are_all_listed():
    assert "valid: a, b" in str(unknown("thing", "qqqqq", iter(["b", "a"])))


def test_the_nearest_name_ignores_case_and_keeps_its_own():
    assert nearest("QWEN2-7b", ["Qwen2-7B", "tiny"]) == "Qwen2-7B"


def test_nothing_is_near_to_the_empty_text():
    assert nearest("", ["hqq"]) is None


def test_a_name_with_a_separator_is_shown_as_it_is():
    """str.split takes these for space."""
    assert str(UserError("'a\x1f b\x1c' is not there")) == r"'a\x1f b\x1c' is not there"
    assert str(UserError("'\ra\x0bb\x85' is not there")) == r"'\ra\x0bb\x85' is not there"
    assert str(UserError("'a\u3000b' is not there")) == "'a\u3000b' is not there"


def test_lines_of_any_system_are_joined():
    assert str(UserError("\tone\r\n two\n\n\tthree\r\n")) == "one two three"
