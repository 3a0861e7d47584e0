"""Kernels that are not there: what a person is told, and that making them ready is no part of the load."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch

from bench.load.registry import get_backend
from bench.run.attention import choose_kernel, why_no_kernel


@pytest.fixture
def attention_as_before() -> Iterator[None]:
    yield
    choose_kernel("sdpa")


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at what a machine without a card says")
def test_an_attention_kernel_that_is_not_there_is_named(attention_as_before):
    choose_kernel("sdpa_efficient")
    query = torch.zeros(1, 4, 8, 16)
    with pytest.raises(RuntimeError) as raised:
        torch.nn.functional.scaled_dot_product_attention(query, query[:, :2], query[:, :2], enable_gqa=True)
    said = why_no_kernel("sdpa_efficient", raised.value)
    assert said is not None
    assert "'sdpa_efficient'" in said
    assert why_no_kernel("sdpa", raised.value) is None
    assert why_no_kernel("sdpa_efficient", RuntimeError("something else")) is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at a machine that cannot compile for a card")
def test_awq_on_cuda_says_what_its_kernel_needs():
    entry = get_backend("awq")
    backend = entry.create({}, "cuda", "float16")
    with pytest.raises(ImportError, match=r"nvcc.*awq\.kernel=awq_torch"):
        backend.ready_kernels()


@pytest.mark.parametrize(("name", "chosen"), [("awq", {"kernel": "awq_torch"}), ("gptq", {}), ("bnb-nf4", {})])
def test_others_have_nothing_to_make_ready(name, chosen):
    entry = get_backend(name)
    assert entry.create(chosen, "cuda", "float16").ready_kernels() is False
