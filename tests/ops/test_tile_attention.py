"""Attention in tiles: the numbers and gradients of its twin, whatever the instructions it is compiled to."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from test_native import BUILDS, error, skip_what_cannot_be_built

from newllm.ops import attention, native, tile_attention

WITHOUT = {"no tiles": (*native.FLAGS, "-mno-amx-bf16"), "no bfloat16": (*BUILDS["no bfloat16"], "-mno-amx-bf16")}


@pytest.fixture(scope="module", params=["native", "plain", *WITHOUT])
def kernels(request):
    if native.library() is None:
        pytest.skip("no C++ compiler here")
    skip_what_cannot_be_built("no bfloat16" if request.param in WITHOUT else request.param)
    flags = (BUILDS | WITHOUT)[request.param]
    library = tile_attention.load(native.build(tile_attention.SOURCE, native.cache_folder() / "kernels", flags))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tile_attention, "library", lambda: library)
        patch.setattr(tile_attention, "MOST_KEYS", 10_000)
        yield library


@st.composite
def cases(draw):
    H, Hk = draw(st.sampled_from([(1, 1), (3, 3), (6, 2), (4, 1)]))
    d, dv = draw(st.sampled_from([(8, 8), (64, 64), (32, 5), (33, 40), (70, 16), (16, 70)]))
    T = draw(st.sampled_from([9, 31, 32, 33, 64, 100, 128, 129, 200]))
    S = T + draw(st.sampled_from([0, 1, 15, 30, 31, 32, 100]))
    return H, Hk, T, S, d, dv


def inputs(case, B=2):
    """Queries, keys and values as views of longer buffers; what stands behind them is not to be read."""
    H, Hk, T, S, d, dv = case
    q, k, v = (
        torch.full((B, tokens + 3, heads, size + 1), torch.nan).bfloat16()[:, :tokens, :, :size].normal_()
        for heads, tokens, size in ((H, T, d), (Hk, S, d), (Hk, S, dv))
    )
    return [x.transpose(1, 2) for x in (q * 3, k, v)]


def outcome(qkv, grad, **options):
    qkv = [x.detach().requires_grad_() for x in qkv]
    mixed = attention.causal_attention(*qkv, **options)
    return mixed.detach(), *torch.autograd.grad(mixed, qkv, grad.to(mixed.dtype))


@given(
    case=cases(),
    slopes=st.sampled_from([None, "one", "each"]),
    window=st.sampled_from([None, 1, 31, 32, 33, 63, 64, 70, 1000]),
    scale=st.sampled_from([None, 0.3]),
    seed=st.integers(0, 9),
)
def test_equals_its_naive_twin_forwards_and_backwards(kernels, case, slopes, window, scale, seed):
    torch.manual_seed(seed)
    qkv = inputs(case)
    slopes = {None: None, "one": torch.tensor([0.06]), "each": torch.rand(case[0])}[slopes]
    grad = torch.randn(2, case[0], case[2], case[5]).bfloat16()
    assert tile_attention.usable(*qkv)
    found = outcome(qkv, grad, slopes=slopes, window=window, scale=scale)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "DIRECT_QUERIES", 10_000)
        expected = outcome([x.double() for x in qkv], grad, slopes=slopes, window=window, scale=scale)
    for name, ours, exact in zip(("mixed", "q", "k", "v"), found, expected, strict=True):
        assert ours.dtype == torch.bfloat16
        if exact.abs().max() > 1e-9:  # who sees one key only has no gradient of the scores
            assert error(ours, exact) < 2**-6, name
        else:
            assert ours.abs().max() < 2**-6 * grad.abs().max(), name


def test_no_result_depends_on_the_number_of_threads_or_on_the_other_rows(kernels):
    qkv, grad = inputs((6, 2, 70, 90, 24, 16)), torch.randn(2, 6, 70, 16).bfloat16()
    threads = torch.get_num_threads()
    found = []
    try:
        for count in (1, 3):
            torch.set_num_threads(count)
            found += [outcome(qkv, grad, window=40), outcome([x[1:] for x in qkv], grad[1:], window=40)]
    finally:
        torch.set_num_threads(threads)
    for one, row, three, same_row in zip(*found, strict=True):
        assert torch.equal(one, three)
        assert torch.equal(one[1:], row)
        assert torch.equal(row, same_row)


def test_a_query_sees_nothing_of_what_comes_after_it(kernels):
    q, k, v = inputs((2, 2, 100, 100, 16, 16))
    whole = attention.causal_attention(q, k, v)
    k[:, :, 50:], v[:, :, 50:] = 1e30, 1e30
    assert torch.equal(attention.causal_attention(q, k, v)[:, :, :50], whole[:, :, :50])


def test_scores_far_apart_and_scores_that_are_no_numbers(kernels):
    q, k, v = torch.zeros(3, 1, 1, 40, 32).bfloat16()
    q[..., 0], k[..., 0], v[..., 0] = 1e4, torch.arange(40) / 64, torch.arange(40)
    assert torch.equal(attention.causal_attention(q, k, v)[0, 0, :, 0], v[0, 0, :, 0])  # the largest alone counts
    q[0, 0, 5, 1] = torch.nan
    mixed = attention.causal_attention(q, k, v)
    assert mixed[0, 0, 5].isnan().all()
    assert mixed[0, 0, [*range(5), *range(6, 40)]].isfinite().all()


@pytest.mark.parametrize("size", [1e2, 1e4, 1e8])
def test_gradients_of_scores_far_apart(kernels, size):
    q, k, v = torch.randn(3, 1, 2, 70, 32).bfloat16()
    qkv, grad = ((q.double() * size).bfloat16(), k, v), torch.randn(1, 2, 70, 32).bfloat16()
    found, expected = outcome(qkv, grad), outcome([x.double() for x in qkv], grad)
    assert error(found[3], expected[3]) < 2**-6  # of the values
    # Those of queries and keys are next to nothing where one weight is all: as large as its rounding, times the other.
    for ours, exact, other in ((found[1], expected[1], k), (found[2], expected[2], qkv[0])):
        assert (ours.double() - exact).abs().max() < 2**-6 * exact.abs().max() + 1e-6 * other.abs().max()


def test_gradients_of_vectors_that_overlap_in_memory(kernels):
    numbers = torch.randn(1, 1, 200).bfloat16()
    windows = numbers.unfold(2, 64, 1)[:, :, :40]  # (1, 1, 40, 64), each token one number on from the last
    grad = torch.ones(1).bfloat16().expand(1, 1, 40, 64)
    assert tile_attention.usable(windows, windows, windows)
    found = outcome([windows] * 3, grad.contiguous())
    assert all(torch.equal(a, b) for a, b in zip(found, outcome([windows] * 3, grad), strict=True))
    for ours, exact in zip(found, outcome([windows.double()] * 3, grad), strict=True):
        assert error(ours, exact) < 2**-6


def test_under_a_transform_torch_computes_it(kernels):
    q, weights = torch.randn(1, 1, 16, 8).bfloat16().requires_grad_(), torch.randn(3, 1, 1, 16, 8)
    each = torch.vmap(lambda w: (attention.causal_attention(q, q, q) * w).sum())(weights)
    torch.testing.assert_close(
        each, (attention.causal_attention(q, q, q) * weights).sum(dim=(1, 2, 3, 4)), rtol=0.02, atol=0.1
    )


def test_keys_that_are_values_too_get_both_gradients(kernels):
    """As the latents of MLA; and heads that are one in memory."""
    q, latent = torch.randn(2, 4, 40, 24).bfloat16(), torch.randn(2, 1, 40, 24).bfloat16().requires_grad_()
    for latents in (latent, latent.expand(2, 4, 40, 24)):
        (found,) = torch.autograd.grad(attention.causal_attention(q, latents, latents).float().square().sum(), latent)
        exact = latent.detach().double().requires_grad_()
        mixed = attention.causal_attention(q.double(), exact, exact)
        (expected,) = torch.autograd.grad(mixed.square().sum(), exact)
        assert error(found, expected) < 2**-5


def test_other_products_of_bf16_are_the_same_before_and_after(kernels):
    """We give the tile registers back empty, and rely on oneDNN to set them for each product."""
    a, b = torch.randn(2, 96, 96).bfloat16()
    expected = a @ b
    for _ in range(3):
        attention.causal_attention(*inputs((1, 1, 33, 33, 16, 16)))
        assert torch.equal(a @ b, expected)


def test_only_plain_bf16_with_the_numbers_of_a_vector_side_by_side_takes_the_kernel(kernels, monkeypatch):
    q = torch.randn(2, 2, 16, 16).bfloat16()
    assert tile_attention.usable(q, q, q)
    for other in (q.float(), q.transpose(2, 3), q.to("meta"), q[:0], q[:, :0]):
        assert not tile_attention.usable(other, other, other)
    assert not tile_attention.usable(q, q, q.float())
    for wrong in ((q[:1], q, q), (q, q[..., :8], q), (q, q, q[:, :, :8]), (q, q[:, :, :8], q[:, :, :8])):
        with pytest.raises(AssertionError):
            tile_attention.tile_attention(*wrong, None, None, 1.0)
    calls, kernel = [], tile_attention.tile_attention
    monkeypatch.setattr(tile_attention, "tile_attention", lambda *args: calls.append(1) or kernel(*args))
    attention.causal_attention(q, q, q, mask=torch.ones(2, 16, dtype=torch.bool))
    attention.causal_attention(q, q, q, dropout=0.5)
    monkeypatch.setattr(tile_attention, "MOST_KEYS", 15)
    attention.causal_attention(q, q, q)
    assert not calls
    monkeypatch.setattr(tile_attention, "MOST_KEYS", 16)
    attention.causal_attention(q, q, q)
    assert calls


def test_a_second_derivative_is_refused(kernels):
    q = torch.randn(1, 1, 16, 16).bfloat16().requires_grad_()
    (grad,) = torch.autograd.grad(attention.causal_attention(q, q, q).square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()
