"""How many inputs a fuzz test gives to the command, and that it really gave so many.

A file of fuzz tests names its ``budgets``, of a quick part that `make test` runs and of a soak part that
`make soak` runs, and decorates with ``fuzzed`` a test of one input.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import pytest
from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import strategies as st

from tests.front import Front

Budget = Mapping[str, int]


def budgets(**of_each: tuple[int, int]) -> tuple[Budget, Budget]:
    """Inputs of each subject in the quick part and in the soak part."""
    return {name: both[0] for name, both in of_each.items()}, {name: both[1] for name, both in of_each.items()}


def fuzzed(subject: str, quick: Budget, soak: Budget) -> Callable[[Callable[[Front, st.DataObject], None]], Any]:
    """A test of one input, run for as many inputs as the budgets say: the same ones every time in the quick
    part, others every time in the soak part. The count is what the command was really given."""

    def decorate(test: Callable[[Front, st.DataObject], None]) -> Any:
        @pytest.mark.parametrize(
            "part", ["quick", pytest.param("soak", marks=[pytest.mark.soak, pytest.mark.timeout(7200)])]
        )
        def repeated(part: str, front: Front, capsys: pytest.CaptureFixture[str]) -> None:
            wanted = (quick if part == "quick" else soak)[subject]

            @settings(
                max_examples=wanted, deadline=None, database=None, derandomize=part == "quick", print_blob=True,
                suppress_health_check=list(HealthCheck), phases=[Phase.generate, Phase.shrink],
            )  # fmt: skip
            @given(data=st.data())
            def each(data: st.DataObject) -> None:
                test(front, data)

            each()
            if part == "soak":
                with capsys.disabled():
                    print(f"\n{subject}: {front.inputs} inputs, {front.refusals} refused, exit codes {front.codes}")
            assert front.inputs >= wanted
            # A test in which nothing is refused, or everything, has stopped to test anything.
            assert 0 < front.refusals < front.inputs

        repeated.__doc__ = test.__doc__
        repeated.__module__ = test.__module__
        return repeated

    return decorate
