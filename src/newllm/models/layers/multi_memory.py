"""Several compressive memories, written in turn; each query weighs them by how well it fits what each has seen."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from newllm.models.layers.base import register_layer
from newllm.models.layers.compressive import CompressiveLayer
from newllm.models.layers.infini import mix_by, reference_mean
from newllm.models.options import check_count
from newllm.ops import reference
from newllm.ops.memory import Found


@register_layer("multi_memory")
class MultiMemoryLayer(CompressiveLayer):
    """Attention within segments beside N independent memories of the earlier ones, see `CompressiveLayer`.

    Segment s is written to memory s mod N. A query's relevance for memory n is √d · cos(σ(q), z_n): how much its
    direction is that of the keys which that memory has seen, whatever their number; the reads are mixed by its softmax.
    Relevance looks at the query alone, and at memories of earlier segments.

    Args:
        num_memories: N.
        segment_length, local, position, memory_head_dim, use_delta_rule, memory_grad, key_shift: as of `InfiniLayer`.
    """

    variants = (
        {"segment_length": 3, "num_memories": 2, "key_shift": True},
        {"segment_length": 2, "num_memories": 3, "use_delta_rule": False, "memory_head_dim": 16},
        {"segment_length": 1, "position": "none", "memory_head_dim": 32, "local": "linear"},
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
        num_memories: int = 4,
    ) -> None:
        check_count("num_memories", num_memories)
        super().__init__(
            hidden_size,
            num_heads,
            intermediate_size,
            num_memories=num_memories,
            segments_per_memory=1,
            segment_length=segment_length,
            local=local,
            position=position,
            memory_head_dim=memory_head_dim,
            use_delta_rule=use_delta_rule,
            memory_grad=memory_grad,
            key_shift=key_shift,
        )

    def mix(self, q: Tensor, found: Found) -> Tensor:
        norms = torch.linalg.vector_norm(q, dim=-1).unsqueeze(1) * torch.linalg.vector_norm(
            found.normalisers, dim=-1
        ).unsqueeze(-1)
        relevance = found.mass / norms.masked_fill(norms == 0, 1)  # (B, N, Hm, G, S)
        return mix_by(self.memory_head_dim**0.5 * relevance, found)

    def reference_mix(self, q: Tensor, known: list[tuple[Tensor, Tensor]], h: int) -> Tensor:
        feature = reference.feature_map(q)
        relevance = [torch.cosine_similarity(feature, z, dim=0) for _, z in known]
        return reference_mean(q, known, [(self.memory_head_dim**0.5 * r).exp() for r in relevance])
