"""Norms and counts of gradients, and which trained weights are not finite."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from bench.probe.gradients import gradient_norm, non_finite_tensors, tensor_statistics


def parameter(gradient: torch.Tensor | None) -> nn.Parameter:
    made = nn.Parameter(torch.zeros(4))
    made.grad = gradient
    return made


def test_a_huge_weight_is_finite_although_its_square_is_not() -> None:
    tensors = {
        "huge": torch.full((4,), 1e20),
        "nan": torch.tensor([1.0, math.nan]),
        "inf": torch.tensor([-math.inf]),
    }
    assert non_finite_tensors(tensors) == ["nan", "inf"]
    assert non_finite_tensors({}) == []


def test_statistics_of_each_tensor() -> None:
    tensors = [
        parameter(torch.tensor([3.0, 4.0, 0.0, 0.0])),
        parameter(None),
        parameter(torch.tensor([math.nan, math.inf, 1.0, 0.0])),
        parameter(torch.zeros(4)),
    ]
    found = tensor_statistics(tensors)
    assert found.norms[0] == 5.0
    assert found.norms[1] is None
    assert found.norms[2] is not None
    assert math.isnan(found.norms[2])
    assert found.norms[3] == 0.0
    assert found.non_finite == (0, None, 2, 0)
    assert found.zeros == (2, None, 1, 4)


def test_nothing_to_tell_of() -> None:
    assert tensor_statistics([parameter(None)]).norms == (None,)
    with pytest.raises(ValueError, match="no trainable tensor"):
        gradient_norm([parameter(None)])


def test_the_global_norm_adds_up_in_float32() -> None:
    half = parameter(None)
    half.data = half.data.half()
    half.grad = torch.full((4,), 60000.0, dtype=torch.float16)
    assert float(gradient_norm([half])) == pytest.approx(120000.0)


def test_a_large_finite_value_is_no_spoilt_one() -> None:
    tensors = {
        "large": torch.tensor([1e30, 0.0]),  # Its square is not finite in float32.
        "nan": torch.tensor([1.0, math.nan]),
        "fine": torch.ones(2),
        "infinite": torch.tensor([-math.inf, 1e30]),
    }
    assert non_finite_tensors(tensors) == ["nan", "infinite"]
