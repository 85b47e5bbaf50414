"""The product of every layer: torch's, or for the few rows of decoding on a CPU our own kernel.

Decoding multiplies one row with every weight of the model: its time is the time to read them. On a CPU torch reads a
weight at a fraction of what memory gives: in bf16 oneDNN rearranges it at every call, in float32 large ones are read by
one thread.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from newllm.ops import native

# Up to this many rows a product is bound by reading the weight.
FEW_ROWS = 16


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x (…, D_in) times weight (D_out, D_in) transposed, plus bias (D_out,): (…, D_out)."""
    if (
        x.shape[-1:] == weight.shape[1:]  # anything else is for torch to refuse: the kernel writes by these sizes
        and (bias is None or bias.shape == weight.shape[:1])
        and 0 < x.numel() <= FEW_ROWS * weight.shape[1]
        and not torch.is_autocast_enabled("cpu")
        and weight.is_contiguous()
        and native.usable(x, weight, *(() if bias is None else (bias,)))
    ):
        return native.linear(x, weight, bias)
    return F.linear(x, weight, bias)
