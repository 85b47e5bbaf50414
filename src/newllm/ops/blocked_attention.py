"""Causal attention in bf16 on a CPU: matrix products over blocks of queries, forwards and backwards.

torch's fused kernel for CPUs multiplies bf16 at a third of the speed of its own matrix products, and least well in the
backward of short texts. Here scores exist for one block of queries at a time, in float32 like their softmax, and are
computed again in the backward; everything else is products of bf16. The twin is `reference.attention`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

QUERIES = 128  # of a block
# Above, the fused kernel is no slower, and needs no memory for scores.
MOST_KEYS = 1024

# Start and stop of a block's queries, start and stop of the keys they may see, and what is added to their scores.
Blocks = Callable[[], Iterator[tuple[int, int, int, int, Tensor]]]


def usable(q: Tensor, k: Tensor) -> bool:
    """Whether this is the faster form for the queries and keys of `attention.causal_attention`."""
    return q.device.type == "cpu" and q.dtype == torch.bfloat16 and k.shape[2] <= MOST_KEYS


def blocked_attention(q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> Tensor:
    """softmax_j(scale · q_i·k_j + bias_ij) v_j. Shapes as in `attention.causal_attention`; differentiable once.

    blocks: called once forwards and once backwards; gives for each block of queries its bias, float32 of shape (1 or B,
    1 or H, queries, keys), which gets no gradient.
    """
    return _BlockedAttention.apply(q, k, v, blocks, scale)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, blocks: Blocks, scale: float) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        ctx.save_for_backward(q, k, v)
        ctx.blocks, ctx.scale = blocks, scale
        keys, values = k.flatten(0, 1), v.flatten(0, 1)  # (B·Hk, S, ·)
        mixed = q.new_empty(*q.shape[:3], v.shape[3])
        with torch.autocast("cpu", enabled=False):
            for start, stop, first, last, weights in _weights(q, keys, blocks, scale):
                block = mixed[:, :, start:stop]
                block.copy_(torch.bmm(weights.to(v.dtype), values[:, first:last]).view(block.shape))
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        keys, values = k.flatten(0, 1), v.flatten(0, 1)
        grad_q = torch.empty_like(q)
        dtype = _score_dtype(q)
        grad_k, grad_v = (torch.zeros(x.shape, dtype=dtype) for x in (keys, values))  # summed over blocks
        with torch.autocast("cpu", enabled=False):
            for start, stop, first, last, weights in _weights(q, keys, ctx.blocks, ctx.scale):
                queries, grad_mixed = _rows(q, start, stop, len(keys)), _rows(grad, start, stop, len(keys))
                grad_weights = torch.bmm(grad_mixed, values[:, first:last].transpose(1, 2)).to(dtype)
                grad_v[:, first:last] += torch.bmm(weights.to(v.dtype).transpose(1, 2), grad_mixed)
                grad_scores = torch._softmax_backward_data(grad_weights, weights, -1, dtype).to(q.dtype)
                grad_k[:, first:last] += torch.bmm(grad_scores.transpose(1, 2), queries)
                block = grad_q[:, :, start:stop]
                torch.mul(torch.bmm(grad_scores, keys[:, first:last]).view(block.shape), ctx.scale, out=block)
        return grad_q, (grad_k * ctx.scale).to(k.dtype).view(k.shape), grad_v.to(v.dtype).view(v.shape), None, None


def _weights(q: Tensor, keys: Tensor, blocks: Blocks, scale: float) -> Iterator[tuple[int, int, int, int, Tensor]]:
    """The blocks with their softmax (B·Hk, H/Hk · queries, keys) in float32 in place of the bias."""
    queries, keys = q.to(_score_dtype(q)) * scale, keys.to(_score_dtype(q)).transpose(1, 2)
    for start, stop, first, last, bias in blocks():
        scores = torch.bmm(_rows(queries, start, stop, len(keys)), keys[:, :, first:last])
        scores.view(*q.shape[:2], stop - start, last - first).add_(bias)
        yield start, stop, first, last, scores.softmax(dim=-1)


def _rows(x: Tensor, start: int, stop: int, groups: int) -> Tensor:
    """(B, H, T, ·) to (B·Hk, H/Hk · queries, ·): the query heads that read one key head, one below the other."""
    return x[:, :, start:stop].reshape(groups, -1, x.shape[3])


def _score_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)
