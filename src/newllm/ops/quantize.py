"""Numbers stored as small integers with a scale for each group: what quantised caches hold.

A vector of d numbers is cut into groups of 32, the last of them shorter where 32 does not divide d. Group g holds whole
numbers c with |c| ≤ Q and one float16 scale s:

    s_g = max |x_g| / Q,    c = round(x / s_g),    x̂ = s_g · c,    Q = 127 (int8) or 7 (int4)

No number depends on another vector, so what was written once never changes, however the text is cut into chunks.
The twin is `reference.quantize_and_back`.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

# Bits of a code, by the name of the precision.
BITS = {"int8": 8, "int4": 4}
# What codes are stored in, by their bits.
CODE_DTYPES = {8: torch.int8, 4: torch.uint8}
# Numbers that share a scale: one outlier spoils the steps of its own group only.
GROUP = 32
# Numbers dequantised at once: what is needed only in between stays small, whatever the length of the cache.
BLOCK = 2**19
# Float16's smallest number and its largest: where scales end.
SCALE_RANGE = (2.0**-24, 65504.0)


def groups(size: int) -> int:
    """Groups of a vector of `size` numbers."""
    return math.ceil(size / GROUP)


def largest_code(bits: int) -> int:
    """Q: symmetric, so that 0 is stored as 0 and the sign costs no accuracy."""
    return 2 ** (bits - 1) - 1


def vector_bytes(size: int, bits: int) -> int:
    """Bytes of one vector of `size` numbers, its float16 scales included.

    That is 1 + 2/32 a number (int8) or 1/2 + 2/32 (int4) where groups are full; from 16 numbers on, scales add 2/16 at
    most, whatever the size.
    """
    return math.ceil(size * bits / 8) + 2 * groups(size)


def quantize(x: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Codes and scales of x (…, d).

    The error of a number is at most half a scale, plus 4e-6 where scales fall below float16's normal range (6e-5).

    Returns:
        codes: (…, d) int8; with 4 bits (…, ⌈d/2⌉) uint8, see `_pack`.
        scales: (…, groups(d)) float16.
    """
    Q = largest_code(bits)
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    codes = torch.empty_like(exact, dtype=torch.int8)
    scales = exact.new_empty(*x.shape[:-1], groups(x.shape[-1]), dtype=torch.float16)
    for s, numbers, c in _grouped(scales, exact, codes):
        s.copy_((numbers.abs().amax(dim=-1, keepdim=True) / Q).clamp(*SCALE_RANGE))
        # Divided by the scale that is kept: its own rounding adds no error, but may lead just beyond Q.
        c.copy_((numbers / s).round().clamp(-Q, Q))
    return (_pack(codes) if bits == 4 else codes), scales


def dequantize(codes: Tensor, scales: Tensor, bits: int, size: int, dtype: torch.dtype) -> Tensor:
    """The numbers (…, S, size) in `dtype` that codes (…, S, ·) and scales (…, S, n) stand for, a block at a time."""
    numbers = torch.empty(*codes.shape[:-1], size, dtype=dtype, device=codes.device)
    exact = torch.promote_types(dtype, torch.float32)
    tokens = max(1, BLOCK * codes.shape[-2] // numbers.numel())
    for block_codes, block_scales, block in zip(
        *(x.split(tokens, dim=-2) for x in (codes, scales, numbers)), strict=True
    ):
        whole = _unpack(block_codes, size) if bits == 4 else block_codes
        for s, c, out in _grouped(block_scales, whole, block):
            out.copy_(c * s.to(exact))
    return numbers


def _grouped(scales: Tensor, *vectors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Views (…, k, 1) of scales (…, n) and (…, k, g) of vectors (…, d): the full groups, then a shorter last one."""
    full = vectors[0].shape[-1] // GROUP
    for count, part, numbers in (
        (full, slice(full), slice(full * GROUP)),
        (scales.shape[-1] - full, slice(full, None), slice(full * GROUP, None)),
    ):
        if count:
            yield scales[..., part, None], *(x[..., numbers].unflatten(-1, (count, -1)) for x in vectors)


def _pack(codes: Tensor) -> Tensor:
    """(…, d) codes of 4 bits into (…, ⌈d/2⌉) bytes: number i in the low half of byte i, number ⌈d/2⌉ + i above it."""
    shifted = (F.pad(codes, (0, codes.shape[-1] % 2)) + 8).to(torch.uint8)
    low, high = shifted.chunk(2, dim=-1)
    return low | (high << 4)


def _unpack(packed: Tensor, size: int) -> Tensor:
    """(…, size) int8 codes of bytes packed by `_pack`."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)[..., :size].to(torch.int8) - 8
