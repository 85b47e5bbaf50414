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
from dataclasses import dataclass

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


@dataclass(frozen=True)
class Quantized:
    """Numbers (…, size) as they are stored. `ops.attention` reads keys and values of this kind where they lie."""

    codes: Tensor
    scales: Tensor
    bits: int
    size: int

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self.codes.shape[:-1], self.size))

    def numbers(self, dtype: torch.dtype) -> Tensor:
        return dequantize(self.codes, self.scales, self.bits, self.size, dtype)


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
        codes: (…, d) int8; with 4 bits (…, ⌈d/2⌉) uint8, see `_pack`; a group behind the other.
        scales: (…, groups(d)) float16.
    """
    Q, d = largest_code(bits), x.shape[-1]
    exact = x.to(torch.promote_types(x.dtype, torch.float32))
    codes = torch.empty(*x.shape[:-1], math.ceil(d * bits / 8), dtype=CODE_DTYPES[bits], device=x.device)
    scales = torch.empty(*x.shape[:-1], groups(d), dtype=torch.float16, device=x.device)
    for s, c, numbers in _grouped(d, (scales, 1), (codes, GROUP * bits // 8), (exact, GROUP)):
        s.copy_((numbers.abs().amax(dim=-1, keepdim=True) / Q).clamp(*SCALE_RANGE))
        # Divided by the scale that is kept: its own rounding adds no error, but may lead just beyond Q.
        whole = (numbers / s).round().clamp(-Q, Q)
        c.copy_(_pack(whole) if bits == 4 else whole)
    return codes, scales


def dequantize(codes: Tensor, scales: Tensor, bits: int, size: int, dtype: torch.dtype) -> Tensor:
    """The numbers (…, S, size) in `dtype` that codes (…, S, ·) and scales (…, S, n) stand for, a block at a time."""
    numbers = torch.empty(*codes.shape[:-1], size, dtype=dtype, device=codes.device)
    exact = torch.promote_types(dtype, torch.float32)
    tokens = max(1, BLOCK * codes.shape[-2] // numbers.numel())
    blocks = (x.split(tokens, dim=-2) for x in (scales, codes, numbers))
    for block_scales, block_codes, block in zip(*blocks, strict=True):
        for s, c, out in _grouped(size, (block_scales, 1), (block_codes, GROUP * bits // 8), (block, GROUP)):
            out.copy_((_unpack(c, out.shape[-1]) if bits == 4 else c) * s.to(exact))
    return numbers


def _grouped(size: int, *vectors: tuple[Tensor, int]) -> Iterator[tuple[Tensor, ...]]:
    """Views (…, k, ·) of vectors, each with what a full group takes of it: the full groups, then a shorter last one."""
    full, rest = divmod(size, GROUP)
    if full:
        yield tuple(x[..., : full * width].unflatten(-1, (full, width)) for x, width in vectors)
    if rest:
        yield tuple(x[..., None, full * width :] for x, width in vectors)


def _pack(codes: Tensor) -> Tensor:
    """A group of g codes of 4 bits (…, g) into (…, ⌈g/2⌉) bytes: number i in the lower half of byte i, number ⌈g/2⌉ + i
    in the upper one, so that half a group comes of one operation with a vector of bytes."""
    shifted = (F.pad(codes, (0, codes.shape[-1] % 2)) + 8).to(torch.uint8)
    low, high = shifted.chunk(2, dim=-1)
    return low | (high << 4)


def _unpack(packed: Tensor, size: int) -> Tensor:
    """(…, size) int8 codes of bytes packed by `_pack`."""
    return torch.cat([packed & 15, packed >> 4], dim=-1)[..., :size].to(torch.int8) - 8
