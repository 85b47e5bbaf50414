"""Fused linear + cross-entropy against its naive twin, values and gradients."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from newllm.ops import loss, native, reference


@given(
    rows=st.integers(1, 40),
    chunk=st.sampled_from([1, 7, 512]),
    softmax=st.sampled_from([1, 3, 128]),
    ignored=st.integers(0, 5),
)
def test_equals_its_naive_twin_in_value_and_gradient(rows, chunk, softmax, ignored):
    hidden = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (rows,))
    kept = torch.arange(rows) >= min(ignored, rows - 1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "ROWS", chunk)
        patch.setattr(loss, "SOFTMAX_ROWS", softmax)
        labels = targets.where(kept, torch.tensor(loss.IGNORED))
        fused = loss.linear_cross_entropy(hidden, weight, labels, "sum")
        each = loss.linear_cross_entropy(hidden, weight, labels, "none")
    slow = reference.linear_cross_entropy(hidden, weight, targets) * kept
    torch.testing.assert_close(fused, slow.sum(), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(each, slow, rtol=1e-12, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad(fused * 0.7, (hidden, weight)),
        torch.autograd.grad(slow.sum() * 0.7, (hidden, weight)),
        strict=True,
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@given(rows=st.integers(1, 40), chunk=st.sampled_from([1, 7, 512]), softmax=st.sampled_from([1, 3, 128]))
def test_losses_with_shares_equal_their_naive_twin_in_value_and_gradient(rows, chunk, softmax):
    hidden = torch.randn(rows, 6, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(11, 6, dtype=torch.float64, requires_grad=True)
    shares = torch.rand(rows, dtype=torch.float64, requires_grad=True)
    targets = torch.randint(11, (rows,))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loss, "ROWS", chunk)
        patch.setattr(loss, "SOFTMAX_ROWS", softmax)
        fused = loss.linear_cross_entropy(hidden, weight, targets, shares=shares)
    slow = (reference.linear_cross_entropy(hidden, weight, targets) * shares).sum()
    torch.testing.assert_close(fused, slow, rtol=1e-12, atol=1e-12)
    inputs = (hidden, weight, shares)
    for ours, theirs in zip(
        torch.autograd.grad(fused * 0.7, inputs), torch.autograd.grad(slow * 0.7, inputs), strict=True
    ):
        torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_without_rows_loss_and_gradients_are_zero_and_not_missing(dtype):
    hidden, weight = (torch.randn(n, 6, dtype=dtype, requires_grad=True) for n in (0, 11))
    total = loss.linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64))
    total.backward()
    assert total == 0
    assert hidden.grad.shape == (0, 6)
    assert not weight.grad.any()
    assert loss.linear_cross_entropy(hidden, weight, torch.zeros(0, dtype=torch.int64), "none").shape == (0,)


@pytest.mark.parametrize("own_kernel", [True, False])
def test_bf16_autocast_is_as_close_as_full_logits(monkeypatch, own_kernel):
    if not own_kernel:
        monkeypatch.setattr(native, "loss_library", lambda: None)
    torch.manual_seed(0)
    hidden, weight = torch.randn(300, 64), torch.randn(500, 64, requires_grad=True)
    targets = torch.randint(500, (300,))
    exact = F.cross_entropy(hidden @ weight.T, targets, reduction="sum")
    with torch.autocast("cpu", dtype=torch.bfloat16):
        fused = loss.linear_cross_entropy(hidden, weight, targets)
    assert fused.dtype == torch.float32
    assert abs(fused - exact) / exact < 2e-3
    (ours,), (theirs,) = torch.autograd.grad(fused, weight), torch.autograd.grad(exact, weight)
    assert ours.dtype == torch.float32
    assert (ours - theirs).norm() / theirs.norm() < 1e-2


def test_without_a_target_loss_and_gradients_are_zero_and_not_missing():
    hidden, weight = torch.randn(4, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    total = loss.linear_cross_entropy(hidden, weight, torch.full((4,), loss.IGNORED), "sum")
    total.backward()
    assert total == 0
    assert not hidden.grad.any()
    assert not weight.grad.any()


def test_where_no_gradient_is_wanted_none_is_computed(monkeypatch):
    hidden, weight = torch.randn(9, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    targets = torch.randint(11, (9,))
    expected = loss.linear_cross_entropy(hidden, weight, targets).detach()
    monkeypatch.setattr(loss, "_logit_gradient", lambda *args: pytest.fail("a gradient nobody asked for"))
    with torch.no_grad():
        assert loss.linear_cross_entropy(hidden, weight, targets) == expected
    with torch.inference_mode():
        assert loss.linear_cross_entropy(hidden, weight, targets) == expected


def test_a_second_derivative_is_refused_and_not_taken_for_zero():
    hidden, weight = torch.randn(9, 6, requires_grad=True), torch.randn(11, 6, requires_grad=True)
    total = loss.linear_cross_entropy(hidden, weight, torch.randint(11, (9,)))
    (gradient,) = torch.autograd.grad(total * hidden.sum(), hidden, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.square().sum().backward()
