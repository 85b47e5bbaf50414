"""Linear head and cross-entropy in one, chunk by chunk; the obvious twin is `reference.linear_cross_entropy`."""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from newllm.ops import native

IGNORED = -100
"""Label of positions without loss (PyTorch's and Hugging Face's convention)."""
# Rows whose logits are in memory together, in the dtype of the hidden states: 206 MB in bf16 at 50k words. As many as
# memory allows, since each block adds once to the gradient of the whole weight.
ROWS = 2048
# Where our own kernel does not take them, rows whose softmax is in float32 at a time: 26 MB at 50k words, small enough
# for the allocator to use it again.
SOFTMAX_ROWS = 128


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    reduction: Literal["sum", "none"] = "sum",
    shares: Tensor | None = None,
) -> Tensor:
    """−log softmax(W h)[target] in nats; targets of −100 count nothing.

    Logits exist for ROWS rows at a time. With 'sum' the gradient is computed during forward, where one is wanted, as
    the loss is linear in its own gradient; a second derivative is refused.

    Args:
        hidden: (N, D).
        weight: (V, D).
        targets: (N,) int64.
        reduction: 'sum' gives a scalar, 'none' (N,) without gradient.
        shares: (N,) what each loss counts in the sum; default 1. They get a gradient too.
    """
    kept = targets != IGNORED
    if reduction == "sum" and 0 < kept.sum() < len(targets) / 2:  # as where a task asks for single words
        hidden, targets = hidden[kept], targets[kept]
        shares = None if shares is None else shares[kept]
    if torch.is_autocast_enabled(hidden.device.type):
        hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
    if reduction == "sum":
        return _SummedLoss.apply(hidden, weight, targets, shares, torch.is_grad_enabled())
    losses = []
    with torch.no_grad(), torch.autocast(hidden.device.type, enabled=False):
        low = weight.to(hidden.dtype)
        for h, t in zip(hidden.split(ROWS), targets.split(ROWS), strict=True):
            losses.append(_losses(h @ low.T, t, gradient=False))
    return torch.cat(losses)


def _losses(logits: Tensor, targets: Tensor, gradient: bool) -> Tensor:
    """(R,) of logits (R, V), at least in float32; with `gradient` the logits become d loss / d logits."""
    if native.takes_logits(logits, targets):
        return native.cross_entropy(logits, targets, IGNORED, gradient)
    losses = []
    for rows, target in zip(logits.split(SOFTMAX_ROWS), targets.split(SOFTMAX_ROWS), strict=True):
        log_p = F.log_softmax(rows, dim=-1, dtype=torch.promote_types(rows.dtype, torch.float32))
        losses.append(F.nll_loss(log_p, target, ignore_index=IGNORED, reduction="none"))
        if gradient:
            rows.copy_(_logit_gradient(log_p, target))
    return torch.cat(losses)


class _SummedLoss(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx, hidden: Tensor, weight: Tensor, targets: Tensor, shares: Tensor | None, grad_enabled: bool
    ) -> Tensor:
        # Under torch.no_grad() too, needs_input_grad is what the tensors say.
        training = grad_enabled and any(ctx.needs_input_grad)
        losses: list[Tensor] = []
        grad_hidden = torch.empty_like(hidden) if training else None
        grad_weight = None
        with torch.autocast(hidden.device.type, enabled=False):
            low = weight.to(hidden.dtype)
            for start in range(0, max(len(hidden), 1), ROWS):  # without rows too: loss and gradients are 0 then
                h, t = hidden[start : start + ROWS], targets[start : start + ROWS]
                logits = h @ low.T  # (ROWS, V); its rows become those of the gradient
                losses.append(_losses(logits, t, training))
                if grad_hidden is None:
                    continue
                if shares is not None:
                    logits *= shares[start : start + ROWS, None]
                grad_hidden[start : start + ROWS] = logits @ low
                block = (logits.T @ h).to(weight.dtype)
                grad_weight = block if grad_weight is None else grad_weight.add_(block)
        each = torch.cat(losses)  # (N,): the gradient of the shares
        ctx.save_for_backward(grad_hidden, grad_weight, None if shares is None else each)
        return each.sum() if shares is None else (each * shares).sum()

    @staticmethod
    @once_differentiable
    def backward(ctx, grad: Tensor):
        # In place: each is used once.
        hidden, weight, shares = (None if saved is None else saved.mul_(grad) for saved in ctx.saved_tensors)
        return hidden, weight, None, shares, None


def _logit_gradient(log_p: Tensor, targets: Tensor) -> Tensor:
    """d loss / d logits = softmax − onehot(target), 0 where the target is ignored; overwrites log_p (R, V)."""
    gradient = log_p.exp_()
    gradient[torch.arange(len(targets), device=targets.device), targets.clamp(min=0)] -= 1
    ignored = targets == IGNORED
    return gradient.masked_fill_(ignored[:, None], 0) if ignored.any() else gradient
