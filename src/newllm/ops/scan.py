"""Linear recurrences h_t = a_t h_{t−1} + b_t of many numbers at once; the obvious twin is `reference.linear_scan`.

The text is cut into chunks that go through their tokens side by side, twice. First each begins with zeros, and keeps
only what it ends with, and the product of its a; from these follows, chunk by chunk, what each really begins with. With
that they go through their tokens once more, and write h. Products of numbers ≤ 1 may become 0, which is what they then
are: nothing is divided by them. The gradient is the same recurrence from the end, g_t = ∂_t + a_{t+1} g_{t+1}, with
∂b_t = g_t and ∂a_t = g_t h_{t−1}.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable


def linear_scan(a: Tensor, b: Tensor, before: Tensor | None = None, *, chunk: int | None = None) -> Tensor:
    """h_t = a_t h_{t−1} + b_t for t = 1 … T, element by element, in float32 at least.

    Args:
        a: (B, T, …) factors, 0 ≤ a ≤ 1.
        b: (B, T, …) of the same shape.
        before: (B, …), h_0; None for zeros.
        chunk: tokens of a chunk; another value gives the same numbers to rounding. Default √T: as many steps within
            chunks as from chunk to chunk.

    Returns:
        (B, T, …), h_1 … h_T.
    """
    dtype = torch.promote_types(torch.promote_types(a.dtype, b.dtype), torch.float32)
    before = torch.zeros_like(b[:, 0]) if before is None else before
    return _LinearScan.apply(a.to(dtype), b.to(dtype), before.to(dtype), chunk or round(a.shape[1] ** 0.5))


class _LinearScan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, a: Tensor, b: Tensor, before: Tensor, chunk: int) -> Tensor:
        h = _scan(a, b, before, chunk)
        ctx.save_for_backward(a, h, before)
        ctx.chunk = chunk
        return h

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        a, h, before = ctx.saved_tensors
        following = torch.cat([a[:, 1:], torch.zeros_like(a[:, :1])], dim=1)
        g = _scan(following, grad, torch.zeros_like(before), ctx.chunk, backwards=True)
        grad_a = torch.empty_like(a)
        torch.mul(g[:, :1], before[:, None], out=grad_a[:, :1])
        torch.mul(g[:, 1:], h[:, :-1], out=grad_a[:, 1:])
        return grad_a, g, a[:, 0] * g[:, 0], None


def _scan(a: Tensor, b: Tensor, before: Tensor, chunk: int, backwards: bool = False) -> Tensor:
    """The recurrence without gradient: h_t from h_{t−1}, or backwards from h_{t+1}, beginning with before (B, …)."""
    T = b.shape[1]
    count = -(-T // chunk)
    a, b = (_in_chunks(x, count, chunk) for x in (a, b))
    tokens, chunks = list(range(chunk)), list(range(count))
    if backwards:
        tokens, chunks = tokens[::-1], chunks[::-1]
    first, *others = tokens
    if count > 1:
        ends, products = b[:, :, first], a[:, :, first]
        for t in others:
            ends, products = torch.addcmul(b[:, :, t], a[:, :, t], ends), products * a[:, :, t]
    carried = torch.empty(b.shape[:2] + b.shape[3:], dtype=b.dtype, device=b.device)  # (B, count, …)
    for n in chunks:
        carried[:, n] = before
        if n != chunks[-1]:
            before = torch.addcmul(ends[:, n], products[:, n], before)
    h = torch.empty_like(b)
    for t in tokens:
        carried = torch.addcmul(b[:, :, t], a[:, :, t], carried, out=h[:, :, t])
    return h.flatten(1, 2)[:, :T]


def _in_chunks(x: Tensor, count: int, chunk: int) -> Tensor:
    """(B, T, …) as (B, count, chunk, …), with zeros behind the text."""
    padding = count * chunk - x.shape[1]
    if padding:
        x = F.pad(x, (*(0, 0) * (x.dim() - 2), 0, padding))
    return x.unflatten(1, (count, chunk))
