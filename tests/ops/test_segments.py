"""Laying tokens out and picking them, against loops."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from newllm.ops.segments import lay_out, pick


@given(B=st.integers(0, 3), T=st.integers(0, 5), spare=st.integers(0, 3), data=st.data())
def test_tokens_go_to_their_slots_and_are_found_there(B, T, spare, data):
    size, D = T + spare, 2
    x = torch.randn(B, T, D, dtype=torch.float64, requires_grad=True)
    places = [data.draw(st.permutations(range(size)))[:T] for _ in range(B)]
    thrown = torch.tensor([[data.draw(st.booleans()) for _ in range(T)] for _ in range(B)], dtype=torch.bool).view(B, T)
    slots = torch.tensor(places, dtype=torch.long).view(B, T).masked_fill(thrown, size)
    laid = lay_out(x, slots, size)
    expected = torch.zeros(B, size, D, dtype=torch.float64)
    for b in range(B):
        for t in range(T):
            if not thrown[b, t]:
                expected[b, slots[b, t]] = x[b, t].detach()
    assert torch.equal(laid, expected)
    laid.sum().backward()
    assert torch.equal(x.grad, (~thrown)[..., None].expand(B, T, D).double())
    if size:
        found = pick(laid, slots.clamp(max=size - 1))
        assert torch.equal(found[~thrown], x[~thrown])
