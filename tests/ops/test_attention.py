"""Fast attention against its naive twin."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from newllm.models.cache import KeyValueState
from newllm.ops import attention, blocked_attention, reference, tile_attention


@st.composite
def cases(draw):
    heads = draw(st.sampled_from([(1, 1), (4, 4), (4, 2), (6, 1)]))
    T = draw(st.integers(1, 14))
    S = T + draw(st.integers(0, 9))
    slopes = draw(st.sampled_from([None, "uniform", "geometric"]))
    window = draw(st.one_of(st.none(), st.integers(1, 20)))
    return heads, T, S, draw(st.sampled_from([5, 8, 11])), slopes, window, draw(st.sampled_from([None, "left", "any"]))


def tensors(case):
    """Float64 queries, keys and values of a case, and the other arguments."""
    (H, Hk), T, S, value_size, scheme, window, padded = case
    slopes = {None: None, "uniform": torch.tensor([0.3]), "geometric": torch.exp2(-torch.arange(1.0, H + 1))}[scheme]
    q = torch.randn(2, H, T, 8, dtype=torch.float64)
    k, v = (torch.randn(2, Hk, S, size, dtype=torch.float64) for size in (8, value_size))
    left = torch.arange(S).expand(2, S) >= torch.tensor([[0], [min(2, S - 1)]])
    mask = {None: None, "left": left, "any": torch.rand(2, S) < 0.7}[padded]
    return (q, k, v), {"slopes": slopes, "window": window, "mask": mask}


@given(case=cases(), block=st.sampled_from([1, 3, 4, 512]), direct=st.sampled_from([0, 2, 8]))
def test_equals_its_naive_twin(case, block, direct):
    qkv, options = tensors(case)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "BLOCK", block)
        patch.setattr(attention, "DIRECT_QUERIES", direct)
        fast = attention.causal_attention(*qkv, **options)
    slow = reference.attention(*qkv, **options)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)


@given(case=cases(), block=st.sampled_from([1, 3, 128]), seed=st.integers(0, 2**31))
def test_dropout_equals_the_naive_twin_with_the_same_weights_dropped(case, block, seed):
    (q, k, v), options = tensors(case)
    for x in (q, k, v):
        x.requires_grad_()
    # With the unit matrix for values, what comes out are the weights.
    unit = torch.eye(k.shape[2], dtype=v.dtype).expand(*k.shape[:3], -1)
    weights = reference.attention(q, k, unit, **options)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(blocked_attention, "QUERIES", block)
        torch.manual_seed(seed)
        dropped = attention.causal_attention(q, k, unit, dropout=0.4, **options) < weights / 2
        torch.manual_seed(seed)
        fast = attention.causal_attention(q, k, v, dropout=0.4, **options)
    slow = (weights / 0.6).masked_fill(dropped, 0) @ v.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    grad = torch.randn_like(fast)
    fast_gradients, slow_gradients = (torch.autograd.grad(mixed, (q, k, v), grad) for mixed in (fast, slow))
    torch.testing.assert_close(fast_gradients, slow_gradients, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_as_many_weights_are_dropped_as_was_asked_and_others_each_time(dtype):
    q, k = torch.randn(2, 2, 4, 200, 8).to(dtype)
    unit = torch.eye(200, dtype=dtype).expand(2, 4, -1, -1)
    first, second = (attention.causal_attention(q, k, unit, dropout=0.25) for _ in range(2))
    seen = torch.ones(200, 200, dtype=torch.bool).tril()
    shares = [float((mixed[..., seen] == 0).float().mean()) for mixed in (first, second)]
    assert shares == pytest.approx([0.25, 0.25], abs=0.007)  # 6 standard deviations of 160,800 draws
    assert float(((first == 0) == (second == 0))[..., seen].float().mean()) == pytest.approx(0.625, abs=0.008)


@given(case=cases(), block=st.sampled_from([1, 3, 4, 128]))
def test_blocks_of_matrix_products_equal_the_naive_twin_forwards_and_backwards(case, block):
    qkv, options = tensors(case)
    for x in qkv:
        x.requires_grad_()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention, "DIRECT_QUERIES", 0)
        patch.setattr(blocked_attention, "QUERIES", block)
        patch.setattr(blocked_attention, "usable", lambda *_: True)
        fast = attention.causal_attention(*qkv, **options)
        grad = torch.randn_like(fast)
        fast_gradients = torch.autograd.grad(fast, qkv, grad)
    slow = reference.attention(*qkv, **options)
    torch.testing.assert_close(fast, slow, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(fast_gradients, torch.autograd.grad(slow, qkv, grad), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", [{}, {"window": 100}, {"slopes": torch.tensor([0.5, 0.1, 0.02, 0.004])}])
@pytest.mark.parametrize("key_heads", [4, 1])
@pytest.mark.parametrize("way", ["tiles", "blocks"])
def test_bf16_is_as_exact_as_in_the_fused_kernel(options, key_heads, way):
    """Errors of results and gradients against float64, both under the autocast of training, where scores are large."""
    exact = [torch.randn(2, heads, 300, 32, dtype=torch.float64) for heads in (4, key_heads, key_heads)]
    exact[0] *= 4
    low = [x.to(torch.bfloat16).requires_grad_() for x in exact]
    exact = [x.detach().double().requires_grad_() for x in low]
    grad = torch.randn(2, 4, 300, 32).to(torch.bfloat16)

    def outcome(qkv):
        mixed = attention.causal_attention(*qkv, **options)
        return mixed, *torch.autograd.grad(mixed, qkv, grad.to(mixed.dtype))

    expected = outcome(exact)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.MonkeyPatch.context() as patch:
        if way == "tiles" and not tile_attention.usable(*low):
            pytest.skip("no product of bf16 here, or no compiler")
        patch.setattr(tile_attention, "usable", lambda *_: way == "tiles")
        patch.setattr(blocked_attention, "usable", lambda *_: True)
        ours = outcome(low)
        patch.setattr(tile_attention, "usable", lambda *_: False)
        patch.setattr(blocked_attention, "usable", lambda *_: False)
        fused = outcome(low)
    for a, b, c in zip(ours, fused, expected, strict=True):
        assert a.dtype == b.dtype == torch.bfloat16
        assert (a - c).norm() < 1.5 * (b - c).norm() < 0.02 * c.norm()


@pytest.mark.parametrize("value_size", [8, 16, 24])
@pytest.mark.parametrize("tiles", [False, True])
def test_what_comes_out_is_no_view_and_can_be_changed(value_size, tiles, monkeypatch):
    if not tiles:
        monkeypatch.setattr(tile_attention, "usable", lambda *_: False)
        monkeypatch.setattr(blocked_attention, "usable", lambda *_: True)
    q, k = (torch.randn(1, 2, 20, 16, dtype=torch.bfloat16, requires_grad=True) for _ in "qk")
    attention.causal_attention(q, k, torch.randn(1, 2, 20, value_size).bfloat16()).mul_(2).sum().backward()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_compiler_can_follow_it(dtype):
    q, k, v = torch.randn(3, 1, 2, 20, 16).to(dtype)
    compiled = torch.compile(attention.causal_attention, backend="eager", fullgraph=True, dynamic=False)
    # Each in the kernel that is fastest for it: in bf16 they may round differently.
    atol = 2**-8 if dtype == torch.bfloat16 else 1e-5
    torch.testing.assert_close(compiled(q, k, v), attention.causal_attention(q, k, v), rtol=2**-7, atol=atol)


@given(
    pads=st.lists(st.integers(0, 4), min_size=2, max_size=2), T=st.integers(1, 12), window=st.none() | st.integers(1, 9)
)
def test_padding_anywhere_takes_no_place(pads, T, window):
    """Of 12 real tokens some are padded away from the others; the last T are queries."""
    q, k, v = (torch.randn(1, 2, 12, 8, dtype=torch.float64) for _ in range(3))
    options = {"slopes": torch.tensor([0.5, 0.1]), "window": window}
    expected = attention.causal_attention(q[:, :, 12 - T :], k, v, **options)
    where = [*range(pads[0], pads[0] + 5), *range(pads[0] + 5 + pads[1], pads[0] + pads[1] + 12)]
    width = 12 + sum(pads)
    mask = torch.zeros(1, width, dtype=torch.bool).index_fill(1, torch.tensor(where), True)
    wide = [torch.randn(1, 2, width, 8, dtype=torch.float64).index_copy(2, torch.tensor(where), x) for x in (q, k, v)]
    padded = attention.causal_attention(wide[0][:, :, where[12 - T] :], *wide[1:], mask=mask, **options)
    torch.testing.assert_close(padded[:, :, mask[0, where[12 - T] :]], expected, rtol=1e-10, atol=1e-12)


def test_alibi_bias_stays_exact_in_bf16():
    """At distance 1000 the bias is −62.5 nats; rounded to bf16 (8 bits) it could only be a multiple of 0.25."""
    q = torch.zeros(1, 1, 12, 8, dtype=torch.bfloat16)
    bias = attention.additive_mask(12, 1012, torch.tensor([0.0625]), None, None, q)
    assert bias.dtype == torch.float32
    assert bias[0, 0, -1, 10] == -0.0625 * 1001


def test_autocast_does_not_round_the_bias():
    torch.manual_seed(0)
    q, k, v = (torch.randn(1, 2, 40, 16, dtype=torch.bfloat16) for _ in range(3))
    slopes = torch.tensor([0.0625])
    plain = attention.causal_attention(q, k, v, slopes=slopes)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under_autocast = attention.causal_attention(q, k, v, slopes=slopes)
    assert torch.equal(plain, under_autocast)


def test_rows_of_padding_stay_finite():
    q, k, v = (torch.randn(1, 1, 20, 4) for _ in range(3))
    mask = torch.arange(20).expand(1, 20) >= 10
    for T in (20, 3):
        assert attention.causal_attention(q[:, :, :T], k[:, :, :T], v[:, :, :T], mask=mask[:, :T]).isfinite().all()


@given(
    start=st.integers(0, 5),
    S=st.integers(1, 9),
    spare=st.integers(0, 4),
    heads=st.sampled_from([(4, 4), (4, 2), (4, 1)]),
    slopes=st.sampled_from([None, [0.25], [0.5, 0.25, 0.125, 0.0625]]),
    masked=st.booleans(),
    B=st.integers(1, 2),
)
def test_views_of_longer_buffers_equal_their_copies_and_the_twin(start, S, spare, heads, slopes, masked, B):
    """In bf16 on a CPU the product runs over the whole buffer; what stands outside the view must not count."""
    (H, Hk), capacity = heads, start + S + spare
    q = torch.randn(B, H, 1, 8, dtype=torch.float64)
    buffers = [torch.randn(B, Hk, capacity, 8, dtype=torch.float64) for _ in "kv"]
    k, v = (buffer[:, :, start : start + S] for buffer in buffers)
    options = {"slopes": None if slopes is None else torch.tensor(slopes), "scale": 0.3}
    if masked:
        options["mask"] = torch.rand(B, S) < 0.5
    view = attention.causal_attention(q, k, v, **options)
    expected = attention.causal_attention(q, k.clone(), v.clone(), **options)
    torch.testing.assert_close(view, expected, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(view, reference.attention(q, k, v, **options), rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(("Hk", "B"), [(1, 1), (1, 2), (4, 1)])
def test_a_growing_buffer_is_multiplied_at_few_lengths(Hk, B, monkeypatch):
    """For each new length of a bf16 product oneDNN compiles and keeps a kernel: a megabyte for every token decoded."""
    lengths, product = set(), torch.bmm
    monkeypatch.setattr(torch, "bmm", lambda a, b: lengths.add((*a.shape, *b.shape)) or product(a, b))
    state = KeyValueState()
    with torch.no_grad():
        for _ in range(200):
            k, v, _ = state.update(*torch.randn(2, B, Hk, 1, 8).bfloat16())
            attention.causal_attention(torch.randn(B, 4, 1, 8).bfloat16(), k, v)
    assert len(lengths) < 2 * 30
