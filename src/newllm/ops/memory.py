"""Compressive memories (Infini-attention, arXiv 2404.07143): a matrix of associations, written segment by segment.

With σ the feature map of linear attention, a memory is M = Σ σ(k) vᵀ (d, dv) and z = Σ σ(k) (d) over all that was
written. A query reads σ(q) M / (σ(q)·z), a mean of the values weighted by how well their keys fit. The delta rule
writes v − (what k already reads) into M in place of v, so that an association that is known is not written twice;
z takes σ(k) either way, so that what is met again reads as less than its value.

Everything here is in float32 at least: sums over thousands of tokens, added up in bf16, would stop growing.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

# Segments whose memories are in memory at the same time in the parallel form: bounds it to (B, N, H, BLOCK, d, dv).
BLOCK = 16


def read(q: Tensor, matrix: Tensor, normaliser: Tensor) -> tuple[Tensor, Tensor]:
    """What queries find in a memory, and how much of their kind was written.

    Args:
        q: (…, T, d) features σ(q).
        matrix: (…, d, dv).
        normaliser: (…, d).

    Returns:
        σ(q) M / (σ(q)·z) (…, T, dv), zeros from an empty memory; and the mass σ(q)·z (…, T), zero there only.
    """
    mass = (q @ normaliser.unsqueeze(-1)).squeeze(-1)
    return (q @ matrix) / mass.masked_fill(mass == 0, 1).unsqueeze(-1), mass


def write(
    k: Tensor, v: Tensor, matrix: Tensor, normaliser: Tensor, turns: Tensor, *, delta: bool
) -> tuple[Tensor, Tensor]:
    """Writes one segment of each row to one of the row's N memories.

    Args:
        k: (B, H, S, d) features; zeros write nothing.
        v: (B, H, S, dv).
        matrix: (B, N, H, d, dv); normaliser: (B, N, H, d).
        turns: (B,) int64, which memory; −1 for none.
        delta: write v − σ(k) M / (σ(k)·z), what the memory does not already answer.

    Returns:
        matrix and normaliser after it.
    """
    chosen = _one_hot(turns[:, None], matrix.shape[1], matrix.dtype)  # (B, N, 1)
    if delta:
        own = torch.einsum("bni,bnhde->bhde", chosen, matrix)
        own_normaliser = torch.einsum("bni,bnhd->bhd", chosen, normaliser)
        v = v - read(k, own, own_normaliser)[0]
    matrix = matrix + torch.einsum("bni,bhde->bnhde", chosen, k.transpose(2, 3) @ v)
    return matrix, normaliser + torch.einsum("bni,bhd->bnhd", chosen, k.sum(dim=2))


class Found(NamedTuple):
    """What queries find in N memories."""

    reads: Tensor
    """(B, N, H, G, S, dv), see `read`."""
    mass: Tensor
    """(B, N, H, G, S), σ(q)·z: 0 where the memory was empty."""
    normalisers: Tensor
    """(B, N, H, G, d), the z that each segment met."""


def read_segments(
    q: Tensor, k: Tensor, v: Tensor, matrix: Tensor, normaliser: Tensor, turns: Tensor, *, delta: bool, writes: int
) -> tuple[Found, Tensor, Tensor]:
    """Reads N memories with the queries of G segments, each as the segments before it have left them, and writes.

    The linear rule is parallel over segments, in blocks of BLOCK; the delta rule goes from segment to segment.

    Args:
        q, k: (B, H, G, S, d) features.
        v: (B, H, G, S, dv).
        matrix: (B, N, H, d, dv) before the first segment; normaliser: (B, N, H, d).
        turns: (B, G) int64, the memory to which each segment is written; −1 for none.
        writes: the first so many segments are written, and those after them only read.

    Returns:
        what was found; matrix and normaliser after all segments.
    """
    G, found, start = q.shape[2], [], 0
    block = 1 if delta else BLOCK
    while start < G:
        # What comes after the last write meets the same memories, and is read at once.
        stop = min(start + block, G) if start < writes else G
        written = min(stop, writes)
        k_, v_, turns_ = k[:, :, start:written], v[:, :, start:written], turns[:, start:written]
        before, met = matrix.unsqueeze(3), normaliser.unsqueeze(3)  # (B, N, H, 1, d, dv), (B, N, H, 1, d)
        if delta and start < written:
            matrix, normaliser = write(k_[:, :, 0], v_[:, :, 0], matrix, normaliser, turns_[:, 0], delta=True)
        elif start < written:
            chosen = _one_hot(turns_, matrix.shape[1], q.dtype)  # (B, N, s)
            add, add_normaliser = k_.transpose(3, 4) @ v_, k_.sum(dim=3)  # (B, H, s, d, dv), (B, H, s, d)
            # Segment g meets what the segments s < g of its block add: a sum over s with weights 0 and 1.
            earlier = torch.ones(stop - start, written - start, dtype=q.dtype, device=q.device).tril(-1)
            weights = earlier * chosen.unsqueeze(2)  # (B, N, g, s)
            before = before + torch.einsum("bngs,bhsde->bnhgde", weights, add)
            met = met + torch.einsum("bngs,bhsd->bnhgd", weights, add_normaliser)
            matrix = matrix + torch.einsum("bns,bhsde->bnhde", chosen, add)
            normaliser = normaliser + torch.einsum("bns,bhsd->bnhd", chosen, add_normaliser)
        reads, mass = read(q[:, None, :, start:stop], before, met)
        found.append((reads, mass, met.expand(*met.shape[:3], stop - start, -1)))
        start = stop
    return Found(*(torch.cat(part, dim=3) for part in zip(*found, strict=True))), matrix, normaliser


def _one_hot(turns: Tensor, N: int, dtype: torch.dtype) -> Tensor:
    """(B, G) memory indices to (B, N, G) of zeros and ones; −1 is no memory."""
    return F.one_hot(turns + 1, N + 1)[..., 1:].transpose(1, 2).to(dtype)
