"""Causal attention in bf16 on a CPU: matrix products over blocks of queries, forwards and backwards.

torch's fused kernel for CPUs multiplies bf16 at a third of the speed of its own matrix products, and least well in the
backward of short texts. Here scores exist for one block of queries at a time, in float32 like their softmax, and are
computed again in the backward; everything else is products of bf16. The twin is `reference.attention`.

`tile_attention` is faster still, where it is usable: this is for padded rows, for dropout, and for CPUs without a
product of bf16.

With dropout it is used in every dtype and at every length: torch's kernel for CPUs has none, and falls back to all
scores at once. What was dropped is drawn again in the backward.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from newllm.ops import tile_attention

QUERIES = 128  # of a block
# Above, the fused kernel is no slower, and needs no memory for scores.
MOST_KEYS = 128 if tile_attention.AMX else 1024

# Start and stop of a block's queries, start and stop of the keys they may see, and what is added to their scores.
Blocks = Callable[[], Iterator[tuple[int, int, int, int, Tensor]]]


def usable(q: Tensor, k: Tensor, dropout: float = 0.0) -> bool:
    """Whether this is the faster form for the queries and keys of `attention.causal_attention`.

    Where the CPU has AMX only the backward is: without a gradient the fused kernel is faster.
    """
    faster = q.dtype == torch.bfloat16 and k.shape[2] <= MOST_KEYS
    if tile_attention.AMX:
        faster = faster and torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
    transformed = not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()
    return q.device.type == "cpu" and (dropout > 0 or (faster and not transformed))


def blocked_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    blocks: Blocks,
    scale: float,
    dropout: float = 0.0,
) -> Tensor:
    """softmax_j(scale · q_i·k_j + bias_ij) v_j. Shapes as in `attention.causal_attention`; differentiable once.

    blocks: called once forwards and once backwards; gives for each block of queries its bias, float32 of shape (1 or B,
    1 or H, queries, keys), which gets no gradient.
    dropout: a weight of the softmax is 0 with this probability, and else 1 / (1 − dropout) times as large.
    """
    return _BlockedAttention.apply(q, k, v, blocks, scale, dropout)


class _BlockedAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        blocks: Blocks,
        scale: float,
        dropout: float,
    ) -> Tensor:
        q, k, v = q.contiguous(), k.contiguous(), v.contiguous()
        ctx.save_for_backward(q, k, v)
        ctx.blocks, ctx.scale, ctx.dropout = blocks, scale, dropout
        ctx.seed = int(torch.randint(2**62, ())) if dropout else 0
        draw = _draws(dropout, ctx.seed)
        keys, values = k.flatten(0, 1), v.flatten(0, 1)  # (B·Hk, S, ·)
        mixed = q.new_empty(*q.shape[:3], v.shape[3])
        with torch.autocast("cpu", enabled=False):
            for start, stop, first, last, weights in _weights(q, keys, blocks, scale):
                block = mixed[:, :, start:stop]
                kept = _without(draw(weights), weights.to(v.dtype))
                block.copy_(torch.bmm(kept, values[:, first:last]).view(block.shape))
        return mixed.div_(1 - dropout) if dropout else mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v = ctx.saved_tensors
        keys, values = k.flatten(0, 1), v.flatten(0, 1)
        grad_q = torch.empty_like(q)
        dtype = _score_dtype(q)
        grad_k, grad_v = (torch.zeros(x.shape, dtype=dtype) for x in (keys, values))  # summed over blocks
        grad = grad / (1 - ctx.dropout) if ctx.dropout else grad
        draw = _draws(ctx.dropout, ctx.seed)
        with torch.autocast("cpu", enabled=False):
            for start, stop, first, last, weights in _weights(q, keys, ctx.blocks, ctx.scale):
                queries, grad_mixed = _rows(q, start, stop, len(keys)), _rows(grad, start, stop, len(keys))
                dropped = draw(weights)
                kept = _without(dropped, weights.to(v.dtype, copy=dropped is not None))
                grad_v[:, first:last] += torch.bmm(kept.transpose(1, 2), grad_mixed)
                grad_weights = _without(dropped, torch.bmm(grad_mixed, values[:, first:last].transpose(1, 2)))
                grad_scores = torch._softmax_backward_data(grad_weights.to(dtype), weights, -1, dtype).to(q.dtype)
                grad_k[:, first:last] += torch.bmm(grad_scores.transpose(1, 2), queries)
                block = grad_q[:, :, start:stop]
                torch.mul(torch.bmm(grad_scores, keys[:, first:last]).view(block.shape), ctx.scale, out=block)
        grad_k, grad_v = (grad_k * ctx.scale).to(k.dtype).view(k.shape), grad_v.to(v.dtype).view(v.shape)
        return grad_q, grad_k, grad_v, None, None, None


def _weights(q: Tensor, keys: Tensor, blocks: Blocks, scale: float) -> Iterator[tuple[int, int, int, int, Tensor]]:
    """The blocks with their softmax (B·Hk, H/Hk · queries, keys) in float32 in place of the bias."""
    queries, keys = q.to(_score_dtype(q)) * scale, keys.to(_score_dtype(q)).transpose(1, 2)
    for start, stop, first, last, bias in blocks():
        scores = torch.bmm(_rows(queries, start, stop, len(keys)), keys[:, :, first:last])
        scores.view(*q.shape[:2], stop - start, last - first).add_(bias)
        yield start, stop, first, last, scores.softmax(dim=-1)


def _draws(dropout: float, seed: int) -> Callable[[Tensor], Tensor | None]:
    """Which weights of each block are dropped, block after block the same for the same seed; None without dropout.

    Drawn as 16 bits each, four times as fast as `bernoulli_`: the probability is rounded to 1/65,536.
    """
    if not dropout:
        return lambda weights: None
    chance = torch.Generator().manual_seed(seed)
    below = round(dropout * 2**16) - 2**15

    def draw(weights: Tensor) -> Tensor:
        words = torch.empty(-(-weights.numel() // 4), dtype=torch.int64).random_(-(2**63), None, generator=chance)
        return (words.view(torch.int16)[: weights.numel()] < below).view(weights.shape)

    return draw


def _without(dropped: Tensor | None, x: Tensor) -> Tensor:
    """Changes x."""
    return x if dropped is None else x.masked_fill_(dropped, 0)


def _rows(x: Tensor, start: int, stop: int, groups: int) -> Tensor:
    """(B, H, T, ·) to (B·Hk, H/Hk · queries, ·): the query heads that read one key head, one below the other."""
    return x[:, :, start:stop].reshape(groups, -1, x.shape[3])


def _score_dtype(q: Tensor) -> torch.dtype:
    return torch.promote_types(q.dtype, torch.float32)
