"""Linear head and cross-entropy in one, chunk by chunk; the obvious twin is `reference.linear_cross_entropy`."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
# Rows whose logits are in memory together: (ROWS, V) float32 is 100 MB at 50k words.
ROWS = 512


def linear_cross_entropy(
    hidden: Tensor, weight: Tensor, targets: Tensor, reduction: Literal["sum", "none"] = "sum"
) -> Tensor:
    """−log softmax(W h)[target] in nats; targets of −100 count nothing.

    Logits exist for ROWS rows at a time, in forward and in backward. With 'sum' the gradient is computed during
    forward, as the loss is linear in its own gradient.

    Args:
        hidden: (N, D).
        weight: (V, D).
        targets: (N,) int64.
        reduction: 'sum' gives a scalar, 'none' (N,) without gradient.
    """
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden = hidden.to(dtype)
    if reduction == "sum":
        return _SummedLoss.apply(hidden, weight, targets)
    with torch.autocast(hidden.device.type, enabled=False):
        weight = weight.to(hidden.dtype)
        parts = [
            F.cross_entropy(_upcast(h @ weight.T), t, ignore_index=IGNORED, reduction="none")
            for h, t in zip(hidden.split(ROWS), targets.split(ROWS), strict=True)
        ]
    return torch.cat(parts)


def _upcast(logits: Tensor) -> Tensor:
    return logits.to(torch.promote_types(logits.dtype, torch.float32))


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, hidden: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
        need_hidden, need_weight = ctx.needs_input_grad[:2]
        with torch.autocast(hidden.device.type, enabled=False):
            low = weight.to(hidden.dtype)
            total = torch.zeros((), dtype=_upcast(hidden[:0]).dtype, device=hidden.device)
            grad_hidden = torch.empty_like(hidden) if need_hidden else None
            grad_weight = torch.zeros_like(weight) if need_weight else None
            for start in range(0, len(hidden), ROWS):
                h, t = hidden[start : start + ROWS], targets[start : start + ROWS]
                log_p = F.log_softmax(h @ low.T, dim=-1, dtype=total.dtype)
                total += F.nll_loss(log_p, t, ignore_index=IGNORED, reduction="sum")
                if not (need_hidden or need_weight):
                    continue
                counted = t != IGNORED
                grad = log_p.exp_()  # d loss / d logits = p − onehot(target), 0 where ignored
                grad[torch.arange(len(t), device=t.device), t.clamp(min=0)] -= 1
                grad = grad.mul_(counted[:, None]).to(hidden.dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + ROWS] = grad @ low
                if grad_weight is not None:
                    grad_weight += grad.T @ h
        ctx.save_for_backward(grad_hidden, grad_weight)
        return total

    @staticmethod
    def backward(ctx, grad: Tensor):
        grad_hidden, grad_weight = ctx.saved_tensors
        scale = lambda x: None if x is None else x * grad  # noqa: E731
        return scale(grad_hidden), scale(grad_weight), None
