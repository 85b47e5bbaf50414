"""Causal linear attention, and the feature map that it shares with the compressive memories."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# Queries that meet keys one by one; what is farther back comes as a sum. At d = 64 the two cost about the same.
CHUNK = 64


def feature_map(x: Tensor) -> Tensor:
    """σ(x) = ELU(x) + 1 (arXiv 2006.16236), positive, so that sums of σ(q)·σ(k) may stand in a denominator.

    exp(min(x, 0)) + max(x, 0): ELU itself is −1 for x < −17 in float32, and the sum no longer positive.
    """
    return x.clamp(max=0).exp() + F.relu(x)


def causal_linear_attention(q: Tensor, k: Tensor, v: Tensor, *, chunk: int = CHUNK) -> Tensor:
    """Σ_j (σ(q_i)·σ(k_j)) v_j / Σ_j σ(q_i)·σ(k_j) over j ≤ i, in the dtype of q; sums in float32 at least.

    Within a chunk the scores are made one by one, of the chunks before only Σ σ(k_j) v_jᵀ is read: T·chunk scores and
    T / chunk sums of d·dv numbers are in memory, nothing of size T².

    Args:
        q, k: (B, H, T, d).
        v: (B, H, T, dv).
        chunk: tokens C of a chunk; another value gives the same numbers to rounding.

    Returns:
        (B, H, T, dv).
    """
    dtype, T = q.dtype, q.shape[2]
    with torch.autocast(q.device.type, enabled=False):
        q, k, v = (x.to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
        q, k = feature_map(q), feature_map(k)
        count = -(-T // chunk)
        padding = count * chunk - T
        if padding:
            q, k, v = (F.pad(x, (0, 0, 0, padding)) for x in (q, k, v))  # keys of zeros weigh nothing
        q, k, v = (x.unflatten(2, (count, chunk)) for x in (q, k, v))  # (B, H, n, C, ·)
        scores = (q @ k.transpose(3, 4)).tril()  # (B, H, n, C, C)
        above, below = scores @ v, scores.sum(dim=-1, keepdim=True)
        if count > 1:
            sums = (k[:, :, :-1].transpose(3, 4) @ v[:, :, :-1]).cumsum(dim=2)  # (B, H, n − 1, d, dv)
            normalisers = k[:, :, :-1].sum(dim=3).cumsum(dim=2)  # (B, H, n − 1, d)
            above = above + F.pad(q[:, :, 1:] @ sums, (0, 0, 0, 0, 1, 0))
            below = below + F.pad(q[:, :, 1:] @ normalisers.unsqueeze(-1), (0, 0, 0, 0, 1, 0))
        below = below.masked_fill(below == 0, 1)  # queries of zeros: padding behind the text, or all features underflow
        return (above / below).flatten(2, 3)[:, :, :T].to(dtype)
