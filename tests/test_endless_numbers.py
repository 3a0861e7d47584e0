"""Whole numbers of more than 64 bits are refused in any file that is read, and looking for them costs next to nothing."""

from __future__ import annotations

import pytest

from bench.record import store


@pytest.mark.parametrize("text", [b"12345678901234567890", b'{"a": -12345678901234567890, "b": 0.0000000000000000000000001}'])
def test_a_whole_number_of_more_than_64_bits_is_refused(text: bytes) -> None:
    with pytest.raises(ValueError, match="64 bits"):
        store._refuse_endless_numbers(text)


@pytest.mark.parametrize("text", [b'{"a": 0.0012345678901234567}', b"[123456789012345678.1234567890123456789012, 1e-300]"])
def test_a_fraction_of_many_digits_does_not_have_the_record_parsed_twice(text: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(store, "parsed", lambda *_, **__: pytest.fail("parsed as a whole"))
    store._refuse_endless_numbers(text)
