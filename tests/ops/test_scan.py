"""The linear recurrence in chunks against its naive twin."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from newllm.ops import reference
from newllm.ops.scan import linear_scan


@given(
    T=st.integers(1, 40),
    chunk=st.none() | st.integers(1, 45),
    sizes=st.lists(st.integers(1, 4), min_size=1, max_size=2),
    fresh=st.booleans(),
)
def test_any_chunk_gives_the_naive_numbers_and_gradients(T, chunk, sizes, fresh):
    torch.manual_seed(T)
    shape = (2, T, *sizes)
    a = torch.rand(shape, dtype=torch.float64, requires_grad=True)
    b = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    zeros = torch.zeros(2, *sizes, dtype=torch.float64)
    before = zeros if fresh else torch.randn_like(zeros).requires_grad_()
    fast = linear_scan(a, b, None if fresh else before, chunk=chunk)
    slow = reference.linear_scan(a, b, before)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-10)
    weight, wanted = torch.randn_like(fast), (a, b) if fresh else (a, b, before)
    for ours, theirs in zip(
        torch.autograd.grad((fast * weight).sum(), wanted),
        torch.autograd.grad((slow * weight).sum(), wanted),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-10)


def test_factors_that_underflow_in_products_stay_exact():
    """Where the product over a chunk is 0 in float64, what was written lately still counts."""
    a = torch.full((1, 400, 1), 1e-3, dtype=torch.float64, requires_grad=True)
    a.data[:, 200:] = 1
    b = torch.ones(1, 400, 1, dtype=torch.float64, requires_grad=True)
    fast, slow = linear_scan(a, b), reference.linear_scan(a, b, torch.zeros(1, 1, dtype=torch.float64))
    torch.testing.assert_close(fast, slow, rtol=1e-12, atol=0)
    gradients = [torch.autograd.grad(h[:, -1].sum(), (a, b)) for h in (fast, slow)]
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=0)


def test_nothing_from_the_future():
    a, b = torch.rand(1, 30, 4), torch.randn(1, 30, 4)
    whole = linear_scan(a, b)
    for t in (1, 7, 29):
        changed_a, changed_b = a.clone(), b.clone()
        changed_a[:, t:], changed_b[:, t:] = 0.5, 9
        assert torch.equal(linear_scan(changed_a, changed_b)[:, :t], whole[:, :t])


def test_sums_are_in_float32_also_in_bf16():
    a, b = torch.full((1, 4096, 2), 0.999).bfloat16(), torch.rand(1, 4096, 2).bfloat16()
    exact = linear_scan(a.double(), b.double())
    assert linear_scan(a, b).dtype == torch.float32
    torch.testing.assert_close(linear_scan(a, b).double(), exact, rtol=1e-4, atol=1e-4)
