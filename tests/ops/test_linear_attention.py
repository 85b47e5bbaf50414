"""Causal linear attention against its naive twin."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from newllm.ops import reference
from newllm.ops.linear_attention import causal_linear_attention, feature_map


@given(T=st.integers(1, 40), chunk=st.integers(1, 20), d=st.integers(1, 5), dv=st.integers(1, 5))
def test_any_chunk_gives_the_naive_numbers_and_gradients(T, chunk, d, dv):
    torch.manual_seed(T)
    q, k, v = (torch.randn(2, 3, T, n, dtype=torch.float64, requires_grad=True) for n in (d, d, dv))
    fast = causal_linear_attention(q, k, v, chunk=chunk)
    slow = reference.linear_attention(q, k, v)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    weight = torch.randn_like(fast)
    for ours, theirs in zip(
        torch.autograd.grad((fast * weight).sum(), (q, k, v)),
        torch.autograd.grad((slow * weight).sum(), (q, k, v)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-10)


def test_sums_are_in_float32_also_in_bf16():
    q, k, v = (torch.randn(1, 1, 4096, 8).bfloat16() for _ in range(3))
    exact = causal_linear_attention(q.double(), k.double(), v.double())
    torch.testing.assert_close(causal_linear_attention(q, k, v).double(), exact, rtol=1e-2, atol=1e-3)


def test_features_are_positive():
    assert (feature_map(torch.linspace(-80, 80, 100)) > 0).all()
