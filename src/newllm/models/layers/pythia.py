"""The baseline layer: GPT-NeoX's block with a switchable position encoding, any number of key heads and a window."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from newllm.errors import UserError
from newllm.models.cache import KeyValueState
from newllm.models.layers.base import MLP, Layer, register_layer
from newllm.models.linear import Linear
from newllm.models.options import check_count, check_divides, check_switch
from newllm.models.positions import create_position, position_spec
from newllm.ops import reference
from newllm.ops.attention import causal_attention


@register_layer("pythia")
class PythiaLayer(Layer):
    """x + attention(ln1 x) + mlp(ln2 x): pre-LayerNorm with a parallel residual, as in Pythia (arXiv 2304.01373).

    With `parallel_residual` false it is GPT-2's block: y = x + attention(ln1 x), then y + mlp(ln2 y).

    Args:
        hidden_size: D, the width of the residual stream.
        num_heads: H query heads of size d = D / H.
        intermediate_size: width of the MLP.
        num_kv_heads: Hk key and value heads: H is multi-head attention, fewer is grouped-query attention
            (arXiv 2305.13245), 1 is multi-query attention (arXiv 1911.02150). Default H.
        position: 'rope', 'alibi', 'none', or a dict with options, see `positions`.
        window: tokens a query sees, itself included (sliding-window attention, arXiv 1904.10509); None for all.
        parallel_residual: whether attention and MLP read the same, or the MLP what attention has added to.
    """

    variants: ClassVar[tuple[dict[str, Any], ...]] = (
        {"num_kv_heads": 2, "window": 5},
        {"num_kv_heads": 1, "position": "alibi"},
        {"position": {"type": "alibi", "slopes": "geometric"}, "window": 1},
        {"position": {"type": "rope", "fraction": 1.0}, "window": 7},
        {"position": "none", "parallel_residual": False},
    )

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        num_kv_heads: int | None = None,
        position: str | dict[str, Any] = "rope",
        window: int | None = None,
        parallel_residual: bool = True,
    ) -> None:
        super().__init__()
        num_kv_heads = num_heads if num_kv_heads is None else num_kv_heads
        check_count("num_kv_heads", num_kv_heads)
        if window is not None:
            check_count("window", window)
        check_divides("hidden_size", hidden_size, "num_heads", num_heads)
        if num_heads % num_kv_heads:
            raise UserError(f"num_kv_heads {num_kv_heads} is no divisor of num_heads {num_heads}")
        check_switch("parallel_residual", parallel_residual)
        self.position = create_position(position, hidden_size // num_heads)
        self._arguments |= {"num_kv_heads": num_kv_heads, "position": position_spec(self.position)}
        self.num_heads, self.num_kv_heads, self.window = num_heads, num_kv_heads, window
        self.parallel_residual = parallel_residual
        self.norm_attention = nn.LayerNorm(hidden_size)
        self.norm_mlp = nn.LayerNorm(hidden_size)
        self._make_projections(hidden_size, hidden_size // num_heads, hidden_size // num_heads)
        self.mlp = MLP(hidden_size, intermediate_size)

    def _make_projections(self, hidden_size: int, head_size: int, value_size: int) -> None:
        """Queries, keys and values in one, and the output; head_size is d of queries and keys, value_size of values."""
        self.head_size, self.value_size = head_size, value_size
        self.widths = (self.num_heads + self.num_kv_heads) * head_size, self.num_kv_heads * value_size
        self.qkv = Linear(hidden_size, sum(self.widths))
        self.out = Linear(self.num_heads * value_size, hidden_size)

    def forward(self, x: Tensor, *, positions: Tensor, mask: Tensor | None, state: KeyValueState | None) -> Tensor:  # type: ignore[override]
        qk, v = self._project(x)
        q, k = self._split(self.position.rotate(qk, positions))
        if state is not None:
            k, v, mask = state.update(k, v, mask, as_stored=True)
        slopes = self.position.head_slopes(self.num_heads, x.device)
        mixed = causal_attention(q, k, v, slopes=slopes, window=self.window, mask=mask)
        return self._finish(x, mixed)

    def _project(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Queries and keys together (B, H + Hk, T, d), as both are rotated, and values (B, Hk, T, dv)."""
        qk, v = self.qkv(self.norm_attention(x)).split(self.widths, dim=-1)
        return into_heads(qk, self.head_size), into_heads(v, self.value_size)

    def _split(self, qk: Tensor) -> tuple[Tensor, Tensor]:
        """Queries (B, H, T, d) and keys (B, Hk, T, d)."""
        return qk.split([self.num_heads, self.num_kv_heads], dim=1)

    def _finish(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Output projection of the mixed values (B, H, T, dv), MLP, and the residual."""
        y = x + self.out(mixed.transpose(1, 2).flatten(2))
        return y + self.mlp(self.norm_mlp(x if self.parallel_residual else y))

    def make_state(self) -> KeyValueState:
        return KeyValueState(window=self.window)

    def reference(self, x: Tensor, *, positions: Tensor, mask: Tensor | None) -> Tensor:
        qk, v = self._project(x)
        q, k = self._split(self.position.reference_rotate(qk, positions))
        slopes = self.position.head_slopes(self.num_heads, x.device)
        return self._finish(x, reference.attention(q, k, v, slopes=slopes, window=self.window, mask=mask))

    def state_bytes(self, tokens: int, element_size: int) -> int:
        kept = tokens if self.window is None else min(tokens, self.window - 1)
        return self.num_kv_heads * (self.head_size + self.value_size) * kept * element_size


def into_heads(x: Tensor, size: int) -> Tensor:
    """(B, T, N·size) to (B, N, T, size)."""
    return x.unflatten(-1, (-1, size)).transpose(1, 2)
