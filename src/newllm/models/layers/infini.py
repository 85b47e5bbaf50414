"""Infini-attention (arXiv 2404.07143): one memory, or several banks that are filled in turn."""

from __future__ import annotations

import inspect
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from newllm.errors import UserError
from newllm.models.layers.base import register_layer
from newllm.models.layers.compressive import CompressiveLayer
from newllm.models.options import check_count
from newllm.ops import reference
from newllm.ops.memory import Found

OF_MEMORIES = ("memory_head_dim", "use_delta_rule", "memory_grad", "key_shift")


@register_layer("infini")
class InfiniLayer(CompressiveLayer):
    """Attention within segments beside a memory of all earlier ones, see `CompressiveLayer`.

    With several banks, what a query finds in those that are not empty is mixed by learned weights, the same for all
    queries: softmax over N numbers.

    Args:
        hidden_size: D, the width of the residual stream.
        num_heads: H heads of the local attention.
        intermediate_size: width of the MLP.
        segment_length: S, tokens of a segment.
        local: 'softmax' or 'linear' attention within a segment.
        position: of the local softmax attention: 'rope', 'alibi', 'none', or a dict, see `positions`.
        memory_head_dim: d of the memory, which has Hm = D / d heads; default D, a single head.
        use_delta_rule: write only what the memory does not already answer.
        memory_grad: 'through' lets the gradient of what is read reach the segments that wrote it, 'detach' does not.
        key_shift: write each value by the key of the token before it.
        num_memory_banks: N; 0 for no memory: attention within segments alone.
        segments_per_bank: segments written to a bank before it is the next one's turn.
    """

    variants: ClassVar[tuple[dict[str, Any], ...]] = (
        {"segment_length": 4},
        {"segment_length": 3, "use_delta_rule": False, "memory_head_dim": 16, "position": "alibi"},
        {"segment_length": 2, "num_memory_banks": 3, "segments_per_bank": 2, "local": "linear"},
        {"segment_length": 1, "num_memory_banks": 2, "segments_per_bank": 1, "use_delta_rule": False},
        {"segment_length": 3, "key_shift": True},
        {
            "segment_length": 1,
            "key_shift": True,
            "use_delta_rule": False,
            "num_memory_banks": 2,
            "segments_per_bank": 1,
        },
        {"segment_length": 5, "num_memory_banks": 0, "position": {"type": "alibi", "slopes": "geometric"}},
    )

    def __init__(
        self,
        hidden_size: int,
        num_heads: int,
        intermediate_size: int,
        *,
        segment_length: int = 128,
        local: str = "softmax",
        position: str | dict[str, Any] = "rope",
        memory_head_dim: int | None = None,
        use_delta_rule: bool = True,
        memory_grad: str = "through",
        key_shift: bool = False,
        num_memory_banks: int = 1,
        segments_per_bank: int = 4,
    ) -> None:
        check_count("num_memory_banks", num_memory_banks, least=0)
        check_count("segments_per_bank", segments_per_bank)
        if not num_memory_banks:
            self._refuse_options_of_memories(hidden_size)
        super().__init__(
            hidden_size,
            num_heads,
            intermediate_size,
            num_memories=num_memory_banks,
            segments_per_memory=segments_per_bank,
            segment_length=segment_length,
            local=local,
            position=position,
            memory_head_dim=memory_head_dim,
            use_delta_rule=use_delta_rule,
            memory_grad=memory_grad,
            key_shift=key_shift,
        )

    def _refuse_options_of_memories(self, hidden_size: int) -> None:
        """Raises UserError for one that is not as by default, where there is no memory that it could apply to."""
        parameters = inspect.signature(InfiniLayer.__init__).parameters
        for name in OF_MEMORIES:
            value = self._arguments[name]
            # A complete spec has the default width in numbers.
            if value != parameters[name].default and (name, value) != ("memory_head_dim", hidden_size):
                raise UserError(f"{name} is that of a memory, and num_memory_banks=0 leaves none: leave it out")

    def _make_mixer(self) -> None:
        if self.num_memories > 1:
            self.bank_weights = nn.Parameter(torch.zeros(self.num_memories))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.num_memories > 1:
            nn.init.zeros_(self.bank_weights)

    def gate_parameters(self) -> list[nn.Parameter]:
        return super().gate_parameters() + ([self.bank_weights] if self.num_memories > 1 else [])

    def mix(self, q: Tensor, found: Found) -> Tensor:
        if self.num_memories == 1:
            return found.reads[:, 0]
        logits = self.bank_weights.to(q.dtype).view(-1, 1, 1, 1)
        return mix_by(logits, found)

    def reference_mix(self, q: Tensor, known: list[tuple[Tensor, Tensor]], h: int) -> Tensor:
        weights = self.bank_weights.exp() if self.num_memories > 1 else torch.ones(1, dtype=q.dtype)
        return reference_mean(q, known, list(weights))


def mix_by(logits: Tensor, found: Found) -> Tensor:
    """The reads (B, N, Hm, G, S, d) mixed by softmax of the logits over the memories that are not empty.

    logits: (B, N, Hm, G, S), or what broadcasts to it.
    """
    # Far below every logit, yet finite: where all are empty, all count the same, and what they gave is zero.
    logits = torch.where(found.mass > 0, logits, -1e30)
    return (logits.softmax(dim=1).unsqueeze(-1) * found.reads).sum(dim=1)


def reference_mean(q: Tensor, known: list[tuple[Tensor, Tensor]], weights: list[Tensor]) -> Tensor:
    """The mean of what one query (d) reads from the memories that are not empty, by weights."""
    written = [(memory, weight) for memory, weight in zip(known, weights, strict=True) if memory[1].any()]
    total = sum(weight for _, weight in written)
    return sum(weight / total * reference.read_memory(q, *memory) for memory, weight in written)  # type: ignore[return-value]
