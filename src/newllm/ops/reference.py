"""Slow, obvious twins of the operations in this package: loops and formulas straight from the papers, for tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    slopes: Tensor | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
) -> Tensor:
    """One query at a time: softmax over the keys it may see. Shapes as in `attention.causal_attention`."""
    B, H, T, d = q.shape
    Hk, S = k.shape[1], k.shape[2]
    rows = []
    for b in range(B):
        places = list(range(S)) if mask is None else mask[b].cumsum(dim=0).tolist()  # in real tokens
        for h in range(H):
            for t in range(T):
                i = S - T + t
                seen = [j for j in range(i + 1) if mask is None or bool(mask[b, j]) or j == i]
                seen = [j for j in seen if window is None or places[i] - places[j] < window]
                scores = []
                for j in seen:
                    score = q[b, h, t] @ k[b, h * Hk // H, j] * (1 / math.sqrt(d) if scale is None else scale)
                    if slopes is not None:
                        score = score - slopes[h if len(slopes) > 1 else 0].to(q.dtype) * (places[i] - places[j])
                    scores.append(score)
                weights = torch.stack(scores).softmax(dim=0)
                rows.append(sum(w * v[b, h * Hk // H, j] for w, j in zip(weights, seen, strict=True)))
    return torch.stack(rows).view(B, H, T, v.shape[-1])  # type: ignore[arg-type]


def rope(x: Tensor, positions: Tensor, rotary_dim: int, base: float) -> Tensor:
    """Rotates the pairs (x_n, x_{n + rotary_dim/2}) by the angle position · base^(−2n/rotary_dim) (arXiv 2104.09864).

    x: (B, H, T, d), positions: (B, T); dimensions from `rotary_dim` on stay as they are.
    """
    out = x.clone()
    half = rotary_dim // 2
    for b in range(x.shape[0]):
        for t in range(x.shape[2]):
            for n in range(half):
                angle = float(positions[b, t]) * base ** (-2 * n / rotary_dim)
                first, second = x[b, :, t, n], x[b, :, t, n + half]
                out[b, :, t, n] = first * math.cos(angle) - second * math.sin(angle)
                out[b, :, t, n + half] = second * math.cos(angle) + first * math.sin(angle)
    return out


def linear_cross_entropy(hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """−log softmax(W h)[target] with all logits in memory. hidden (N, D), weight (V, D), targets (N,) → (N,) nats."""
    logits = hidden @ weight.T
    return logits.logsumexp(dim=-1) - logits.gather(1, targets[:, None]).squeeze(1)


def quantize_and_back(x: Tensor, bits: int, size: int) -> Tensor:
    """What a quantised vector is read as: each `size` numbers in whole steps of their largest / Q. x: (N, d)."""
    Q = 2 ** (bits - 1) - 1
    out = torch.zeros_like(x)
    for row in range(x.shape[0]):
        for start in range(0, x.shape[1], size):
            group = x[row, start : start + size].tolist()
            step = torch.tensor(max(abs(number) for number in group) / Q).to(torch.float16).item()
            for n, number in enumerate(group):
                if step:
                    out[row, start + n] = step * max(-Q, min(Q, round(number / step)))
    return out


def feature_map(x: Tensor) -> Tensor:
    """ELU(x) + 1, number by number."""
    return torch.where(x > 0, x + 1, x.exp())


def linear_attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """One query at a time: the mean of the values up to it, weighted by σ(q)·σ(k). Shapes as the fast form's."""
    rows = []
    for t in range(q.shape[2]):
        weights = feature_map(k[:, :, : t + 1]) @ feature_map(q[:, :, t, :, None])  # (B, H, t + 1, 1)
        rows.append((weights * v[:, :, : t + 1]).sum(dim=2) / weights.sum(dim=2))
    return torch.stack(rows, dim=2)


def write_memory(k: Tensor, v: Tensor, matrix: Tensor, normaliser: Tensor, delta: bool) -> tuple[Tensor, Tensor]:
    """A segment's keys (S, d) and values (S, dv), token by token, into M (d, dv) and z (d): both after it."""
    new_matrix, new_normaliser = matrix, normaliser
    for key, value in zip(feature_map(k), v, strict=True):
        known = read_memory_features(key, matrix, normaliser) if delta else 0
        new_matrix = new_matrix + torch.outer(key, value - known)
        new_normaliser = new_normaliser + key
    return new_matrix, new_normaliser


def read_memory(q: Tensor, matrix: Tensor, normaliser: Tensor) -> Tensor:
    """What one query (d) finds in a memory M (d, dv), z (d): (dv); zeros in an empty one."""
    return read_memory_features(feature_map(q), matrix, normaliser)


def read_memory_features(feature: Tensor, matrix: Tensor, normaliser: Tensor) -> Tensor:
    return feature @ matrix / (feature @ normaliser) if normaliser.any() else torch.zeros_like(matrix[0])


def linear_scan(a: Tensor, b: Tensor, before: Tensor) -> Tensor:
    """h_t = a_t h_{t−1} + b_t, one token after the other. Shapes as the fast form's."""
    h = [before]
    for t in range(a.shape[1]):
        h.append(a[:, t] * h[-1] + b[:, t])
    return torch.stack(h[1:], dim=1)
