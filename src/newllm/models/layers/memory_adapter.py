"""Pythia's layer with a compressive memory beside its attention: an adapter of a trained model."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from newllm.models.cache import CombinedState, KeyValueState, MemoryState, memory_of
from newllm.models.layers.base import register_layer
from newllm.models.layers.infini import InfiniLayer
from newllm.models.layers.pythia import into_heads
from newllm.models.options import check_count
from newllm.models.segment_attention import SegmentAttention
from newllm.ops import reference
from newllm.ops.attention import causal_attention
from newllm.ops.memory import Found


@register_layer("memory_adapter")
class MemoryAdapterLayer(InfiniLayer):
    """The layer of `pythia`, and beside its attention a compressive memory that says nothing at first.

    x + W_O (attention(ln1 x) + g · (read from memory)) + mlp(ln2 x), with g = tanh(β), one for each memory head.

    The attention sees the whole text, or a window of it, as in `PythiaLayer`, whose parameters have the same names
    here. The memory is that of `InfiniLayer`: written segment by segment, with the same queries, keys and values, and
    without a position; a token reads what earlier segments wrote.

    β starts at 0, where the layer gives exactly what the trained one gave. A gate of tanh at zero is how Flamingo
    (arXiv 2204.14198) puts layers into a frozen language model. It has a gradient from the first step, that of the
    output times the read, since the read is not zero; so nothing but the gate has to start at zero, and no projection
    is added. (As a share, g · read + (1 − g) · attention, a closed gate is a sigmoid's flat end, and an open one takes
    away from the attention.) Gates learn at `--gate-lr`: at the model's rate they do not move.

    Args:
        hidden_size: D, the width of the residual stream.
        num_heads: H heads of the attention, each with keys and values of its own.
        intermediate_size: width of the MLP.
        segment_length: S, tokens of a segment.
        position: of the attention: 'rope', 'alibi', 'none', or a dict with options, see `positions`.
        window: tokens the attention sees, the token itself included; None for all.
        memory_head_dim: d of the memory, which has Hm = D / d heads; default D, a single head.
        use_delta_rule: write only what the memory does not already answer.
        memory_grad: 'through' lets the gradient of what is read reach the segments that wrote it, 'detach' does not.
        key_shift: write each value by the key of the token before it.
        num_memory_banks: N memories, filled in turn.
        segments_per_bank: segments written to a bank before it is the next one's turn.
    """

    closed_beta: ClassVar[float] = 0.0
    variants = (
        {"segment_length": 4},
        {"segment_length": 3, "use_delta_rule": False, "memory_head_dim": 16, "position": "alibi", "window": 5},
        {"segment_length": 2, "num_memory_banks": 2, "segments_per_bank": 1, "window": 1, "position": "none"},
        {"segment_length": 3, "key_shift": True, "position": {"type": "alibi", "slopes": "geometric"}},
    )

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        segment_length: int = 128,
        position: str | dict[str, Any] = "rope",
        window: int | None = None,
        memory_head_dim: int | None = None,
        use_delta_rule: bool = True,
        memory_grad: str = "through",
        key_shift: bool = False,
        num_memory_banks: int = 1,
        segments_per_bank: int = 4,
    ) -> None:
        check_count("num_memory_banks", num_memory_banks)
        if window is not None:
            check_count("window", window)
        super().__init__(
            hidden_size,
            num_heads,
            intermediate_size,
            segment_length=segment_length,
            position=position,
            memory_head_dim=memory_head_dim,
            use_delta_rule=use_delta_rule,
            memory_grad=memory_grad,
            key_shift=key_shift,
            num_memory_banks=num_memory_banks,
            segments_per_bank=segments_per_bank,
        )
        self.attention = NoSegmentAttention(**vars(self.attention))
        self.position, self.num_heads, self.window = self.attention.position, num_heads, window

    def gates(self) -> Tensor:
        return self.beta.detach().tanh()

    def forward(self, x: Tensor, *, positions: Tensor, mask: Tensor | None, state: CombinedState | None) -> Tensor:  # type: ignore[override]
        whole = self.qkv(self.norm_attention(x)).chunk(3, dim=-1)  # (B, T, D) each
        q, k, v = self._heads(whole)
        q, k = self.position.rotate(q, positions), self.position.rotate(k, positions)
        seen = mask
        if state is not None:
            attended = state.states["attention"]
            assert isinstance(attended, KeyValueState)
            k, v, seen = attended.update(k, v, mask, as_stored=True)
        slopes = self.position.head_slopes(self.num_heads, x.device)
        mixed = causal_attention(q, k, v, slopes=slopes, window=self.window, mask=seen)
        q, k, v = whole
        read = self._mixed(q, k, v, mask, None if state is None else memory_of(state))
        return self._finish(x, mixed.transpose(1, 2).flatten(2) + read)

    def _heads(self, qkv: Sequence[Tensor]) -> list[Tensor]:
        """Queries, keys and values (B, T, D) as the attention takes them, (B, H, T, d) each."""
        return [into_heads(x, self.attention.head_size) for x in qkv]

    def _gate(self, q: Tensor, found: Found, local: Tensor) -> Tensor:
        """g · read, in the shape and dtype of local (B, G, S, D); a memory that is empty reads as zeros."""
        read = self.beta.tanh().to(q.dtype).view(-1, 1, 1, 1) * self.mix(q, found)
        return read.movedim(1, 3).flatten(3).to(local.dtype)

    def make_state(self) -> CombinedState:
        return CombinedState(attention=KeyValueState(window=self.window), memory=MemoryState())

    def state_bytes(self, tokens: int, element_size: int) -> int:
        kept = tokens if self.window is None else min(tokens, self.window - 1)
        return super().state_bytes(tokens, element_size) + 2 * self.hidden_size * kept * element_size

    def reference(self, x: Tensor, *, positions: Tensor, mask: Tensor | None) -> Tensor:
        qkv = self.qkv(self.norm_attention(x))
        q, k, v = self._heads(qkv.chunk(3, dim=-1))
        q, k = self.position.reference_rotate(q, positions), self.position.reference_rotate(k, positions)
        slopes = self.position.head_slopes(self.num_heads, x.device)
        mixed = reference.attention(q, k, v, slopes=slopes, window=self.window, mask=mask)
        return self._finish(x, mixed.transpose(1, 2).flatten(2) + self._reference_mixed(qkv, mask))

    def reference_gate(self, read: Tensor, local: Tensor, h: int) -> Tensor:
        return self.beta[h].tanh() * read


class NoSegmentAttention(SegmentAttention):
    """Nothing: the attention of the layer is not within segments."""

    def whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.zeros_like(q)

    def last(self, q: Tensor, k: Tensor, v: Tensor, held: Tensor) -> Tensor:
        return torch.zeros_like(q)

    def reference(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return torch.zeros_like(q)
