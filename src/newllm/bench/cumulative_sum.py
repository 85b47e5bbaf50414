"""Causal linear attention as a cumulative sum of outer products: what a compressive layer is measured against."""

from __future__ import annotations

import torch
from torch import Tensor

from newllm.models.layers.compressive import CompressiveLayer
from newllm.models.segment_attention import SegmentAttention
from newllm.ops.linear_attention import feature_map


class CumulativeSumAttention(SegmentAttention):
    """Linear attention within segments as its formula reads, with a sum over the past for every token.

    S_t = Σ_{j ≤ t} σ(k_j) v_jᵀ and z_t = Σ_{j ≤ t} σ(k_j) give σ(q_t) S_t / (σ(q_t)·z_t) (arXiv 2006.16236). The
    products of all tokens are in memory at once, (B·G, H, S, d, d): B·T·D²/H numbers. Each is overwritten by its sum,
    so that they are there once and not twice: what is measured against should lose by its formula, not by its style.
    """

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        shape, dtype = q.shape, q.dtype
        q, k, v = (self._heads(x.flatten(0, 1)).to(torch.promote_types(dtype, torch.float32)) for x in (q, k, v))
        q, k, v = (x.contiguous() for x in (q, k, v))  # otherwise the sums are copied to meet the queries
        q, k = feature_map(q), feature_map(k)  # (B·G, H, S, d)
        products = k.unsqueeze(-1) * v.unsqueeze(-2)  # (B·G, H, S, d, d)
        sums, normalisers = products.cumsum_(dim=2), k.cumsum(dim=2)
        mixed = (q.unsqueeze(-2) @ sums).squeeze(-2) / (q * normalisers).sum(dim=-1, keepdim=True)
        return mixed.to(dtype).transpose(1, 2).reshape(shape)


def as_cumulative_sum(layer: CompressiveLayer) -> CompressiveLayer:
    """The same layer, changed in place: the same weights, memories and numbers, its linear attention as above."""
    layer.attention = CumulativeSumAttention(**vars(layer.attention))
    return layer
