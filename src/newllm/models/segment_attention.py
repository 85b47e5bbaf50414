"""Causal attention within segments, softmax or linear, of the layers that remember earlier segments in another way."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from newllm.models.positions import NoPosition
from newllm.ops import reference
from newllm.ops.attention import causal_attention
from newllm.ops.linear_attention import causal_linear_attention, feature_map

LOCAL = ("softmax", "linear")


@dataclass(frozen=True)
class SegmentAttention:
    """H heads of size d over queries, keys and values of width D = H·d. Positions are counted within the segment."""

    num_heads: int
    head_size: int
    position: NoPosition
    """Of the softmax; linear attention has none."""
    kind: str
    """One of LOCAL."""

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Each token attends to its segment up to itself: (B, G, S, D) each. A text sees no slots behind it."""
        shape = q.shape
        q, k, v = (self._heads(x.flatten(0, 1)) for x in (q, k, v))  # (B·G, H, S, d)
        if self.kind == "linear":
            mixed = causal_linear_attention(q, k, v)
        else:
            slots = torch.arange(shape[2], device=q.device)[None]
            q, k = self.position.rotate(q, slots), self.position.rotate(k, slots)
            mixed = causal_attention(q, k, v, slopes=self.position.head_slopes(self.num_heads, q.device))
        return mixed.transpose(1, 2).reshape(shape)

    def last(self, q: Tensor, k: Tensor, v: Tensor, held: Tensor) -> Tensor:
        """The last token alone, q (B, 1, D), of a segment that fills its slots (B, S, D) from the end: (B, 1, D).

        held: (B, S) bool, the slots that are filled.
        """
        q, k, v = (self._heads(x) for x in (q, k, v))  # (B, H, 1, d), (B, H, S, d)
        if self.kind == "linear":
            dtype = torch.promote_types(q.dtype, torch.float32)
            weights = feature_map(q.to(dtype)) @ feature_map(k.to(dtype)).transpose(2, 3)  # (B, H, 1, S)
            weights = weights * held[:, None, None]
            total = weights.sum(dim=-1, keepdim=True)
            # 0 where all features of the query underflow, as in `whole`
            mixed = (weights @ v.to(dtype) / total.masked_fill(total == 0, 1)).to(q.dtype)
        else:
            slots = torch.arange(k.shape[2], device=q.device)[None]
            q, k = self.position.rotate(q, slots[:, -1:]), self.position.rotate(k, slots)
            mixed = causal_attention(q, k, v, slopes=self.position.head_slopes(self.num_heads, q.device), mask=held)
        return mixed.transpose(1, 2).flatten(2)

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """The naive twin of `whole` for one segment (n, D)."""
        q, k, v = (self._heads(x[None]) for x in (q, k, v))
        if self.kind == "linear":
            mixed = reference.linear_attention(q, k, v)
        else:
            slots = torch.arange(q.shape[2], device=q.device)[None]
            q, k = self.position.reference_rotate(q, slots), self.position.reference_rotate(k, slots)
            mixed = reference.attention(q, k, v, slopes=self.position.head_slopes(self.num_heads, q.device))
        return mixed[0].transpose(0, 1).flatten(1)

    def _heads(self, x: Tensor) -> Tensor:
        """(B, T, D) to (B, H, T, d)."""
        return x.unflatten(-1, (self.num_heads, self.head_size)).transpose(1, 2)
