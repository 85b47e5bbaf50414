"""Causal softmax attention in its fast forms; the obvious twin is `reference.attention`."""

from __future__ import annotations

import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from newllm.ops import blocked_attention, native, tile_attention
from newllm.ops.quantize import Quantized

# Queries of one block of the parallel form: skips keys that no query of it can see, and bounds the additive mask to
# BLOCK · S numbers, for every head where slopes are geometric, and for every row where there is padding.
BLOCK = 512
# Up to this many queries, two matrix products: scaled_dot_product_attention is slow for few queries on a CPU.
DIRECT_QUERIES = 8


def causal_attention(
    q: Tensor,
    k: Tensor | Quantized,
    v: Tensor | Quantized,
    *,
    slopes: Tensor | None = None,
    window: int | None = None,
    mask: Tensor | None = None,
    scale: float | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """softmax_j(scale · q_i·k_j − m_h·(i − j)) v_j over j ≤ i.

    The T queries are the last T of S tokens: query t is token i = S − T + t. The query is the row, the key the column.
    The distance i − j is in real tokens: padding between two of them, where a row reads on after it, takes no place.

    Args:
        q: (B, H, T, d) queries.
        k: (B, Hk, S, d) keys; Hk divides H, and query head h reads key head h·Hk // H (grouped-query attention,
            arXiv 2305.13245).
        v: (B, Hk, S, dv) values. Keys and values as a cache stores them are read where they lie if one query of a row
            decodes on a CPU, and else made numbers of the dtype of q first.
        slopes: (H,) or (1,) float32 slopes m of ALiBi (arXiv 2108.12409), in nats per token; None for no bias.
        window: a query sees at most this many tokens, itself included; None for all.
        mask: (B, S) bool, True for real tokens, False for padding; None if all are real.
        scale: of the scores; default 1 / √d.
        dropout: in training, a weight of the softmax is 0 with this probability, and else 1 / (1 − dropout) times as
            large.

    Returns:
        (B, H, T, dv) in the dtype of q. The row of a padded query is finite and without meaning.
    """
    T, S = q.shape[2], k.shape[2]
    if T == 1 and not dropout and native.reads(q, k, v):
        each = None if slopes is None else slopes.float().expand(q.shape[1])
        first, distances = _seen(S, window, mask)
        return native.attention(q, k, v, each, distances, first, q.shape[3] ** -0.5 if scale is None else scale)
    one = k is v  # a latent is both
    k = k.numbers(q.dtype) if isinstance(k, Quantized) else k
    v = k if one else v.numbers(q.dtype) if isinstance(v, Quantized) else v
    if T <= DIRECT_QUERIES and not dropout:
        return _direct(q, k, v, slopes, window, mask, scale)
    scale = q.shape[3] ** -0.5 if scale is None else scale
    if mask is None and not dropout and tile_attention.usable(q, k, v):
        return tile_attention.tile_attention(q, k, v, slopes, window, scale)
    if blocked_attention.usable(q, k, dropout):
        blocks = functools.partial(_blocks, T, S, blocked_attention.QUERIES, slopes, window, mask, q)
        return blocked_attention.blocked_attention(q, k, v, blocks, scale, dropout)
    if slopes is None and mask is None and T == S and (window is None or window >= S):
        return _sdpa(q, k, v, scale, is_causal=True, dropout=dropout)
    parts = [
        _sdpa(q[:, :, start:stop], k[:, :, first:last], v[:, :, first:last], scale, attn_mask=bias, dropout=dropout)
        for start, stop, first, last, bias in _blocks(T, S, BLOCK, slopes, window, mask, q)
    ]
    return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


def _blocks(
    T: int, S: int, size: int, slopes: Tensor | None, window: int | None, mask: Tensor | None, like: Tensor
) -> Iterator[tuple[int, int, int, int, Tensor]]:
    """Blocks of `size` queries: start and stop of the queries, start and stop of the keys they see, additive mask."""
    for start in range(0, T, size):
        stop = min(start + size, T)
        last = S - T + stop  # keys behind the block's last query are invisible to all of it
        first = 0 if window is None else _first_seen(S - T + start, window, mask)
        seen = None if mask is None else mask[:, first:last]
        yield start, stop, first, last, additive_mask(stop - start, last - first, slopes, window, seen, like)


def additive_mask(
    T: int, S: int, slopes: Tensor | None, window: int | None, mask: Tensor | None, like: Tensor
) -> Tensor:
    """What is added to the scores of T queries at the end of S keys: (1 or B, 1 or H, T, S), −inf where invisible.

    Float32 (float64 for float64 models): a bias of hundreds of nats rounded to bf16 would be off by whole nats.
    """
    slots = torch.arange(S, device=like.device)
    after = slots[S - T :, None] - slots  # (T, S)
    visible = after >= 0
    distance = after[None, None]  # i − j
    if mask is not None:
        # A padded token sees itself, so that no row of the softmax is empty.
        visible = visible & (mask[:, None, None] | (after == 0))
        places = mask.cumsum(dim=1)
        distance = (places[:, S - T :, None] - places[:, None])[:, None]  # (B, 1, T, S)
    if window is not None:
        visible = visible & (distance < window)
    dtype = torch.promote_types(like.dtype, torch.float32)
    bias = torch.zeros(1, 1, T, S, dtype=dtype, device=like.device)
    if slopes is not None:
        bias = -slopes.to(dtype)[:, None, None] * distance  # (1 or B, 1 or H, T, S)
    return bias.masked_fill(~visible, float("-inf"))


def _first_seen(query: int, window: int, mask: Tensor | None) -> int:
    """The first key that a query of any row sees, or one before it."""
    if mask is None:
        return max(0, query - window + 1)
    places = mask.cumsum(dim=1)
    return int((places <= places[:, query, None] - window).sum(dim=1).min())


def _sdpa(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    scale: float | None,
    *,
    attn_mask: Tensor | None = None,
    is_causal: bool = False,
    dropout: float = 0.0,
) -> Tensor:
    dtype, d, dv = q.dtype, q.shape[3], v.shape[3]
    if d != dv:
        # The fused kernel wants one width; without it all scores would be in memory at once. Zeros change nothing.
        width = max(d, dv)
        q, k, v = (x if x.shape[3] == width else F.pad(x, (0, width - x.shape[3])) for x in (q, k, v))
        scale = d**-0.5 if scale is None else scale
        mixed = _sdpa(q, k, v, scale, attn_mask=attn_mask, is_causal=is_causal, dropout=dropout)
        return mixed if dv == width else mixed[..., :dv]
    if attn_mask is not None and q.device.type != "cpu":
        # The kernels of other devices want the mask in the dtype of q, and a mask rounded to bf16 is no option.
        q, k, v = (x.to(attn_mask.dtype) for x in (q, k, v))
    # Autocast would round the float32 mask to bf16; q, k and v already have their dtype.
    with torch.autocast(q.device.type, enabled=False):
        mixed = F.scaled_dot_product_attention(
            q,
            k,
            v,
            attn_mask=attn_mask,
            dropout_p=dropout,
            is_causal=is_causal,
            scale=scale,
            enable_gqa=q.shape[1] != k.shape[1],
        )
    return mixed.to(dtype)


def _direct(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    slopes: Tensor | None,
    window: int | None,
    mask: Tensor | None,
    scale: float | None,
) -> Tensor:
    """Few queries, many keys: two matrix products, query heads of one key head stacked as rows."""
    B, H, T, d = q.shape
    Hk, S, dv = k.shape[1], k.shape[2], v.shape[3]
    scale = d**-0.5 if scale is None else scale
    k, v, start = _whole_buffers(k, v)
    C, stop = k.shape[2], start + S  # the S tokens stand at [start, stop) of C
    rows = q.reshape(B * Hk, H // Hk * T, d) * scale
    with torch.autocast(q.device.type, enabled=False):
        # Three dimensions: with four, a bf16 product of a single key head takes three times as long on a CPU.
        scores = torch.bmm(rows, k.reshape(B * Hk, C, d).transpose(1, 2)).view(B, H, T, C)
        scores = scores.to(torch.promote_types(q.dtype, torch.float32))
        only_slopes = T == 1 and mask is None
        if only_slopes and slopes is not None:
            distances = _distances(stop, C, scores.dtype, scores.device)
            scores = torch.addcmul(scores, slopes.to(scores.dtype)[:, None, None], distances, value=-1)
        if C > S:
            scores[..., :start] = scores[..., stop:] = float("-inf")
        if T > 1 or mask is not None or (window is not None and window < S):
            bias = additive_mask(T, S, None if only_slopes else slopes, window, mask, q)
            scores = scores + bias if C == S else scores + F.pad(bias, (start, C - stop))
        weights = scores.softmax(dim=-1).to(v.dtype).view(B * Hk, H // Hk * T, C)
        return torch.bmm(weights, v.reshape(B * Hk, C, dv)).view(B, H, T, dv)


def _seen(S: int, window: int | None, mask: Tensor | None) -> tuple[int, Tensor | None]:
    """The first token that the last one sees; and its distances (B, S), −1 for those unseen, or None for S − 1 − j."""
    if mask is None:
        return (0 if window is None else max(0, S - window)), None
    places = mask.cumsum(dim=1)
    distances = (places[:, -1:] - places).float()
    seen = mask.clone()
    seen[:, -1] = True
    if window is not None:
        seen &= distances < window
    return 0, distances.masked_fill(~seen, -1.0)


def _distances(stop: int, C: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """stop − 1 − j for the columns j = 0 … C − 1, a view of a table that is made once."""
    reach = 1 << (max(stop, C) - 1).bit_length()
    table = _distance_table(reach, dtype, device)
    return table[reach - stop : reach - stop + C]


@functools.lru_cache(maxsize=8)
def _distance_table(reach: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """reach − 1 down to −reach."""
    with torch.inference_mode(False):
        return torch.arange(reach - 1, -reach - 1, -1, dtype=dtype, device=device)


def _whole_buffers(k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, int]:
    """k and v (B, N, S, ·), or, if they are views of the tokens [start, start + S) of longer buffers, those and start.

    On a CPU a product of bf16 matrices copies an operand whose heads do not lie close together, which takes longer than
    to multiply with a quarter more tokens; and for every new length it compiles and keeps a kernel, a megabyte and a
    millisecond for each token decoded, where buffers change their length only as they grow. What else stands in the
    buffers must be finite: it is multiplied by 0.
    """
    if k.device.type != "cpu" or k.dtype == torch.float32 or k.requires_grad:
        return k, v, 0
    wholes, starts = [], []
    for x in (k, v):
        B, N, S, d = x.shape
        capacity = _capacity(x)
        # A view of something much longer is no view of a buffer.
        if not S < capacity <= 2 * S or x.stride()[2:] != (d, 1) or (B > 1 and x.stride(0) != N * capacity * d):
            return k, v, 0
        starts.append(x.storage_offset() % (capacity * d) // d)
        first = x.storage_offset() - starts[-1] * d
        wholes.append(x.as_strided((B, N, capacity, d), (N * capacity * d, capacity * d, d, 1), first))
    return (wholes[0], wholes[1], starts[0]) if starts[0] == starts[1] else (k, v, 0)


def _capacity(x: Tensor) -> int:
    """Tokens for which there is room between one head or row and the next; after a single one, all the rest."""
    B, N, _, d = x.shape
    if N > 1:
        return x.stride(1) // d
    return (x.stride(0) if B > 1 else x.untyped_storage().nbytes() // x.element_size()) // d
