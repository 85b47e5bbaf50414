"""Causal attention in bf16 on a CPU with AMX or AVX-512's bf16, by a kernel of our own; twin: `reference.attention`.

`tile_attention.cpp` computes scores, their softmax and all products in one go for each head, forwards and backwards.
torch's kernel multiplies bf16 at a fraction of the speed of such units, and least well in the backward of short texts.
"""

from __future__ import annotations

import ctypes
import functools
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from newllm.ops import native

SOURCE = Path(__file__).with_name("tile_attention.cpp")
# Constants, which a compiler can follow.
AMX, AVX = (bool(torch.cpu.get_capabilities().get(name)) for name in ("amx_bf16", "avx512_bf16"))
# Above, torch's fused kernel is faster, where the CPU has no tile registers.
MOST_KEYS = 2**31 if AMX else 1024 if AVX else 0


class Strides(ctypes.Structure):
    """`struct Strides` of tile_attention.cpp, field by field."""

    _fields_ = tuple((name, c_int64) for name in ("row", "head", "token"))


class Arguments(ctypes.Structure):
    """`struct Attention` of tile_attention.cpp, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("q", "k", "v", "mixed", "normalisers", "slopes")),
        *((name, Strides) for name in ("q_strides", "k_strides", "v_strides", "mixed_strides")),
        *((name, c_int64) for name in ("B", "H", "key_heads", "T", "S", "d", "dv", "window")),
        ("scale", c_float),
    )


class Gradients(ctypes.Structure):
    """`struct Gradients` of tile_attention.cpp, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("mixed", "q", "k", "v")),
        *((name, Strides) for name in ("mixed_strides", "q_strides", "k_strides", "v_strides")),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels, or None."""
    return native.compiled(SOURCE, load, "attention in bf16")


def load(path: Path) -> ctypes.CDLL:
    """The compiled kernels in the file `path`, with the types of their arguments.

    Raises OSError if the system does not let this process use the unit they are compiled to.
    """
    kernels = ctypes.CDLL(str(path))
    kernels.newllm_attention_forwards.argtypes = [POINTER(Arguments), c_int]
    kernels.newllm_attention_backwards.argtypes = [POINTER(Arguments), POINTER(Gradients), c_int]
    kernels.newllm_attention_forwards.restype = kernels.newllm_attention_backwards.restype = None
    if not kernels.newllm_attention_begins():
        raise OSError("the system does not let this process use AMX")
    return kernels


def usable(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel takes these: `native.plain`, in bf16, the numbers of a vector side by side."""
    return (
        not torch.compiler.is_compiling()
        and k.shape[2] <= MOST_KEYS
        and min(q.numel(), k.numel(), v.numel()) > 0
        and not torch._C._are_functorch_transforms_active()
        and all(x.dtype == torch.bfloat16 and x.stride(3) == 1 for x in (q, k, v))
        and native.plain(q, k, v)
        and library() is not None
    )


def tile_attention(q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, window: int | None, scale: float) -> Tensor:
    """As `attention.causal_attention`, with its arguments; differentiable once.

    q (B, H, T, d), k (B, Hk, S, d) and v (B, Hk, S, dv) are `usable`; slopes (H,) or (1,). Gives (B, H, T, dv).
    """
    (B, H, T, d), (_, Hk, S, dv) = q.shape, v.shape
    assert (k.shape, v.shape) == ((B, Hk, S, d), (B, Hk, S, dv)), (q.shape, k.shape, v.shape)
    assert H % Hk == 0 and 0 < T <= S, (q.shape, k.shape)  # noqa: PT018
    slopes = None if slopes is None else slopes.float().expand(H).contiguous()
    if window is not None and window < S - T + 1:  # what no query sees is not read
        k, v = k[:, :, S - T - window + 1 :], v[:, :, S - T - window + 1 :]
        S = k.shape[2]
    return _TileAttention.apply(q, k, v, slopes, S if window is None else min(window, S), scale)


class _TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q: Tensor, k: Tensor, v: Tensor, slopes: Tensor | None, window: int, scale: float) -> Tensor:
        B, H, T, _ = q.shape
        dv = v.shape[3]
        # Token by token in memory, as the output projection reads it, but no view, which could not be changed in place.
        mixed = q.new_empty_strided((B, H, T, dv), (T * H * dv, dv, H * dv, 1))
        normalisers = q.new_empty(B, H, T, dtype=torch.float32)
        ctx.save_for_backward(q, k, v, normalisers, slopes)
        ctx.window, ctx.scale = window, scale
        kernels = library()
        assert kernels is not None
        arguments = _arguments(q, k, v, mixed, normalisers, slopes, window, scale)
        kernels.newllm_attention_forwards(ctypes.byref(arguments), torch.get_num_threads())
        return mixed

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, normalisers, slopes = ctx.saved_tensors
        grad = grad if grad.stride(3) == 1 else grad.contiguous()
        # As the tensors lie in memory, unless they overlap themselves.
        grads = [x if x.stride(3) == 1 else x.contiguous() for x in map(torch.empty_like, (q, k, v))]
        kernels = library()
        assert kernels is not None
        arguments = _arguments(q, k, v, None, normalisers, slopes, ctx.window, ctx.scale)
        given = (grad, *grads)
        gradients = Gradients(*(x.data_ptr() for x in given), *(Strides(*x.stride()[:3]) for x in given))
        kernels.newllm_attention_backwards(ctypes.byref(arguments), ctypes.byref(gradients), torch.get_num_threads())
        return *grads, None, None, None


def _arguments(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mixed: Tensor | None,
    normalisers: Tensor,
    slopes: Tensor | None,
    window: int,
    scale: float,
) -> Arguments:
    (B, H, T, d), (_, Hk, S, dv) = q.shape, v.shape
    pointers = (None if x is None else x.data_ptr() for x in (q, k, v, mixed, normalisers, slopes))
    strides = (Strides() if x is None else Strides(*x.stride()[:3]) for x in (q, k, v, mixed))
    return Arguments(*pointers, *strides, B, H, Hk, T, S, d, dv, window, scale)
