"""Tokens of a batch laid side by side into segments, each row's own, and found there again."""

from __future__ import annotations

import torch
from torch import Tensor


def lay_out(x: Tensor, slots: Tensor, size: int) -> Tensor:
    """Puts the tokens of x (B, T, D) at their slots (B, T) into zeros (B, size, D); slot `size` is thrown away."""
    laid = x.new_zeros(x.shape[0], size + 1, x.shape[2])
    return laid.scatter(1, slots[..., None].expand_as(x), x)[:, :size]


def pick(x: Tensor, slots: Tensor) -> Tensor:
    """The tokens of x (B, L, D) at slots (B, T): (B, T, D)."""
    return x.gather(1, slots[..., None].expand(-1, -1, x.shape[2]))


def shift(k: Tensor, before: Tensor, count: Tensor) -> tuple[Tensor, Tensor]:
    """Features k (B, Hm, G, S, d) moved on by one token, after `before` (B, Hm, d), and those of token `count` (B,)."""
    tokens = torch.cat([before.unsqueeze(2), k.flatten(2, 3)], dim=2)  # (B, Hm, 1 + G·S, d)
    last = tokens.take_along_dim(count.view(-1, 1, 1, 1), dim=2).squeeze(2)
    return tokens[:, :, :-1].unflatten(2, k.shape[2:4]), last
