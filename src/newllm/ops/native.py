"""Our own kernels for a CPU: compiled when first needed, kept for the next process.

`decode.cpp` is for decoding, `cross_entropy.cpp` for the losses of training and reading in bf16; `tile_attention.py`
has a third. They need a C++ compiler (GCC or Clang with OpenMP; $CXX, c++, g++ or clang++). Without one, or with
NEWLLM_NATIVE=0, `library()` and `loss_library()` are None and callers take torch's own operators, which are slower.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from ctypes import POINTER, c_float, c_int, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor
from torch.autograd import forward_ad

from newllm.ops.quantize import Quantized
from newllm.paths import cache_folder

DECODE, CROSS_ENTROPY = (Path(__file__).with_name(name) for name in ("decode.cpp", "cross_entropy.cpp"))
FLAGS = ("-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-Wno-psabi")
DTYPES = (torch.float32, torch.bfloat16)
PLAIN = (Tensor, torch.nn.Parameter)  # other kinds of tensors have no memory of their own, or not this meaning

logger = logging.getLogger(__name__)


class Stored(ctypes.Structure):
    """`struct Stored` of decode.cpp, field by field."""

    _fields_ = (
        *((name, c_void_p) for name in ("numbers", "scales")),
        *((name, c_int64) for name in ("row", "head", "token", "scales_row", "scales_head", "scales_token")),
    )


class AttentionArguments(ctypes.Structure):
    """`struct Attention` of decode.cpp, field by field."""

    _fields_ = (
        ("q", c_void_p),
        *((name, Stored) for name in ("k", "v")),
        *((name, c_void_p) for name in ("slopes", "distances", "out")),
        *((name, c_int64) for name in ("B", "H", "Hk", "S", "d", "dv", "first")),
        ("scale", c_float),
    )


@functools.cache
def library() -> ctypes.CDLL | None:
    """The compiled kernels of decoding, or None."""
    return compiled(DECODE, load, "decoding")


@functools.cache
def loss_library() -> ctypes.CDLL | None:
    """The compiled kernel of losses, or None."""
    return compiled(CROSS_ENTROPY, load_loss, "the loss in bf16")


def compiled(source: Path, load: Callable[[Path], ctypes.CDLL], what: str) -> ctypes.CDLL | None:
    """The kernels of `source`, compiled if they are not there, or None, which is told once: `what` is slower then."""
    if os.environ.get("NEWLLM_NATIVE") == "0":
        return None
    try:
        return load(build(source, cache_folder() / "kernels"))
    except (OSError, subprocess.SubprocessError) as error:
        # Of a compiler that failed its own words; of one that took too long there may be bytes.
        said = getattr(error, "stderr", None)
        reason = said if isinstance(said, str) and said else str(error)
        reason = " ".join(reason.split())[:300]
        logger.warning("%s takes torch's own operators, which are slower: %s", what, reason)
        return None


def load(path: Path) -> ctypes.CDLL:
    """The compiled kernels of decode.cpp in the file `path`, with the types of their arguments."""
    kernels = ctypes.CDLL(str(path))
    kernels.newllm_linear.argtypes = [
        *(c_int, c_void_p, c_int64, c_int64),
        *(c_void_p, c_void_p, c_int64, c_void_p, c_int),
    ]
    kernels.newllm_attention.argtypes = [c_int, POINTER(AttentionArguments), c_int]
    kernels.newllm_linear.restype = kernels.newllm_attention.restype = None
    return kernels


def load_loss(path: Path) -> ctypes.CDLL:
    """As `load`, of cross_entropy.cpp."""
    kernels = ctypes.CDLL(str(path))
    kernels.newllm_cross_entropy.argtypes = [c_void_p, c_int64, c_int64, c_void_p, c_void_p, c_int, c_int]
    kernels.newllm_cross_entropy.restype = None
    return kernels


def build(source: Path, folder: Path, flags: tuple[str, ...] = FLAGS) -> Path:
    """Compiles `source`, unless a file of the same sources, compiler, flags and processor is there; its path.

    Raises:
        OSError: no compiler, or the folder cannot be written.
        subprocess.SubprocessError: it does not compile.
    """
    names = (os.environ.get("CXX"), "c++", "g++", "clang++")
    compiler = next((path for name in names if name and (path := shutil.which(name))), None)
    if compiler is None:
        raise OSError("no C++ compiler is installed (set CXX to one)")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True, check=True, timeout=60).stdout
    sources = (path.read_text() for path in (source, *sorted(source.parent.glob("*.h"))))
    key = "\n".join((*sources, version, *flags, _processor()))
    target = folder / f"{source.stem}-{hashlib.sha256(key.encode()).hexdigest()[:16]}.so"
    if not target.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        # Under a name of its own first: another process may be at the same, and one may be killed.
        handle, temporary = tempfile.mkstemp(suffix=".so", dir=folder)
        os.close(handle)
        try:
            command = [compiler, *flags, str(source), "-o", temporary]
            subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
            os.replace(temporary, target)
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
    return target


def _processor() -> str:
    """What -march=native depends on: a folder may be shared by machines."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features")):
                return line
    return platform.machine() + platform.processor()


def usable(*tensors: Tensor) -> bool:
    """Whether the kernels of decoding take these tensors, all of one dtype, here and now.

    They are `plain`, and no gradient is wanted of them.
    """
    first = tensors[0]
    return (
        first.dtype in DTYPES
        and all(x.dtype == first.dtype for x in tensors)
        and not torch.is_grad_enabled()
        and plain(*tensors)
        and library() is not None
    )


def plain(*tensors: Tensor) -> bool:
    """Whether these are plain CPU tensors, and nothing looks on that would not see what a kernel writes.

    Neither forward mode, nor a tracer, nor a transform of torch.func, nor a mode that sees every operator.
    """
    return (
        all(type(x) in PLAIN and x.device.type == "cpu" for x in tensors)
        and not torch._C._len_torch_dispatch_stack()
        and not torch.compiler.is_compiling()
        and forward_ad._current_level < 0  # torch.no_grad leaves forward mode on
        and not torch.jit.is_tracing()
        and not any(map(torch._C._functorch.is_functorch_wrapped_tensor, tensors))
    )


def takes_logits(logits: Tensor, targets: Tensor) -> bool:
    """Whether `cross_entropy` takes these: `plain`, (R, V) in bf16 without gaps and (R,) in int64."""
    return (
        (logits.dtype, targets.dtype) == (torch.bfloat16, torch.int64)
        and logits.dim() == 2
        and targets.shape == logits.shape[:1]
        and logits.is_contiguous()
        and plain(logits, targets)
        and loss_library() is not None
    )


def cross_entropy(logits: Tensor, targets: Tensor, ignored: int, gradient: bool) -> Tensor:
    """−log softmax(logits)[target] in nats, float32 (R,); 0 where the target is `ignored`, which is below 0.

    logits: (R, V) that the kernel takes; with `gradient` they become d loss / d logits. targets: (R,) int64.

    Raises IndexError for a target that is neither a word nor ignored.
    """
    (R, V), kernels = logits.shape, loss_library()
    assert kernels is not None
    assert takes_logits(logits, targets), (logits.shape, logits.dtype, targets.shape, targets.dtype)
    if not ((targets == ignored) | (targets >= 0) & (targets < V)).all():
        raise IndexError(f"targets must be {ignored} or from 0 to {V - 1}: found {targets.min()} to {targets.max()}")
    targets, losses = targets.contiguous(), logits.new_empty(R, dtype=torch.float32)
    pointers = (targets.data_ptr(), losses.data_ptr())
    kernels.newllm_cross_entropy(logits.data_ptr(), R, V, *pointers, gradient, torch.get_num_threads())
    return losses


def linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, K) times weight (N, K) transposed, plus bias (N,): (…, N). All `usable`; the weight without gaps."""
    (N, K), kernels = weight.shape, library()
    assert kernels is not None
    assert x.shape[-1] == K, (x.shape, weight.shape)
    assert bias is None or bias.shape == (N,), (bias.shape, N)
    x, bias = x.contiguous(), None if bias is None else bias.contiguous()
    out = x.new_empty(*x.shape[:-1], N)
    kernels.newllm_linear(
        x.dtype == torch.bfloat16,
        x.data_ptr(),
        x.numel() // K,
        K,
        weight.data_ptr(),
        None if bias is None else bias.data_ptr(),
        N,
        out.data_ptr(),
        torch.get_num_threads(),
    )
    return out


def reads(q: Tensor, k: Tensor | Quantized, v: Tensor | Quantized) -> bool:
    """Whether `attention` takes these: `usable`, or codes beside a usable q; the numbers of a vector side by side."""
    if isinstance(k, Quantized) and isinstance(v, Quantized):
        parts = (k.codes, k.scales, v.codes, v.scales)
        return usable(q) and all(x.device.type == "cpu" and x.stride(3) == 1 for x in parts)
    if isinstance(k, Quantized) or isinstance(v, Quantized):
        return False
    return usable(q, k, v) and k.stride(3) == v.stride(3) == 1


def attention(
    q: Tensor,
    k: Tensor | Quantized,
    v: Tensor | Quantized,
    slopes: Tensor | None,
    distances: Tensor | None,
    first: int,
    scale: float,
) -> Tensor:
    """Attention of one query in each row, see `ops.attention.causal_attention`. The kernel `reads` q, k and v.

    Args:
        q: (B, H, 1, d).
        k: (B, Hk, S, d).
        v: (B, Hk, S, dv).
        slopes: (H,) float32.
        distances: (B, S) float32 between the query and each token, negative where it is not seen; None for S − 1 − j.
        first: tokens before this one are not seen.
        scale: of the scores.

    Returns:
        (B, H, 1, dv).
    """
    kernels = library()
    assert kernels is not None
    (B, H, T, d), (_, Hk, S, dv) = q.shape, v.shape
    assert T == 1, q.shape
    assert (k.shape, v.shape, H % Hk) == ((B, Hk, S, d), (B, Hk, S, dv), 0), (q.shape, k.shape, v.shape)
    dtype, bits = q.dtype, k.bits if isinstance(k, Quantized) else 8 * k.element_size()
    q = (q.float() if isinstance(k, Quantized) else q).contiguous()
    out = q.new_empty(B, H, 1, dv)
    slopes, distances = (None if x is None else x.contiguous() for x in (slopes, distances))
    pointers = (None if x is None else x.data_ptr() for x in (slopes, distances, out))
    stored = (_stored(x) for x in (k, v))
    arguments = AttentionArguments(q.data_ptr(), *stored, *pointers, B, H, Hk, S, d, dv, first, scale)
    kernels.newllm_attention(bits, ctypes.byref(arguments), torch.get_num_threads())
    return out.to(dtype)


def _stored(x: Tensor | Quantized) -> Stored:
    if isinstance(x, Tensor):
        return Stored(x.data_ptr(), None, *x.stride()[:3])
    return Stored(x.codes.data_ptr(), x.scales.data_ptr(), *x.codes.stride()[:3], *x.scales.stride()[:3])
