"""Tokens of a batch laid side by side into segments, each row's own, and found there again.

Whole tokens are copied, in a flat batch: scatter and gather would look up every number by itself, which takes several
times as long.
"""

from __future__ import annotations

import torch
from torch import Tensor


def lay_out(x: Tensor, slots: Tensor, size: int) -> Tensor:
    """Puts the tokens of x (B, T, D) at their slots (B, T) into zeros (B, size, D); slot `size` is thrown away."""
    B, _, D = x.shape
    laid = x.new_zeros(B * (size + 1), D).index_copy(0, _flat(slots, size + 1), x.flatten(0, 1))
    return laid.view(B, size + 1, D)[:, :size]


def pick(x: Tensor, slots: Tensor) -> Tensor:
    """The tokens of x (B, L, D) at slots (B, T): (B, T, D)."""
    return x.flatten(0, 1).index_select(0, _flat(slots, x.shape[1])).view(*slots.shape, x.shape[2])


def _flat(slots: Tensor, length: int) -> Tensor:
    """Slots (B, T) of rows of so many, counted through the batch: (B·T)."""
    return (slots + torch.arange(len(slots), device=slots.device)[:, None] * length).flatten()


def shift(k: Tensor, before: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Features k (B, Hm, G, S, d) moved on by one token, after `before` (B, Hm, d), and those of token `count` (B,)."""
    tokens = torch.cat([before.unsqueeze(2), k.flatten(2, 3)], dim=2)  # (B, Hm, 1 + G·S, d)
    last = tokens.take_along_dim(count.view(-1, 1, 1, 1), dim=2).squeeze(2)
    return tokens[:, :, :-1].unflatten(2, k.shape[2:4]), last
