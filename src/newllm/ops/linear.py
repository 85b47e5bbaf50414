"""Products of a few rows with a weight, at the speed of memory; the obvious twin is `torch.nn.functional.linear`.

Decoding multiplies one row with every weight of the model: its time is the time to read them. On a CPU torch reads a
plain weight at a fraction of what memory gives: in bf16 oneDNN rearranges it at every call, in float32 large ones are
read by one thread. A weight that has been put into oneDNN's own blocked layout once is read two to three times as fast.
"""

from __future__ import annotations

import functools

import torch
from torch import Tensor

# Up to this many rows a product is bound by reading the weight.
FEW_ROWS = 16
# Below this many numbers a weight stays in the cores' own caches, and packing gains nothing.
SMALL_WEIGHT = 2**16


def worth_packing(x: Tensor, weight: Tensor) -> bool:
    """Whether x (…, D_in) times weight (D_out, D_in) is quicker with `pack`: few rows, a CPU, no gradient wanted."""
    return (
        x.numel() <= FEW_ROWS * weight.shape[1]
        and weight.numel() > SMALL_WEIGHT
        and not torch.is_grad_enabled()
        and not weight.is_inference()  # their changes are not counted, and a packed copy could be stale
        and x.dtype == weight.dtype
        and weight.device.type == x.device.type == "cpu"
        and not torch.is_autocast_enabled("cpu")
        and not torch.compiler.is_compiling()
        and _supported(weight.dtype)
    )


def pack(weight: Tensor) -> Tensor:
    """A copy of weight (D_out, D_in) in oneDNN's blocked layout: opaque, for `packed_linear` alone."""
    return torch.ops.mkldnn._reorder_linear_weight(weight.detach(), FEW_ROWS)


def packed_linear(x: Tensor, packed: Tensor, bias: Tensor | None) -> Tensor:
    """x (…, D_in) times the weight that was packed, transposed, plus bias (D_out,): (…, D_out)."""
    return torch.ops.mkldnn._linear_pointwise(x, packed, bias, "none", [], "")


@functools.cache
def _supported(dtype: torch.dtype) -> bool:
    if dtype == torch.bfloat16:
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return dtype == torch.float32 and torch.backends.mkldnn.is_available()
