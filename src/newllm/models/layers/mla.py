"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): one latent a token, shared by the keys and values of all
heads, is all that is cached."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from newllm.errors import UserError, nearest
from newllm.models.cache import LatentState
from newllm.models.layers.base import MLP, Layer, register_layer
from newllm.models.linear import Linear
from newllm.models.options import check_count, check_divides
from newllm.models.positions import RotaryPosition, create_position, position_spec
from newllm.ops import reference
from newllm.ops.attention import causal_attention
from newllm.ops.quantize import Quantized

PATHS = ("auto", "absorbed", "materialised")


@register_layer("mla")
class MLALayer(Layer):
    """x + attention(ln1 x) + mlp(ln2 x) over keys and values that are linear maps of one cached latent.

    With r = kv_dim, for head h: c = W_DKV x (r numbers, cached), k_h = W_UK_h c, v_h = W_UV_h c. Since
    q·(W_UK c) = (W_UKᵀ q)·c, attention can also run on the latents themselves, and the keys and values of the past need
    never be made. Both ways give the same numbers to rounding; `path` chooses.

    Args:
        hidden_size: D, the width of the residual stream.
        num_heads: H heads of size d = D / H.
        intermediate_size: width of the MLP.
        kv_dim: r, the width of the latent.
        position: 'alibi', 'none', or a dict with options, see `positions`. Default: uniform ALiBi, or with a rotary
            part none. Rotary heads are refused: the rotation would stand between q and W_UK.
        rope_dim: width p of DeepSeek's decoupled rotary part: p more dimensions of every query meet one rotated key of
            p numbers, which all heads share and which is cached beside the latent. Even; 0 for none.
        rope_base: base of its angles.
        path: 'materialised' expands the latents to keys and values, 'absorbed' attends to the latents, 'auto' takes
            the cheaper at each call.
    """

    variants = (
        {"kv_dim": 7, "position": {"type": "alibi", "slopes": "geometric"}, "path": "absorbed"},
        {"kv_dim": 37, "position": "none", "path": "materialised"},
        {"kv_dim": 24, "rope_dim": 6},
        {"kv_dim": 9, "rope_dim": 4, "position": "alibi", "path": "absorbed"},
        {"rope_dim": 2, "path": "materialised"},
    )

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        kv_dim: int = 128,
        position: str | dict[str, Any] | None = None,
        rope_dim: int = 0,
        rope_base: float = 10000.0,
        path: str = "auto",
    ) -> None:
        super().__init__()
        check_divides("hidden_size", hidden_size, "num_heads", num_heads)
        check_count("kv_dim", kv_dim)
        if type(rope_dim) is not int or rope_dim < 0 or rope_dim % 2:
            raise UserError(f"rope_dim is {rope_dim!r}: it must be 0 or an even number, as dimensions turn in pairs")
        if path not in PATHS:
            raise nearest(str(path), list(PATHS), "path", "of layer type 'mla'")
        if position is None:
            position = "none" if rope_dim else "alibi"
        self.position = create_position(position)
        if isinstance(self.position, RotaryPosition):
            raise UserError(
                "position 'rope' cannot turn the heads of layer type 'mla': a rotation between query and W_UK would "
                "have to be undone for every cached latent; set rope_dim=16 for a rotary part beside the latent"
            )
        self.rotary = create_position({"type": "rope", "fraction": 1.0, "base": rope_base})
        self._arguments |= {"position": position_spec(self.position)}
        self.num_heads, self.head_size = num_heads, hidden_size // num_heads
        self.kv_dim, self.rope_dim, self.path = kv_dim, rope_dim, path
        self.scale = (self.head_size + rope_dim) ** -0.5
        self.norm_attention = nn.LayerNorm(hidden_size)
        self.norm_mlp = nn.LayerNorm(hidden_size)
        # Of every token: its queries, their rotary parts and the shared rotary key, its latent.
        self.widths = (hidden_size, (num_heads + 1) * rope_dim, kv_dim) if rope_dim else (hidden_size, kv_dim)
        self.project = Linear(hidden_size, sum(self.widths))
        # W_UK and W_UV, one above the other. No bias, which absorption would have to carry.
        self.expand = Linear(kv_dim, 2 * hidden_size, bias=False)
        self.out = Linear(hidden_size, hidden_size)
        self.mlp = MLP(hidden_size, intermediate_size)

    def reset_parameters(self) -> None:
        # Keys and values then start with the variance of the latent, which is that of the baseline's keys and values.
        nn.init.normal_(self.expand.weight, std=self.kv_dim**-0.5)

    def forward(self, x: Tensor, *, positions: Tensor, mask: Tensor | None, state: LatentState | None) -> Tensor:  # type: ignore[override]
        q, q_rope, cached = self._project(x, positions)
        if state is not None:
            cached, mask = state.update(cached, mask, as_stored=True)
        if self.absorbs(x.shape[1], cached.shape[2]):
            return self._finish(x, self._absorbed(q, q_rope, cached, mask))
        latents = cached.numbers(q.dtype) if isinstance(cached, Quantized) else cached
        return self._finish(x, self._materialised(q, q_rope, latents, mask))

    def absorbs(self, queries: int, keys: int) -> bool:
        """Whether T queries at the end of S keys take the absorbed path: as `path` says, or if it multiplies less.

        Multiplications of a head, over P = T·S − T·(T − 1)/2 pairs of query and key; the rotary part costs both alike:

            materialised  2·S·d·r + 2·P·d    expand all S latents, then scores and mixtures d wide
            absorbed      2·T·d·r + 2·P·r    turn T queries and T mixtures, with scores and mixtures r wide
        """
        if self.path != "auto":
            return self.path == "absorbed"
        d, r = self.head_size, self.kv_dim
        pairs = queries * keys - queries * (queries - 1) // 2
        return queries * d * r + pairs * r < keys * d * r + pairs * d

    def _project(self, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor | None, Tensor]:
        """Queries (B, T, H, d), their rotary parts (B, H, T, p) or None, and what is cached (B, 1, T, r + p)."""
        parts = self.project(self.norm_attention(x)).split(self.widths, dim=-1)
        q, latent = parts[0].unflatten(-1, (self.num_heads, self.head_size)), parts[-1].unsqueeze(1)
        if not self.rope_dim:
            return q, None, latent
        rotated = self.rotary.rotate(self._rotary_heads(parts[1]), positions)
        q_rope, k_rope = rotated.split([self.num_heads, 1], dim=1)
        return q, q_rope, torch.cat([latent, k_rope], dim=-1)

    def _rotary_heads(self, part: Tensor) -> Tensor:
        """(B, T, (H + 1)·p) to (B, H + 1, T, p): the queries' rotary parts, and last the shared key."""
        return part.unflatten(-1, (self.num_heads + 1, self.rope_dim)).transpose(1, 2)

    def _materialised(self, q: Tensor, q_rope: Tensor | None, cached: Tensor, mask: Tensor | None) -> Tensor:
        """Keys and values of all S tokens from what is cached (B, 1, S, r + p), then ordinary attention: (B, T, D)."""
        # Split while heads are still side by side: backward then joins the gradients in one copy.
        k, v = self.expand(cached[:, 0, :, : self.kv_dim]).chunk(2, dim=-1)
        k, v = (heads.unflatten(-1, (self.num_heads, self.head_size)).transpose(1, 2) for heads in (k, v))
        q = q.transpose(1, 2)
        if q_rope is not None:
            q = torch.cat([q, q_rope], dim=-1)
            k = torch.cat([k, cached[..., self.kv_dim :].expand(-1, self.num_heads, -1, -1)], dim=-1)
        return self._attend(q, k, v, mask).transpose(1, 2).flatten(2)

    def _absorbed(self, q: Tensor, q_rope: Tensor | None, cached: Tensor | Quantized, mask: Tensor | None) -> Tensor:
        """Multi-query attention whose one key and value is the latent, between W_UK and W_UV: (B, T, D)."""
        B, T, H, d = q.shape
        w_uk, w_uv = self.expand.weight.view(2, H, d, self.kv_dim)
        # One product for each head over the tokens of all rows: (H, B·T, d) by (H, d, r).
        q = torch.bmm(q.flatten(0, 1).transpose(0, 1), w_uk).unflatten(1, (B, T)).transpose(0, 1)  # (B, H, T, r)
        if q_rope is not None:
            q = torch.cat([q, q_rope], dim=-1)
        # The rotary key rides along as a value and is cut off: cheaper than latents that do not lie close together.
        mixed = self._attend(q, cached, cached, mask)[..., : self.kv_dim]
        heads = torch.bmm(mixed.transpose(0, 1).flatten(1, 2), w_uv.transpose(1, 2))  # (H, B·T, d)
        return heads.transpose(0, 1).reshape(B, T, H * d)

    def _attend(self, q: Tensor, k: Tensor | Quantized, v: Tensor | Quantized, mask: Tensor | None) -> Tensor:
        slopes = self.position.head_slopes(self.num_heads, q.device)
        return causal_attention(q, k, v, slopes=slopes, mask=mask, scale=self.scale)

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Output projection of the mixed values (B, T, D), MLP, and the residual."""
        return x + self.out(mixed) + self.mlp(self.norm_mlp(x))

    def make_state(self) -> LatentState:
        return LatentState()

    def reference(self, x: Tensor, *, positions: Tensor, mask: Tensor | None) -> Tensor:
        """Head by head: k_h = [W_UK_h c; k_rope], v_h = W_UV_h c, scores over √(d + p)."""
        q, *rotary, latent = self.project(self.norm_attention(x)).split(self.widths, dim=-1)
        if self.rope_dim:
            rotated = self.rotary.reference_rotate(self._rotary_heads(rotary[0]), positions)
        w_uk, w_uv = self.expand.weight.split(x.shape[-1])
        slopes = self.position.head_slopes(self.num_heads, x.device)
        heads = []
        for h in range(self.num_heads):
            rows = slice(h * self.head_size, (h + 1) * self.head_size)
            q_h, k_h, v_h = q[..., rows], latent @ w_uk[rows].T, latent @ w_uv[rows].T  # (B, T, d)
            if self.rope_dim:
                q_h, k_h = torch.cat([q_h, rotated[:, h]], dim=-1), torch.cat([k_h, rotated[:, -1]], dim=-1)
            slope = slopes if slopes is None or len(slopes) == 1 else slopes[h : h + 1]
            heads.append(reference.attention(*(t[:, None] for t in (q_h, k_h, v_h)), slopes=slope, mask=mask)[:, 0])
        return self._finish(x, torch.cat(heads, dim=-1))

    def state_bytes(self, tokens: int, element_size: int) -> int:
        return (self.kv_dim + self.rope_dim) * tokens * element_size
