"""Many cases of one kind: one in so many runs in `make test`, and all of them in `make soak`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest


def thinned(cases: Sequence[Any], one_in: int) -> list[Any]:
    """The cases for ``parametrize``; all but each ``one_in``-th, from the first on, are left to the soak."""
    return [case if place % one_in == 0 else pytest.param(case, marks=pytest.mark.soak)
            for place, case in enumerate(cases)]  # fmt: skip
