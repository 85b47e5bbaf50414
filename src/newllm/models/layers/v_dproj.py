"""Pythia's layer with narrow values (V-DProj), narrow queries and keys, or values that pass through a bottleneck."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from newllm.errors import UserError, nearest
from newllm.models.layers.base import register_layer
from newllm.models.layers.pythia import PythiaLayer, into_heads
from newllm.models.linear import Linear
from newllm.models.positions import RotaryPosition
from newllm.ops import reference

RESTORE = ("none", "end_to_end", "two_phase")


@register_layer("v_dproj")
class VDProjLayer(PythiaLayer):
    """x + attention(ln1 x) + mlp(ln2 x) with head sizes d_k = key_dim / H and d_v = value_dim / H, cached as narrow.

    Keys keep their width by default: they find, with a rotation by position, while values only carry. Attention mixes
    the narrow values as they are, and W_O takes value_dim numbers instead of D.

    With `restore`, values are D wide, and pass through a bottleneck of value_dim numbers before attention:
    V' = W_R (W_C V + b_C) + b_R, with V = W_V ln1(x). The cache holds V': nothing is saved. It is a comparison row.

    Args:
        hidden_size: D, the width of the residual stream.
        num_heads: H query heads.
        intermediate_size: width of the MLP.
        key_dim: width of queries, and of keys, over all H heads: a multiple of H; or, as a number with a decimal point,
            a share of D, rounded to one.
        value_dim: width of the values, or of the bottleneck, in the same way.
        restore: 'none'; 'end_to_end', where the bottleneck learns from the language model's loss like all else; or
            'two_phase', where it first learns ‖V − V'‖² with everything else as initialised, and is then frozen.
        num_kv_heads: Hk key and value heads; keys are then Hk·d_k wide, values Hk·d_v. Default H.
        position: 'rope', 'alibi', 'none', or a dict with options, see `positions`.
        window: tokens a query sees, itself included; None for all.
    """

    variants = (
        {"key_dim": 0.625},
        {"key_dim": 24, "value_dim": 80, "num_kv_heads": 2, "position": "alibi", "window": 5},
        {"restore": "end_to_end", "num_kv_heads": 2},
        {"restore": "two_phase", "key_dim": 0.5, "position": {"type": "alibi", "slopes": "geometric"}},
    )

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        key_dim: int | float = 1.0,
        value_dim: int | float = 0.625,
        restore: str = "none",
        num_kv_heads: int | None = None,
        position: str | dict[str, Any] = "rope",
        window: int | None = None,
    ) -> None:
        super().__init__(
            hidden_size, num_heads, intermediate_size, num_kv_heads=num_kv_heads, position=position, window=window
        )
        if restore not in RESTORE:
            raise nearest(str(restore), list(RESTORE), "restore", "of layer type 'v_dproj'")
        key_size = head_size("key_dim", key_dim, hidden_size, num_heads)
        value_size = head_size("value_dim", value_dim, hidden_size, num_heads)
        if isinstance(self.position, RotaryPosition) and self.position.rotary_dim(key_size) > key_size:
            raise UserError(f"key_dim {key_dim} leaves a head {key_size} number: rotary positions turn pairs of them")
        self._arguments |= {"key_dim": key_size * num_heads, "value_dim": value_size * num_heads}
        self.restore = restore
        if restore == "none":
            self._make_projections(hidden_size, key_size, value_size)
        else:
            self._make_projections(hidden_size, key_size, hidden_size // num_heads)
            self.compress = Linear(self.widths[1], self.num_kv_heads * value_size)
            self.expand = Linear(self.num_kv_heads * value_size, self.widths[1])

    def reset_parameters(self) -> None:
        if self.restore != "none":
            # Restored values then start with the variance of the baseline's values.
            for linear in (self.compress, self.expand):
                nn.init.normal_(linear.weight, std=linear.in_features**-0.5)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        qk, v = super()._project(x)
        return qk, v if self.restore == "none" else into_heads(self._restored(v), self.value_size)

    def _restored(self, v: Tensor) -> Tensor:
        """V' (B, T, Hk·d) of the values V (B, Hk, T, d)."""
        return self.expand(self.compress(v.transpose(1, 2).flatten(2)))

    def reconstruction_parameters(self) -> list[nn.Parameter]:
        if self.restore != "two_phase":
            return []
        return [*self.compress.parameters(), *self.expand.parameters()]

    def reconstruction_loss(self, x: Tensor) -> Tensor:
        _, v = super()._project(x)
        error = v.transpose(1, 2).flatten(2) - self._restored(v)
        return error.to(torch.promote_types(error.dtype, torch.float32)).square().mean(dim=-1)

    def reference(self, x: Tensor, *, positions: Tensor, mask: Tensor | None) -> Tensor:
        H, Hk = self.num_heads, self.num_kv_heads
        sizes = [self.head_size] * (H + Hk) + [self.value_size] * Hk
        normed = self.norm_attention(x)
        rows = zip(self.qkv.weight.split(sizes), self.qkv.bias.split(sizes), strict=True)
        heads = [normed @ weight.T + bias for weight, bias in rows]  # queries, keys, values
        q, k, v = torch.stack(heads[:H], 1), torch.stack(heads[H : H + Hk], 1), torch.stack(heads[H + Hk :], 1)
        if self.restore != "none":
            narrow = torch.cat(heads[H + Hk :], -1) @ self.compress.weight.T + self.compress.bias
            restored = narrow @ self.expand.weight.T + self.expand.bias
            v = torch.stack(restored.split(self.value_size, dim=-1), 1)
        q, k = self.position.reference_rotate(q, positions), self.position.reference_rotate(k, positions)
        slopes = self.position.head_slopes(H, x.device)
        mixed = reference.attention(q, k, v, slopes=slopes, window=self.window, mask=mask)
        return x + torch.cat(mixed.unbind(1), -1) @ self.out.weight.T + self.out.bias + self.mlp(self.norm_mlp(x))


def head_size(option: str, width: int | float, hidden_size: int, num_heads: int) -> int:
    """The head size that a width, or a share of D, gives. Raises UserError where it gives none."""
    if type(width) is float and 0 < width <= 1:
        return max(1, round(width * hidden_size / num_heads))
    if type(width) is int and width > 0 and width % num_heads == 0:
        return width // num_heads
    example = head_size(option, 0.625, hidden_size, num_heads) * num_heads
    raise UserError(
        f"{option} is {width!r}: it must be a multiple of num_heads {num_heads}, for example {example}, or a share of "
        f"hidden_size {hidden_size}, for example 0.625"
    )
